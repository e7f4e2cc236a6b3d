"""A stage's own training step without a Trainer, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sdxs_lightning.training.manual_optimization import ManualOptimization


@contextmanager
def standalone(stage: ManualOptimization, device: torch.device) -> Iterator[None]:
    """Context in which `stage.training_step` runs: networks built and moved, one optimizer each, values logged to nowhere.

    Numbers are logged as Lightning does it, which decides where they are copied.

    Args:
        stage: newly constructed.
        device: where it runs.
    """
    stage.configure_model()
    stage.to(device)
    stage.on_fit_start()
    optimizers: dict[str, Any] = {
        role: network.configure_optimizers()["optimizer"]  # type: ignore[index, call-overload]
        for role, network in stage.networks.items()
    }

    def log_dict(line: dict[str, Any]) -> None:
        for name, value in line.items():
            stage._LightningModule__to_tensor(value, name)  # type: ignore[operator]

    trainer = SimpleNamespace(model=None, strategy=None, should_stop=False)
    replaced = {
        "_optimizer_of": optimizers.__getitem__,
        "manual_backward": lambda loss: loss.backward(),
        "log_dict": log_dict,
        "_trainer": trainer,
    }
    before = {name: vars(stage)[name] for name in replaced if name in vars(stage)}
    vars(stage).update(replaced)
    try:
        with clipping_on_meta():
            yield
    finally:
        for name in replaced:
            del vars(stage)[name]
        vars(stage).update(before)


@contextmanager
def clipping_on_meta() -> Iterator[None]:
    """Context in which gradients on the meta device are clipped as on a GPU: torch refuses `foreach=True` there."""
    with mock.patch("torch.nn.utils.clip_grad._device_has_foreach_support", return_value=True):
        yield
