"""NanGuard by itself; how it ends a run is tested in tests/config/test_errors.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.checkpoint_writer import CheckpointWriter, Snapshot
from sdxs_lightning.callbacks.counts import Counts
from sdxs_lightning.callbacks.nan_guard import NEVER, NanGuard, networks_with_bad_weights
from sdxs_lightning.cli import main
from tests.helpers.ranks.processes import in_ranks
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
    state = {
        "student.a": torch.ones(3),
        "student.b": torch.full((2,), 3e38),  # finite, although neither its sum nor its square is
        "fake_score.a": torch.tensor([1.0, -float("inf"), 2.0]),
        "discriminator.a": torch.tensor([0.0, float("nan"), 1.0]).bfloat16(),
        "discriminator.b": torch.tensor(7),
        "ema.share": torch.empty(0),
        "_extra_state": None,
    }
    assert networks_with_bad_weights(state) == ["fake_score", "discriminator"]


def write_a_bad_shard(folder: str) -> int:
    """A rank that writes its shard of a checkpoint, in which the second rank has a NaN; 0 if both ranks wrote nothing."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weights = torch.tensor([1.0, float("nan") if rank else 2.0])
    contents = {"state_dict": {"student.weight": weights, "ema.weight": torch.ones(2)}}
    writer = CheckpointWriter(keep=1)
    writer.connect()
    for number, guarded in enumerate((True, False)):
        path = Path(folder) / f"checkpoint{number}"
        writer.start(Snapshot(contents, path, Counts(1, 1, 1, True), 1, True, guarded), lambda: None)
        assert writer.result() is None
        dist.barrier()  # rank 0 completes it after the others have written
        assert writer.bad_networks == (["student"] if guarded else [])
        assert folders.complete(path) is not guarded
        assert guarded is not any(Path(folder).iterdir())
        dist.barrier()
    return 0


def test_no_rank_writes_a_checkpoint_in_which_one_has_a_bad_weight(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    ended = in_ranks(write_a_bad_shard, (str(tmp_path / "checkpoints"),), tmp_path)
    assert [one.code for one in ended] == [0, 0], ended


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
