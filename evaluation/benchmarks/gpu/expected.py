"""What an H100 of 80 GB is expected to need, counted without a GPU: `python -m evaluation.benchmarks.gpu.expected --out FILE`.

Arithmetic and memory are counted on the meta device at full size. Launches, host synchronisations and the host's time are
those of U-Nets of SD-1.5's depth and a tenth of its width, whose arithmetic is next to nothing: what remains does not depend on
sizes.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from evaluation.reports.result_file import write_result
from sdxs_lightning.command_line import run_command

if TYPE_CHECKING:
    from evaluation.benchmarks.gpu.distillation import Arrangement, MeasuredDistillation
    from evaluation.benchmarks.gpu.random_base import Kind

PROGRAM = "python -m evaluation.benchmarks.gpu.expected"
FILE = Path(__file__).resolve().parents[2] / "results" / "gpu_expected.json"
H100_TFLOPS = 989.0
"""Dense bfloat16, by NVIDIA's data sheet of the H100 SXM."""
USE = 0.45
"""Share of it that an iteration reaches: the goal, so that the host's share is not flattered."""
COUNTED = {"sd15": (4, 8, 16), "sdxl": (1,)}
"""Batch sizes of the sections `distill` and `distill_sdxl`."""
NARROW = {"block_out_channels": [32, 64, 128, 128], "sample_size": 8, "cross_attention_dim": 32}
NARROW_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}


@dataclass(frozen=True, kw_only=True)
class ExpectedOptions:
    """Counts arithmetic, memory, kernel launches and host time of the benchmark's iterations; takes minutes, and no GPU."""

    EXAMPLES: ClassVar[str] = f"{PROGRAM} --out evaluation/results/gpu_expected.json"

    out: Path
    """JSON file to write."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(PROGRAM, ExpectedOptions, run, arguments)


def run(options: ExpectedOptions) -> str:
    """Counts, writes the file, and returns the host's share of an iteration."""
    from evaluation.benchmarks.gpu.distillation import Arrangement

    plain = {"sd15": Arrangement(16), "sdxl": Arrangement(1, gradient_checkpointing=True)}
    kinds: tuple[Kind, ...] = ("sd15", "sdxl")
    rows = [counted(kind, replace(plain[kind], lora=lora)) for kind in kinds for lora in (False, True)]
    rows.append(counted("sd15", replace(plain["sd15"], gradient_checkpointing=True)))
    found: dict[str, Any] = {"training": rows, "host": host()}
    found["host_share"] = shares(rows[0], found["host"])
    write_result(options.out, found)
    return _table(found)


def shares(row: dict[str, Any], host: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds of a student update's iterations of SD-1.5 on an H100, and the host's and Python's seconds relative to them.

    The host works ahead of the device: only where its share is above 1 does the device wait for it.
    """
    from evaluation.benchmarks.gpu.distillation import RATIO

    others = RATIO["sd15"] - 1
    found = {}
    for size in COUNTED["sd15"]:
        work = size * (row["student_tflop_per_sample"] + others * row["other_tflop_per_sample"])
        device = work / (H100_TFLOPS * USE)
        ours = {
            name: host["student"][name] + others * host["other"][name]
            for name in ("host_seconds", "python_seconds")
        }
        found[str(size)] = {
            "device_seconds": device,
            "host": ours["host_seconds"] / device,
            "python": ours["python_seconds"] / device,
        }
    return found


def _table(found: dict[str, Any]) -> str:
    from evaluation.reports.markdown import markdown_table

    names = ("device_seconds", "host", "python")
    rows = [[size, *(f"{row[name]:.2f}" for name in names)] for size, row in found["host_share"].items()]
    return markdown_table(["batch", "seconds on an H100", "host's time / these", "of it in Python"], rows)


@lru_cache
def _file() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def of_arrangement(kind: Kind, arrangement: Arrangement) -> dict[str, Any] | None:
    """The counted row of an arrangement, at any batch size; None if it was not counted."""
    known = {
        "base": kind,
        "lora": arrangement.lora,
        "gradient_checkpointing": arrangement.gradient_checkpointing,
    }
    return next((row for row in _file()["training"] if known.items() <= row.items()), None)


def counted(kind: Kind, arrangement: Arrangement) -> dict[str, Any]:
    """TFLOP per sample and GiB of an arrangement, on the meta device."""
    import torch

    from evaluation.benchmarks.gpu.distillation import counted_flops, stage_of
    from evaluation.benchmarks.gpu.random_base import RandomBase, config_folder
    from evaluation.benchmarks.gpu.standalone import clipping_on_meta
    from sdxs_lightning.families import Family
    from sdxs_lightning.families.detect import detect_family
    from sdxs_lightning.memory_plan.hardware import read_hardware
    from sdxs_lightning.memory_plan.planner import Planner

    meta, batch = torch.device("meta"), 2
    row: dict[str, Any] = {
        "base": kind,
        "lora": arrangement.lora,
        "gradient_checkpointing": arrangement.gradient_checkpointing,
    }
    with tempfile.TemporaryDirectory() as folder:
        base = config_folder(kind, Path(folder), tiny=False)
        hardware = read_hardware({"devices": 1, "accelerator": "gpu", "precision": "bf16-mixed"}, None)
        plan = Planner(stage_of(kind, detect_family(str(base)), arrangement), hardware, 1).plan()
        row["planned_gib"] = {
            str(size): (plan.needed(size) - hardware.allowance) / 2**30 for size in COUNTED[kind]
        }
        # Recomputed activations are no work of the model.
        once = replace(arrangement, gradient_checkpointing=False, fused=False)
        family = RandomBase(detect_family(str(base)), meta)
        stage = stage_of(kind, cast(Family, family), once)
        stage.prepare(meta, channels_last=False)
        for student in (True, False):
            name = "student_tflop_per_sample" if student else "other_tflop_per_sample"
            with clipping_on_meta():
                row[name] = counted_flops(partial(stage.iterate, family.batch(batch), student)) / batch / 1e12
    return row


def host() -> dict[str, Any]:
    """Launches, host synchronisations and the host's seconds of an SD-1.5 iteration, and their shares on an H100."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: _host_of(Path(folder), student) for name, student in (("student", True), ("other", False))
        }


def _host_of(folder: Path, student: bool) -> dict[str, Any]:
    import torch

    from evaluation.benchmarks.gpu.device_counter import DeviceCounter
    from evaluation.benchmarks.gpu.standalone import standalone
    from sdxs_lightning.memory_plan.as_on_cuda import AsOnCuda

    cpu, meta = torch.device("cpu"), torch.device("meta")
    stage, batch = _narrow_stage(folder, cpu, fused=True)
    with standalone(stage, cpu):
        seconds = min(_seconds_of_iteration(stage, batch, student) for _ in range(5))
        operations = _operation_seconds(stage, batch, student, seconds)
    stage, batch = _narrow_stage(folder, meta, fused=False)
    as_on_cuda = AsOnCuda(torch.bfloat16)
    with standalone(stage, meta), as_on_cuda, as_on_cuda.islands():
        _iterate(stage, batch, student)  # makes the optimizers' states
        as_on_cuda.forget_casts()
        with DeviceCounter() as counter:
            _iterate(stage, batch, student)
        as_on_cuda.forget_casts()
    return {
        "launches": counter.total,
        "most_launches": dict(counter.launches.most_common(8)),
        "host_synchronisations": len(counter.waits),
        "host_seconds": seconds,
        "python_seconds": max(seconds - operations, 0.0),
    }


def _narrow_stage(folder: Path, device: Any, fused: bool) -> tuple[MeasuredDistillation, Any]:
    """SD-1.5's depth at a tenth of its width."""
    from evaluation.benchmarks.gpu.distillation import Arrangement, stage_of
    from evaluation.benchmarks.gpu.random_base import RandomBase, config_folder
    from sdxs_lightning.families import Family
    from sdxs_lightning.families.detect import detect_family
    from sdxs_lightning.families.folders import read_json

    base = config_folder("sd15", folder, tiny=False)
    for name, changes in (("unet", NARROW), ("text_encoder", NARROW_TEXT)):
        file = base / name / "config.json"
        file.write_text(json.dumps(read_json(file) | changes))
    family = RandomBase(detect_family(str(base)), device)
    foreach = None if fused else True
    return stage_of("sd15", cast(Family, family), Arrangement(2, fused=fused), foreach), family.batch(2)


def _iterate(stage: Any, batch: Any, student: bool) -> None:
    """An iteration of the kind that is asked for."""
    ratio = stage.update_schedule.fake_score_updates_per_student_update
    stage.iterations = next(
        i for i in range(2 * ratio) if stage.update_schedule.updates_at(i).student == student
    )
    stage.training_step(batch, 0)


def _seconds_of_iteration(stage: Any, batch: Any, student: bool) -> float:
    begun = time.process_time()
    _iterate(stage, batch, student)
    return time.process_time() - begun


def _operation_seconds(stage: Any, batch: Any, student: bool, seconds: float) -> float:
    """Seconds inside torch's operations, their dispatch included, without what profiling adds to `seconds`."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        profiled = _seconds_of_iteration(stage, batch, student)
    inside: float = sum(event.self_cpu_time_total for event in profiler.key_averages()) / 1e6
    return inside - max(profiled - seconds, 0.0)


if __name__ == "__main__":
    main()
