"""Signals and broken disks: what was trained is in a complete checkpoint, and the exit code says what happened."""

from __future__ import annotations

import copy
import errno
import gc
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from torch._C._distributed_c10d import HashStore

from data.shards.datamodule import ShardDataModule
from sdxs_lightning import run_start
from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks import checkpoint_writer
from sdxs_lightning.callbacks.rank_monitor import RankMonitor
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.callbacks.run_folder import LOCK, RunLock
from sdxs_lightning.cli import main
from sdxs_lightning.core.errors import UserError
from tests.helpers.ranks.processes import Ended, train_in_ranks
from tests.helpers.tiny_run import tiny_config, write_config

ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}


@pytest.fixture(scope="session")
def base_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With two micro-batches an iteration, so that signals can come inside one, and optimizers that have state."""
    config = tiny_config(tmp_path_factory.mktemp("tiny"), max_student_updates=6)
    arguments = config["model"]["init_args"]
    arguments["accumulate_grad_batches"] = 2
    for role in ("student", "fake_score"):
        arguments[role]["init_args"]["optimizer"] = ADAM
    return config


def with_callback(config: dict[str, Any], kind: str, /, **arguments: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    changed["trainer"]["callbacks"].insert(
        0, {"class_path": f"tests.helpers.faults.{kind}", "init_args": arguments}
    )
    return changed


def train(folder: Path, config: dict[str, Any], *arguments: str) -> int:
    return main(["--trust=tests", "--config", str(write_config(folder / "tiny.yaml", config)), *arguments])


def train_in_two(folder: Path, config: dict[str, Any], *arguments: str) -> list[Ended]:
    file = write_config(folder / "tiny.yaml", config)
    return train_in_ranks(["--trust=tests", "--config", str(file), *arguments], folder)


def newest(folder: Path) -> Path:
    found = folders.newest_complete_checkpoint(folder / "run" / "checkpoints")
    assert found is not None
    return found


def state(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(newest(folder) / folders.STATE, weights_only=True)
    return loaded


def assert_equal(one: Any, other: Any) -> None:
    """Bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_a_signal_leaves_a_checkpoint_at_the_end_of_its_iteration(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    """SLURM signals every process of a step; workers that died of SIGTERM ended runs without a checkpoint."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    config["data"]["init_args"]["num_workers"] = 2
    signalled = with_callback(config, "RaiseSignal", name=name, batch=5, group=True)
    assert train(tmp_path, signalled) == code
    # The 5th batch is the first of the 3rd iteration.
    assert newest(tmp_path).name == "update_00000003-batch_00000006"
    said = capfd.readouterr().err
    assert (
        f"stopped: stopped by {name} after student update 3: checkpoint saved in {newest(tmp_path)}" in said
    )
    assert said.count(f"{name}: stopping") == 1  # not once per worker
    assert "--ckpt_path auto (or last)" in said
    assert "Traceback" not in said
    assert {number: signal.getsignal(number) for number in before} == before
    # The end of the process would kill the workers. Here the garbage collector would find them, and wait 20 s for them.
    for one in gc.get_objects():
        if type(one) is ShardDataModule:  # isinstance() would wake lazy modules
            one.teardown()


def test_a_signal_before_the_first_update_saves_nothing_and_keeps_its_exit_code(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under SLURM, Lightning's own handler would save hpc_ckpt_1.ckpt, requeue by itself and train on."""
    for variable, value in {
        "JOB_ID": "17",
        "JOB_NAME": "x",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{variable}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    assert train(tmp_path, with_callback(config, "RaiseSignal", name="SIGUSR1", batch=0)) == 138
    assert "before the first update of this start, so there was nothing to save" in capfd.readouterr().err
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    # Left by an earlier version: not resumed from unasked.
    (tmp_path / "run" / "hpc_ckpt_1.ckpt").touch()
    assert train(tmp_path, config) == 2
    assert "hpc_ckpt_1.ckpt' was written by Lightning's own SLURM handler" in capfd.readouterr().err


def test_a_signal_after_a_regular_checkpoint_writes_no_second_one(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["model"]["init_args"]["update_schedule"]["fake_score_updates_per_student_update"] = 2
    assert train(tmp_path, with_callback(config, "RaiseSignal", name="SIGTERM", batch=7)) == 143
    # Student update 2 ends with batch 6, the next iteration, of the fake score alone, with batch 8.
    assert [path.name for path in folders.complete_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "update_00000002-batch_00000006"
    ]


def test_auto_means_the_newest_checkpoint_once_the_folder_is_locked(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on another host saves its first checkpoint, and ends, while its lock is watched."""
    assert train(tmp_path, with_callback(config, "RaiseSignal", name="SIGTERM", batch=5)) == 143
    saved, hidden = newest(tmp_path), tmp_path / "hidden"
    saved.parent.rename(hidden)
    acquire = RunLock.acquire

    def watched(lock: RunLock) -> str | None:
        hidden.rename(saved.parent)
        return acquire(lock)

    monkeypatch.setattr(RunLock, "acquire", watched)
    assert train(tmp_path, config, "--ckpt_path", "auto") == 0
    starts = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert json.loads(starts[-1])["resumed_from"] == str(saved / folders.STATE)
    manifest = folders.read_manifest(newest(tmp_path))
    assert manifest is not None and (manifest.student_updates, manifest.starts) == (6, 2)


def test_auto_begins_and_goes_on(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One command for start and restart, as launchers that start again need it, with start_over too."""
    config["trainer"]["callbacks"][1]["init_args"]["start_over"] = True
    cut = with_callback(config, "RaiseSignal", name="SIGTERM", batch=5)
    (tmp_path / "run" / "checkpoints" / ".update_00000001-batch_00000002.partial").mkdir(parents=True)
    assert train(tmp_path, cut, "--ckpt_path", "auto") == 143
    assert newest(tmp_path).name == "update_00000003-batch_00000006"
    assert train(tmp_path, cut, "--ckpt_path", "auto") == 143
    assert newest(tmp_path).name == "update_00000006-batch_00000012"  # 3 more: it went on
    for path in folders.complete_checkpoints(tmp_path / "run" / "checkpoints"):
        (path / folders.MANIFEST).unlink()
    capfd.readouterr()
    assert train(tmp_path, config, "--ckpt_path", "auto") == 2  # damaged ones are not begun anew over
    assert "found only 2 incomplete one(s)" in capfd.readouterr().err


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    config: dict[str, Any], tmp_path: Path
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for folder in (straight, resumed):
        folder.mkdir()
    config["trainer"]["default_root_dir"] = str(straight / "run")
    assert train(straight, config) == 0
    finished = state(straight)["state_dict"]
    assert train(straight, config, "--ckpt_path", "last") == 0  # does nothing
    assert_equal(state(straight)["state_dict"], finished)
    config["trainer"]["default_root_dir"] = str(resumed / "run")
    assert train(resumed, with_callback(config, "RaiseSignal", name="SIGTERM", batch=3)) == 143
    assert train(resumed, config, "--ckpt_path", "last") == 0
    assert newest(straight).name == newest(resumed).name == "update_00000006-batch_00000012"
    one, other = state(straight), state(resumed)
    for key in one.keys() - {"loops", "callbacks", "run"}:
        assert_equal(one[key], other[key])
    progress = one["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert_equal(progress["total"], other["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"])


def test_a_second_ctrl_c_stops_at_once(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, with_callback(config, "RaiseSignal", name="SIGINT", batch=2, times=2)) == 130
    assert folders.complete_checkpoints(tmp_path / "run" / "checkpoints") == []
    assert "checkpoints written so far are complete" in capfd.readouterr().err


def test_a_truncated_checkpoint_is_never_chosen(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, config) == 0
    checkpoints = folders.complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name[:15] for path in checkpoints] == ["update_00000004", "update_00000006"]
    broken = checkpoints[-1]
    os.truncate(broken / folders.STATE, (broken / folders.STATE).stat().st_size - 1)
    assert newest(tmp_path) == checkpoints[0]
    assert train(tmp_path, config, "--ckpt_path", str(broken)) == 2
    assert "is not complete: a file is missing or shorter" in capfd.readouterr().err
    assert train(tmp_path, config, "--ckpt_path", "last") == 0
    assert newest(tmp_path).name == broken.name
    # A write that was cut off before the rename.
    newest(tmp_path).rename(folders.partial_of(newest(tmp_path)))
    assert newest(tmp_path) == checkpoints[0]


def test_a_full_disk_ends_the_run_and_leaves_the_previous_checkpoint(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full = with_callback(config, "FullDisk", batch=5, limit_bytes=300_000)
    assert train(tmp_path, full) == 4
    said = capfd.readouterr().err
    assert "the checkpoint of student update 4 could not be written" in said
    assert "(file too large, " in said
    assert f"the last good checkpoint is {newest(tmp_path)}" in said
    assert "Traceback" not in said
    # Nothing half written is left.
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "update_00000002-batch_00000004"
    ]
    assert train(tmp_path, config, "--ckpt_path", "last") == 0


@pytest.mark.timeout(1200)
def test_two_processes_stop_at_the_same_batch_if_one_is_signalled(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    config["trainer"]["callbacks"][-1]["init_args"] = {"agree_every_n_batches": 5}
    ended = train_in_two(tmp_path, with_callback(config, "RaiseSignal", name="SIGTERM", batch=2, rank=1))
    assert [rank.code for rank in ended] == [143, 0], ended
    assert sum(rank.said.count("stopped: ") for rank in ended) == 1
    assert not any("Traceback" in rank.said for rank in ended)
    # They ask each other at batch 5; the iteration ends with batch 6.
    assert newest(tmp_path).name == "update_00000003-batch_00000006"
    # One process goes on with the same global batch.
    config["trainer"] |= {"devices": 1, "strategy": "auto"}
    config["data"]["init_args"]["batch_size"] = 4
    assert train(tmp_path, config, "--ckpt_path", "last") == 0
    assert newest(tmp_path).name == "update_00000006-batch_00000012"


@pytest.mark.timeout(1200)
def test_a_full_disk_on_one_of_two_processes_ends_both(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    ended = train_in_two(tmp_path, with_callback(config, "FullDisk", batch=5, limit_bytes=300_000))
    # Lightning's launcher would kill rank 0 if a rank that it started failed: rank 0 alone carries the code.
    assert [rank.code for rank in ended] == [4, 0], ended
    assert "the checkpoint of student update 4 could not be written" in ended[0].said
    assert newest(tmp_path).name == "update_00000002-batch_00000004"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            UserError("the base is another one."),
            2,
            "rank 1 (host {}, process {}) ended: the base is another one.",
        ),
        (ValueError(), 5, "rank 1 (host {}, process {}) has not answered for 0 s"),
    ],
)
def test_an_end_of_one_rank_alone_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception, code: int, said: str
) -> None:
    """With its sentence and exit code; but not one that is ending too, and still writes a checkpoint."""
    store, codes = HashStore(), list[int]()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    def leave(code: int) -> None:
        codes.append(code)
        monitors[0]._ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    monitors = [RankMonitor(seconds=0.3) for _ in range(3)]
    for rank, monitor in enumerate(monitors):
        ranks: Any = SimpleNamespace(count=3, number=rank, wait=lambda: None)
        monitor.start(ranks, lambda rank=rank: rank == 2)  # type: ignore[misc]
    time.sleep(0.5)
    assert not codes
    monitors[1].stop(error)
    end = time.monotonic() + 20
    while not codes and time.monotonic() < end:
        time.sleep(0.05)
    monitors[2].stop()
    assert codes == [code]
    assert f"error: {said.format(socket.gethostname(), os.getpid())}" in capfd.readouterr().err
    explained = monitors[0].explain(ValueError("connection closed"))
    assert explained is not None and explained.exit_code == code


def test_all_ranks_resume_from_what_rank_0_chose(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A rank that looks for itself may see an old listing of a network disk, and end alone."""

    class Second(Ranks):
        first = False

        def of_first(self, value: Any) -> Any:
            return None, "rank 0 found none."

    def looks(*_: Any) -> None:
        raise AssertionError("only rank 0 looks for checkpoints")

    monkeypatch.setattr(run_start, "Ranks", Second)
    monkeypatch.setattr(run_start, "chosen_checkpoint", looks)
    assert train(tmp_path, config, "--ckpt_path", "last") == 2
    assert "error: rank 0 found none." in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_disk_that_becomes_read_only_ends_the_run_with_its_sentence(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not with a traceback of the lock, which cannot be removed either."""

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(checkpoint_writer, "_begin", refuse)
    unlink = Path.unlink

    def refuse_lock(path: Path, missing_ok: bool = False) -> None:
        (refuse if path.name == LOCK else unlink)(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_lock)
    assert train(tmp_path, config) == 4
    assert "(read-only file system, " in capfd.readouterr().err


@pytest.mark.timeout(1200)
def test_a_killed_rank_is_named_by_the_other(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    config["trainer"]["callbacks"][-1]["init_args"] = {"rank_timeout_seconds": 6}
    ended = train_in_two(tmp_path, with_callback(config, "RaiseSignal", name="SIGKILL", batch=4, rank=1))
    assert [rank.code for rank in ended] == [5, -signal.SIGKILL], ended
    assert "error: rank 1 (host " in ended[0].said
    assert "Traceback" not in ended[0].said


@pytest.mark.timeout(1200)
def test_sharded_checkpoints_are_complete_or_not_there_too(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config["trainer"] |= {
        "devices": 2,
        "strategy": {"class_path": "sdxs_lightning.training.sharding.ShardedNetworks"},
    }
    config["trainer"]["callbacks"][-1]["init_args"] = {"agree_every_n_batches": 2}
    config["model"]["init_args"]["update_schedule"]["max_student_updates"] = 2
    config["trainer"]["callbacks"].append({"class_path": "sdxs_lightning.callbacks.export.Export"})
    ended = train_in_two(tmp_path, with_callback(config, "RaiseSignal", name="SIGUSR1", batch=1, rank=1))
    assert [rank.code for rank in ended] == [138, 0], ended
    interrupted = newest(tmp_path)
    assert interrupted.name == "update_00000001-batch_00000002"
    sizes = json.loads((interrupted / folders.MANIFEST).read_text())["sizes"]
    assert {"state.ckpt/meta.pt", "state.ckpt/.metadata"} < set(sizes)
    assert sum(name.endswith(".distcp") for name in sizes) == 2
    alone = copy.deepcopy(config)
    alone["trainer"] |= {"devices": 1, "strategy": "auto"}
    assert train(tmp_path, alone, "--ckpt_path", "last") == 2
    assert "is sharded; resume with --config configs/hardware/fsdp2.yaml" in capfd.readouterr().err
    # One process reads the shards of two, with the same global batch. (Two: tests/training/distillation/test_distributed.py.)
    config["trainer"]["devices"] = 1
    config["data"]["init_args"]["batch_size"] = 4
    file = write_config(tmp_path / "tiny.yaml", config)
    (ended_alone,) = train_in_ranks(
        ["--trust=tests", "--config", str(file), "--ckpt_path", "last"], tmp_path, count=1
    )
    assert ended_alone.code == 0, ended_alone
    assert newest(tmp_path).name == "update_00000002-batch_00000004"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    images = pipeline("a red circle", num_inference_steps=1, guidance_scale=0, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    # One shard short by a byte: the checkpoint is none.
    interrupted = newest(tmp_path)
    sizes = json.loads((interrupted / folders.MANIFEST).read_text())["sizes"]
    shard = next(name for name in sizes if name.endswith(".distcp"))
    os.truncate(interrupted / shard, sizes[shard] - 1)
    assert not folders.complete(interrupted)


@pytest.mark.parametrize("damage", ["missing file", "no manifest", "broken manifest"])
def test_what_makes_a_checkpoint_incomplete(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / folders.checkpoint_name(1, 2)
    partial = folders.partial_of(folder)
    (partial / folders.STATE).mkdir(parents=True)
    (partial / folders.STATE / "a.distcp").write_bytes(b"1234")
    (partial / folders.STATE / "b.distcp").write_bytes(b"12")
    assert folders.seal(folder, 1, 1, 2) == 6
    assert folders.complete(folder)
    assert folders.newest_complete_checkpoint(tmp_path) == folder
    actions: dict[str, Callable[[], Any]] = {
        "missing file": (folder / folders.STATE / "b.distcp").unlink,
        "no manifest": (folder / folders.MANIFEST).unlink,
        "broken manifest": lambda: (folder / folders.MANIFEST).write_text('{"sizes": {"state'),
    }
    actions[damage]()
    assert not folders.complete(folder)
    assert folders.newest_complete_checkpoint(tmp_path) is None
    assert folders.incomplete_checkpoints(tmp_path) == [folder]
