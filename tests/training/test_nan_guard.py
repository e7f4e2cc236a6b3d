"""NanGuard by itself; how it ends a run is tested in tests/config/test_errors.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdxs_lightning.callbacks.nan_guard import NEVER, NanGuard, _networks_with_bad_weights
from sdxs_lightning.cli import main
from tests.helpers.tiny_run import tiny_config, write_config


class ScalarReads(TorchDispatchMode):
    """Counts reads of device values by the host, of which each waits for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_iteration_is_kept(bad: float) -> None:
    guard = NanGuard()
    for iteration, value in enumerate([1.0, bad, 2.0, bad]):
        guard._record("student/loss", torch.tensor(value), iteration)
        guard._record("fake_score/loss", torch.tensor(1.0), iteration)
    assert guard._first_bad["student/loss"].item() == 1
    assert guard._first_bad["fake_score/loss"].item() == NEVER


def test_bad_weights_are_named_by_network() -> None:
    named = [
        ("student.a", torch.ones(3)),
        ("student.b", torch.full((2,), 3e38)),  # finite, although its square is not
        ("fake_score.a", torch.tensor([1.0, float("inf")])),
        ("discriminator.a", torch.tensor([float("nan")])),
        ("ema.share", torch.empty(0)),
    ]
    assert _networks_with_bad_weights(named) == ["fake_score", "discriminator"]


def test_between_readings_no_value_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = {1000: 0, 1: 0}
    original, to_list = NanGuard.on_train_batch_end, torch.Tensor.tolist
    active: list[ScalarReads] = []

    def counted_list(tensor: torch.Tensor) -> Any:  # on the CPU it needs no operator
        for mode in active:
            mode.count += 1
        return to_list(tensor)

    def counted(self: NanGuard, *arguments: Any) -> None:
        with ScalarReads() as mode:
            active.append(mode)
            original(self, *arguments)
            active.clear()
        reads[self.read_every_n_batches] += mode.count

    monkeypatch.setattr(torch.Tensor, "tolist", counted_list)
    monkeypatch.setattr(NanGuard, "on_train_batch_end", counted)
    for every in reads:
        config = tiny_config(tmp_path, max_student_updates=2)
        config["trainer"]["default_root_dir"] = str(tmp_path / f"run{every}")
        config["trainer"]["callbacks"][0]["init_args"]["read_every_n_batches"] = every
        assert main(["--config", str(write_config(tmp_path / "tiny.yaml", config))]) == 0
    assert reads[1000] == 0
    assert reads[1] > 0
