"""Checkpoints written while training continues: their contents, their failures, and the room that they need."""

from __future__ import annotations

import copy
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from evaluation.benchmarks.checkpoint_stall import StallOptions, measure
from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks import checkpoint_writer, checkpointing
from sdxs_lightning.callbacks.checkpoint_staging import Rounding, Staging
from sdxs_lightning.callbacks.checkpointing import Checkpointing
from sdxs_lightning.callbacks.counts import Counts
from sdxs_lightning.memory_plan.checkpoint_bytes import CheckpointBytes, averaged_names, checkpoint_bytes
from tests.helpers.ranks.processes import train_in_ranks
from tests.helpers.tiny_distillation import built, distillation, fit
from tests.helpers.tiny_run import tiny_config, write_config
from tests.training.test_interruption import ADAM, assert_equal, newest, train, with_callback

NOTHING = Rounding()


@pytest.fixture(scope="module")
def base(smaller_base: Any) -> Any:
    return smaller_base


@pytest.fixture(scope="module")
def base_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = tiny_config(tmp_path_factory.mktemp("tiny"), max_student_updates=4)
    for role in ("student", "fake_score"):
        config["model"]["init_args"][role]["init_args"]["optimizer"] = ADAM
    return config


# ------------------------------------------------------------------------------------------------------------- staging


def test_a_staged_checkpoint_shares_nothing_with_the_state() -> None:
    weight, channels_last = torch.randn(4, 3), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    weights = cast(Any, OrderedDict(weight=weight, tied=weight, view=weight[:2], other=channels_last))
    weights._metadata = {"": {"version": 1}}  # as a module's state_dict has it
    live: dict[str, Any] = {
        "state_dict": weights,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4)}}}],
        "loops": {"counts": [1, (2, torch.ones(2, dtype=torch.int64))]},
    }
    before, staging = copy.deepcopy(live), Staging()
    staged = staging.copy(live, NOTHING)
    staging.wait()
    assert_equal(staged, before)
    assert staged["state_dict"]._metadata == {"": {"version": 1}}
    assert type(staged["state_dict"]) is OrderedDict
    assert (
        staged["state_dict"]["tied"] is staged["state_dict"]["weight"]
    )  # one copy, and one record in the file
    assert staged["state_dict"]["other"].stride() == channels_last.stride()
    with torch.no_grad():
        for tensor in _tensors(live):
            tensor.add_(1)
    live["loops"]["counts"].append(4)
    assert_equal(staged, before)
    # The next copy has the new values, in the same memory.
    again = staging.copy(live, NOTHING)
    assert_equal(again["state_dict"], live["state_dict"])
    assert [one.data_ptr() for one in _tensors(again)] == [one.data_ptr() for one in _tensors(staged)]
    live["state_dict"]["weight"] = torch.randn(5, 3)
    assert_equal(staging.copy(live, NOTHING)["state_dict"], live["state_dict"])


def test_rounding_is_of_averages_and_moments_only() -> None:
    live: dict[str, Any] = {
        "state_dict": {"student": torch.randn(9), "ema": torch.randn(9), "ema.schedule": torch.randn(9)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(257.0), "exp_avg": torch.randn(9)}}}],
    }
    rounding = Rounding(frozenset({"ema"}))
    for rounded in (Staging().copy(live, rounding), rounding.rounded(live)):
        dtypes = [tensor.dtype for tensor in _tensors(rounded)]
        assert dtypes == [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
        torch.testing.assert_close(
            rounded["state_dict"]["ema"].float(), live["state_dict"]["ema"], rtol=2**-8, atol=0
        )
        assert rounded["optimizer_states"][0]["state"][0]["step"] == 257  # bfloat16 has no 257


@pytest.mark.gpu
def test_staging_from_a_gpu_is_ordered_before_what_training_does_next() -> None:
    weight = torch.randn(4096, 4096, device="cuda")
    before, staging = weight.cpu(), Staging()
    for _ in range(2):
        staged = staging.copy({"state_dict": {"weight": weight}}, NOTHING)["state_dict"]["weight"]
        weight.add_(1)
        staging.wait()
        assert staged.is_pinned() and torch.equal(staged, before)
        before = weight.cpu()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    ):
        yield from _tensors(inner)


# ------------------------------------------------------------------------------------------------- while training runs


class Slow:
    """A disk on which checkpoints begin to be written when `go` is set; each start is recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), 0
        begin = checkpoint_writer._begin

        def wait(partial: Path) -> None:
            self.begun += 1
            assert self.go.wait(60)
            begin(partial)

        monkeypatch.setattr(checkpoint_writer, "_begin", wait)


class Release(Callback):
    """Lets the disk go on at a batch, counted from 1, and records how many checkpoints had begun by then."""

    def __init__(self, slow: Slow, batch: int) -> None:
        self.slow, self.batch, self.begun = slow, batch, -1

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self.batch:
            self.begun = self.slow.begun
            self.slow.go.set()


def test_training_continues_and_the_checkpoint_is_that_of_its_update(
    base: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adamw = partial(torch.optim.AdamW, lr=1e-2)

    def run(name: str, asynchronous: bool, *callbacks: Callback) -> dict[str, Any]:
        module = distillation(base("sd-epsilon"), optimizer=adamw)
        saver = Checkpointing(1, keep=9, folder=str(tmp_path / name), asynchronous=asynchronous)
        fit(module, shards, 4, callbacks=[*callbacks, saver], enable_checkpointing=True)
        return {
            path.name: torch.load(path / folders.STATE, weights_only=True)
            for path in folders.complete_checkpoints(tmp_path / name)
        }

    stopping = run("synchronous", False)
    slow = Slow(monkeypatch)
    # The first checkpoint is after the first student update; the second waits for it, so training gets no further.
    first = sorted(stopping)[0]
    release = Release(slow, batch=int(first.rpartition("_")[2]) + 1)
    continuing = run("asynchronous", True, release)
    assert release.begun == 1  # another batch had begun while the first checkpoint was held
    assert stopping.keys() == continuing.keys() and len(stopping) >= 2
    for name, contents in stopping.items():
        for key in contents.keys() - {"callbacks", "run"}:
            assert_equal(continuing[name][key], contents[key])


def test_a_save_waits_for_the_one_before(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["trainer"]["callbacks"][1]["init_args"] = {"every_n_student_updates": 1, "keep": 9}
    slow, waits = Slow(monkeypatch), []
    result = checkpoint_writer.CheckpointWriter.result

    def recorded(writer: checkpoint_writer.CheckpointWriter) -> str | None:
        waits.append((writer.busy, slow.begun))
        slow.go.set()
        return result(writer)

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "result", recorded)
    assert train(tmp_path, config) == 0
    assert waits[0] == (True, 1)  # the second save found the first one held, and had begun nothing
    assert len(folders.complete_checkpoints(tmp_path / "run" / "checkpoints")) == 4


def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """With half of the second file written; before the rename: test_a_truncated_checkpoint_is_never_chosen."""
    config["trainer"]["callbacks"][1]["init_args"] = {"every_n_student_updates": 1, "keep": 9}
    file = write_config(tmp_path / "tiny.yaml", with_callback(config, "KillWhileSaving", save=2))
    (ended,) = train_in_ranks(["--trust=tests", "--config", str(file)], tmp_path, count=1)
    assert ended.code == -signal.SIGKILL, ended
    checkpoints = tmp_path / "run" / "checkpoints"
    (left,) = checkpoints.glob(".*")
    assert left.name.startswith(".update_00000002-") and [one.name for one in left.iterdir()] == [
        folders.STATE
    ]
    assert newest(tmp_path).name.startswith("update_00000001-")
    assert (left / folders.STATE).stat().st_size > 0.4 * (newest(tmp_path) / folders.STATE).stat().st_size
    assert train(tmp_path, config, "--ckpt_path", "auto") == 0
    assert newest(tmp_path).name.startswith("update_00000004-") and not list(checkpoints.glob(".*"))


def test_a_failure_in_the_background_ends_the_run_before_the_next_save(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["trainer"]["callbacks"][1]["init_args"] = {"every_n_student_updates": 1}
    config["model"]["init_args"]["update_schedule"]["max_student_updates"] = 100_000
    taken = []
    save = Checkpointing.save

    def counted(self: Checkpointing, trainer: Trainer) -> Path:
        taken.append(1)
        return save(self, trainer)

    monkeypatch.setattr(Checkpointing, "save", counted)

    def refuse(partial: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_writer, "_begin", refuse)
    assert train(tmp_path, config) == 4
    said = capfd.readouterr().err
    assert "the checkpoint of student update 1 could not be written" in said
    assert "(permission denied, " in said and "there is no checkpoint yet" in said
    assert "Traceback" not in said and len(taken) <= 2
    # What is not the disk's fault keeps its traceback.
    monkeypatch.setattr(checkpoint_writer, "_begin", lambda partial: 1 / 0)
    writer = checkpoint_writer.CheckpointWriter(keep=1)
    writer.start(
        checkpoint_writer.Snapshot({}, tmp_path / "x", Counts(1, 1, 1, True), 1, False), lambda: None
    )
    with pytest.raises(ZeroDivisionError):
        writer.result()


def test_a_signal_after_a_resume_writes_no_second_checkpoint_of_that_update(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["model"]["init_args"]["update_schedule"] |= {
        "max_student_updates": 6,
        "fake_score_updates_per_student_update": 3,
    }
    assert train(tmp_path, with_callback(config, "RaiseSignal", name="SIGTERM", batch=6)) == 143
    (saved,) = folders.complete_checkpoints(tmp_path / "run" / "checkpoints")
    again = with_callback(config, "RaiseSignal", name="SIGTERM", batch=1)
    assert train(tmp_path, again, "--ckpt_path", "auto") == 143
    assert folders.complete_checkpoints(tmp_path / "run" / "checkpoints") == [saved]


# ------------------------------------------------------------------------------------------------------- bytes and room


@pytest.mark.parametrize("rounded", [False, True])
def test_the_planned_size_is_that_of_the_file_and_rounded_averages_resume(
    base: Any, shards: Path, tmp_path: Path, rounded: bool
) -> None:
    def run(name: str, ckpt: Path | None = None) -> Path:
        module = distillation(base("sd-epsilon"), optimizer=partial(torch.optim.AdamW, lr=1e-3))
        saver = Checkpointing(folder=str(tmp_path / name), averages_in_bfloat16=rounded)
        fit(
            module,
            shards,
            2 if ckpt is None else 4,
            ckpt_path=None if ckpt is None else str(ckpt),
            callbacks=[saver],
            enable_checkpointing=True,
        )
        return folders.complete_checkpoints(tmp_path / name)[-1] / folders.STATE

    file = run("first")
    stage = built(distillation(base("sd-epsilon"), optimizer=partial(torch.optim.AdamW, lr=1e-3)))
    size = checkpoint_bytes(stage)
    contents = torch.load(file, weights_only=True)
    of_tensors = sum({tensor.data_ptr(): tensor.nbytes for tensor in _tensors(contents)}.values())
    assert size.averages > 0 and size.optimizers > size.averages
    # Step counters, and the positions and counters of callbacks, are not counted.
    assert 0 <= of_tensors - size.stored(rounded) < 8192
    averaged = averaged_names(stage, stage.plan_networks())
    expected = torch.bfloat16 if rounded else torch.float32
    assert {contents["state_dict"][name].dtype for name in averaged} == {expected}
    resumed = torch.load(run("resumed", file), weights_only=True)
    assert resumed["state_dict"].keys() == contents["state_dict"].keys()
    assert not torch.equal(resumed["state_dict"][min(averaged)], contents["state_dict"][min(averaged)])


def test_the_room_on_the_disk_is_checked_before_training(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = CheckpointBytes(1_000_000_000, 500_000_000, 1_000_000_000)
    monkeypatch.setattr(checkpointing, "checkpoint_bytes", lambda stage: size)
    monkeypatch.setattr(checkpointing, "free_bytes", lambda folder: 2_400_000_000)
    assert train(tmp_path, config) == 2
    said = capfd.readouterr().err
    assert "has 2.40 GB free, and one checkpoint has 2.50 GB; make room, lower Checkpointing.keep" in said
    assert not folders.complete_checkpoints(tmp_path / "run" / "checkpoints")
    monkeypatch.setattr(checkpointing, "free_bytes", lambda folder: 7_000_000_000)
    config["model"]["init_args"]["update_schedule"]["max_student_updates"] = 2
    with pytest.warns(UserWarning, match="7.00 GB free, and checkpoints will need 7.50 GB more"):
        assert train(tmp_path, config) == 0


def test_the_benchmark_measures_every_save(tmp_path: Path) -> None:
    result = measure(StallOptions(megabytes=5, saves=2, repeats=1, folder=tmp_path))
    assert result["saves"] == 2 and not list(tmp_path.iterdir())
    assert min(value for name, value in result.items() if name.startswith("stall")) > 0
