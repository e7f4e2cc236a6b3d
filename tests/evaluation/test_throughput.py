"""What a run says of its speed: times, operations, memory, the slowest rank; in every log, and as one curve."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from data.shards.datamodule import ShardDataModule
from evaluation.benchmarks.throughput import ShardsOptions
from evaluation.benchmarks.throughput_shards import run as time_shards
from evaluation.callbacks import progress, step_timing
from evaluation.callbacks.progress import Throughput
from evaluation.callbacks.step_flops import StepFlops, peak_of
from evaluation.callbacks.step_timing import COLLECTIVES, Stopwatch, TimedCollectives
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from sdxs_lightning.training.csv_log import RunCSVLogger
from sdxs_lightning.training.run_logs import RunJSONLogger, RunTensorBoardLogger
from tests.helpers.ranks.processes import in_ranks
from tests.helpers.ranks.throughput_worker import SLOW_SECONDS, train_with_a_slow_rank
from tests.helpers.tiny_distillation import distillation, save_base, save_shards


def test_operations_of_a_step_are_those_of_its_products() -> None:
    """2 a product and sample: the first layer's input needs no gradient, the second's does."""
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    flops, counted = StepFlops(), []
    for _ in range(3):
        ordinary = flops.begin("kind", module)
        module(torch.ones(5, 8)).sum().backward()
        counted.append((ordinary, flops.end()))
    step = 2 * 5 * (2 * 8 * 16 + 3 * 16 * 4)
    assert counted == [(False, 0), (False, step), (True, step)]


def test_what_a_checkpointed_block_computes_again_is_not_counted() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gradient_checkpointing = nn.Linear(8, 8), False

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = (
                checkpoint(self.layer, x, use_reentrant=False)
                if self.gradient_checkpointing
                else self.layer(x)
            )
            return y

    module, counted = Checkpointed(), []
    for module.gradient_checkpointing in (False, True):
        flops = StepFlops()
        for _ in range(2):
            flops.begin("kind", module)
            module(torch.ones(3, 8, requires_grad=True)).sum().backward()
            operations = flops.end()
        counted.append(operations)
    assert counted == [3 * 2 * 3 * 8 * 8] * 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and shards."""
    folder = tmp_path_factory.mktemp("tiny")
    save_base("sd-epsilon", folder)
    save_shards(folder / "shards")
    return folder


class Clock:
    """A clock that goes on only where a test says so, however busy the machine is."""

    def __init__(self) -> None:
        self.now, self.every_reading = 0.0, 0.0

    def perf_counter(self) -> float:
        self.now += self.every_reading
        return self.now

    def step(self, *_: Any) -> None:
        """Of any optimizer: it takes two seconds."""
        self.now += 2.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Takes the place of the host's clock in what measures an iteration; optimizers' steps take time on it."""
    clock = Clock()
    for module in (step_timing, progress):
        monkeypatch.setattr(module, "time", clock)
    hook = register_optimizer_step_post_hook(clock.step)
    yield clock
    hook.remove()


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collectives_are_measured_where_they_hold_up_the_step(one_rank: None, clock: Clock) -> None:
    clock.every_reading = 1.0
    watch = Stopwatch(torch.device("cpu"))
    originals = {name: getattr(dist, name, None) for name in COLLECTIVES}
    collectives, value = TimedCollectives(watch, "collective"), torch.ones(3)
    collectives.install()
    dist.all_reduce(value)  # not on: not counted
    collectives.on = True
    dist.all_reduce(value)
    work = dist.all_reduce(value, async_op=True)
    assert work is not None
    clock.now += 100  # overlaps
    work.wait()
    assert work.is_completed()
    assert watch.read()["collective"] == (2.0, 2)  # of the first, from its call; of the second, its wait
    assert watch.read() == {}
    collectives.remove()
    assert {name: getattr(dist, name, None) for name in COLLECTIVES} == originals


def loggers(folder: Path) -> list[Any]:
    return [RunCSVLogger(str(folder)), RunTensorBoardLogger(str(folder)), RunJSONLogger(str(folder))]


def trained(tiny: Path, folder: Path, throughput: Throughput, updates: int, **options: Any) -> Trainer:
    """A distillation with a student update on every second iteration."""
    schedule = UpdateSchedule(max_student_updates=updates, fake_score_updates_per_student_update=2)
    module = distillation(tiny / "sd-epsilon", update_schedule=schedule)
    data = ShardDataModule(str(tiny / "shards"), 4)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        default_root_dir=folder,
        logger=loggers(folder),
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[throughput],
        **options,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def _saved(trainer: Trainer, folder: Path) -> Path:
    """The callback's state in a file, as in a checkpoint."""
    (callback,) = [one for one in trainer.callbacks if isinstance(one, Throughput)]  # type: ignore[attr-defined]
    torch.save(callback.state_dict(), folder / "state.pt")
    return folder / "state.pt"


TIMES = {"time/student_iteration_ms", "time/fake_score_iteration_ms", "time/data_wait_ms"}


def test_a_run_logs_where_its_time_goes(tiny: Path, tmp_path: Path, clock: Clock) -> None:
    throughput = Throughput(every_n_batches=4, peak_tflops=2.0)
    trainer = trained(tiny, tmp_path, throughput, updates=7)
    latest = throughput.latest
    assert latest.keys() >= TIMES
    # Fake score and discriminator step in each iteration, the student in every second.
    assert latest["time/student_iteration_ms"] == 6000.0
    assert latest["time/fake_score_iteration_ms"] == 4000.0
    assert latest["time/data_wait_ms"] == 0.0
    assert latest["throughput/images_per_second"] == 16 / 20
    assert latest["throughput/student_updates_per_second"] == 2 / 20
    assert latest["throughput/mfu"] == latest["throughput/tflops_per_device"] / 2
    # Operations by hand: the same two kinds of iterations in turn.
    known = throughput.state_dict()["operations"]
    by_kind = {kind.split()[0]: operations for kind, operations in known.items()}
    assert by_kind.keys() == {"student", "fake_score"}
    per_image = (by_kind["student"] + by_kind["fake_score"]) / 8
    speed = latest["throughput/images_per_second"]
    assert latest["throughput/tflops_per_device"] == pytest.approx(per_image * speed / 1e12)
    assert not any(name.startswith("ranks/") for name in latest)
    assert not {"start", "stop"} & vars(trainer.profiler).keys()  # type: ignore[attr-defined]

    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/images_per_second"]]
    lines = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "time/data_wait_ms" in line]
    assert [int(row["step"]) for row in rows] == [line["step"] for line in lines] == [3, 7, 11]
    assert float(rows[-1]["throughput/mfu"]) == lines[-1]["throughput/mfu"] == latest["throughput/mfu"]
    # Both kinds were counted in the first window, so that its speed would not be that of the training.
    assert "throughput/mfu" not in lines[0]

    # A resumed run knows them: it would count at other steps.
    resumed = Throughput(every_n_batches=4)
    resumed.load_state_dict(torch.load(_saved(trainer, tmp_path), weights_only=True))
    assert resumed.state_dict()["operations"] == known


def test_a_slow_rank_is_named_in_every_log(tiny: Path, tmp_path: Path) -> None:
    """Rank 1 computes longer: rank 0 waits for it in the collectives."""
    ended = in_ranks(train_with_a_slow_rank, (tiny, tmp_path), tmp_path)
    assert [rank.code for rank in ended] == [0, 0], [rank.said[-3000:] for rank in ended]
    text = (tmp_path / "logs" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines() if "ranks/slowest_host" in line]
    for strategy in ("ddp", "fsdp2"):
        last = json.loads((tmp_path / f"{strategy}.json").read_text())
        assert last["ranks/slowest"] == 1, strategy
        assert last["ranks/waiting_ms"] > 300 * SLOW_SECONDS, strategy  # a busy machine slows both
        assert last["time/student_iteration_ms"] > 1000 * SLOW_SECONDS, strategy
        assert last["throughput/tflops_per_device"] > 0
        assert last["ranks/fullest"] in (0, 1)
    assert lines[-1]["ranks/slowest_host"] == json.loads((tmp_path / "host.json").read_text())
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        hosts = [row["ranks/slowest_host"] for row in csv.DictReader(file) if row["ranks/slowest_host"]]
    assert hosts == [line["ranks/slowest_host"] for line in lines]


@pytest.mark.gpu
def test_marks_do_not_wait_for_a_gpu() -> None:
    device = torch.device("cuda")
    watch, matrix = Stopwatch(device), torch.ones(2048, 2048, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        start = watch.mark()
        for _ in range(20):
            matrix = matrix @ matrix
        watch.add("product", start, watch.mark())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.read()["product"].seconds > 0


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every_n_batches must be 1 or more, got 0"):
        Throughput(0)
    with pytest.raises(ValueError, match=r"peak_tflops must be positive, got -1"):
        Throughput(peak_tflops=-1)


def test_timing_shards_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.cluster_utils", None)
    with pytest.raises(UserError, match="uv sync --extra ray"):
        time_shards(ShardsOptions(shards=2, images=1, repeats=1))
