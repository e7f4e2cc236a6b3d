"""The host never waits for the device in a training step, counted on the meta device, which stands for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evaluation.benchmarks.gpu.device_counter import DeviceCounter
from evaluation.benchmarks.gpu.standalone import standalone
from sdxs_lightning.callbacks import nan_guard
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.training.averaged_training import AveragedTraining
from tests.helpers.tiny import tiny_batch
from tests.helpers.tiny_distillation import distillation

Base = Callable[[str], Path]
META = torch.device("meta")
ADAM = partial(torch.optim.AdamW, lr=1e-4, foreach=True)


@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl-epsilon"])
def test_no_iteration_waits(base: Base, kind: str) -> None:
    """SD with all weights of the fake score, SDXL with adapters."""
    fake_score = FakeScore(ADAM, lora=LoRA(rank=2) if kind.startswith("sdxl") else None)
    stage = distillation(base(kind), optimizer=ADAM, fake_score=fake_score)
    batch = tiny_batch(2).to(META)
    with standalone(stage, META):
        stage.family.encode_prompts(batch.captions)  # loads the text encoders, and keeps the empty prompt
        with DeviceCounter() as counter:
            stage.training_step(batch, 0)
    assert counter.waits == []
    assert stage.iterations == stage.student_updates == 1
    assert counter.launches["convolution_backward"] > 100 and counter.launches["_foreach_lerp_"] >= 1


def test_the_nan_guard_records_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"student/loss": torch.ones((), device=META), "student/lr": torch.tensor(1e-4)}
    trainer: Any = SimpleNamespace(callback_metrics=metrics)
    monkeypatch.setattr(nan_guard, "counts_of", lambda trainer: SimpleNamespace(iterations=3))
    guard = nan_guard.NanGuard()
    with DeviceCounter() as counter:
        for index in range(2):
            guard.on_train_batch_end(trainer, None, None, None, index)  # type: ignore[arg-type]
    assert counter.waits == [] and counter.total > 0


def test_the_learning_rate_is_logged_from_the_host() -> None:
    """Of the stages with automatic optimisation; Lightning copies a plain number to the device."""
    logged: dict[str, Any] = {}
    stage = SimpleNamespace(
        learner=torch.nn.Linear(2, 2),
        log_prefix="train/",
        log=lambda name, value: logged.update({name: value}),
    )
    optimizer = torch.optim.SGD(stage.learner.parameters(), lr=0.25)
    stage.learner(torch.ones(1, 2)).sum().backward()
    AveragedTraining.configure_gradient_clipping(stage, optimizer, 1.0)  # type: ignore[arg-type]
    assert logged["train/lr"].device.type == "cpu" and logged["train/lr"] == 0.25


def test_every_kind_of_wait_is_seen() -> None:
    """Each of them with the line that asked for it; what does not wait is not counted."""
    values, mask = torch.ones(4, device=META), torch.ones(4, device=META, dtype=torch.bool)
    ways: dict[str, Callable[[], object]] = {
        "_local_scalar_dense": lambda: values.sum().item(),
        "tensor": lambda: torch.tensor(1.0, device=META),
        "_to_copy": lambda: torch.ones(4).to(META),
        "copy_": lambda: values.copy_(torch.ones(4)),
        "equal": lambda: torch.equal(values, values),
        "index with a mask": lambda: values[mask],
        "index with an index on the host": lambda: values[torch.tensor([1])],
    }
    for name, wait in ways.items():
        with (
            DeviceCounter() as counter,
            suppress(RuntimeError),
        ):  # the meta device has no size for what a mask selects
            wait()
        assert len(counter.waits) == 1, name
        assert counter.waits[0].startswith(f"{name} at test_host_waits.py:"), counter.waits
    with DeviceCounter() as counter:
        torch.ones(4).to(META, non_blocking=True)
        torch.tensor(1.0).item()
        (values.view(2, 2) + 1).t()
    assert counter.waits == [] and counter.total == 2  # the copy and the addition
