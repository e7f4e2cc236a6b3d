"""Section `toy`: the quickstart for as long as the time allows, on large batches; student and curve stay beside the result."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from evaluation.benchmarks.gpu.section import SectionRun
from sdxs_lightning.train_command import main

ROOT = Path(__file__).resolve().parents[3]
UPDATES, BATCH_SIZE = 10_000, 256
SECONDS_PER_ITERATION = 0.02
"""About 4,000 launches: the host's time, not the GPU's."""
MARGIN_SECONDS = 45.0
"""Start, pairs, and the measurements at the end."""
SHORTEST_SECONDS = 100.0
"""Of a variant."""
_DMD2 = "configs/common/toy_dmd2.yaml"
VARIANTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "quickstart": (1, ()),
    "DMD2": (5, (_DMD2,)),
    "half the work": (5, (_DMD2, "configs/methods/half_the_work.yaml")),
    "segmented": (1, (_DMD2, "configs/toy/distill_segmented.yaml")),
}
"""Iterations per student update, and overlays of the quickstart, by value: as many variants as the time allows."""
LARGEST_BYTES = 16 * 2**20
"""Of all files that stay."""


def run(run: SectionRun) -> None:
    """Each variant gets an equal share of the time; its learning rates follow the number of updates that fits."""
    waiting = [name for name in VARIANTS if run.measured(variant=name, batch_size=_batch_size(run)) is None]
    if run.tiny:
        waiting = waiting[:1]
    for index, name in enumerate(waiting):
        count = max(1, min(len(waiting) - index, int(run.expected_left / SHORTEST_SECONDS)))
        if index and run.expected_left < SHORTEST_SECONDS:
            run.add(
                {"variant": name, "batch_size": _batch_size(run)}, error="no time left; give more --minutes"
            )
            continue
        seconds = run.expected_left / count
        run.attempt(partial(_train, run, name, seconds), variant=name, batch_size=_batch_size(run))


def _batch_size(run: SectionRun) -> int:
    return 4 if run.tiny else BATCH_SIZE


def _train(run: SectionRun, variant: str, seconds: float) -> dict[str, Any]:
    training = max(10.0, seconds - MARGIN_SECONDS)
    fitting = int(training / (VARIANTS[variant][0] * SECONDS_PER_ITERATION))
    updates = 2 if run.tiny else max(100, min(UPDATES, fitting))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        os.chdir(ROOT)  # the configurations name the toy base relative to it
        with redirect_stderr(StringIO()) as said:
            code = main(_arguments(run, variant, Path(folder), out, updates, training))
        if code:
            raise RuntimeError(f"train.py ended with {code}: {said.getvalue().strip()[-600:]}")
        row: dict[str, Any] = {"planned_updates": updates}
        report = out / "report.json"
        if report.is_file():
            found = json.loads(report.read_text())
            row |= {name: found["student"][name] for name in ("fid", "clip_score", "caption_accuracy")}
            row |= {name: found[name] for name in ("student_updates", "seconds")}
        return row | {"files": _keep(out, run.files, variant.replace(" ", "_"))}


def _arguments(
    run: SectionRun, variant: str, folder: Path, out: Path, updates: int, seconds: float
) -> list[str]:
    warmup = max(1, updates // 10)
    callbacks: list[dict[str, Any]] = [{"class_path": "sdxs_lightning.callbacks.export.Export"}]
    if not run.tiny:  # measuring takes longer than two updates
        measured = {
            "class_path": "evaluation.callbacks.sample_grids.DistillationMetrics",
            "init_args": {"every_n_student_updates": max(1, updates // 12)},
        }
        callbacks = [measured, {"class_path": "evaluation.callbacks.run_report.Report"}, *callbacks]
    (folder / "callbacks.yaml").write_text(json.dumps({"trainer": {"callbacks": callbacks}}))
    flags: dict[str, Any] = {
        "trainer.default_root_dir": out,
        "trainer.accelerator": "cuda" if run.device.type == "cuda" else "cpu",
        "trainer.max_time": _clock(seconds),
        "data.init_args.batch_size": _batch_size(run),
        "model.init_args.update_schedule.max_student_updates": updates,
        "model.init_args.update_schedule.warmup_updates": warmup,
        "model.init_args.update_schedule.fake_score_only_iterations": min(80, warmup),
    }
    if run.tiny:
        flags |= {"data.init_args.train_images": 64, "model.init_args.pairs.count": 4}
    configs = ["configs/quickstart.yaml", *VARIANTS[variant][1], str(folder / "callbacks.yaml")]
    arguments = [argument for config in configs for argument in ("--config", config)]
    return arguments + [f"--{name}={value}" for name, value in flags.items()]


def _keep(out: Path, files: Path, name: str) -> str:
    """Student and curve, a few small files in one folder: more would not come back from some machines."""
    files.mkdir(parents=True, exist_ok=True)
    kept = []
    for source, target in {
        "pipeline": f"toy_{name}_student.tar.gz",
        "scores.jsonl": f"toy_{name}_curve.jsonl",
        "progress.png": f"toy_{name}_progress.png",
        "samples.png": f"toy_{name}_samples.png",
    }.items():
        if not (out / source).exists():
            continue
        if source == "pipeline":
            with tarfile.open(files / target, "w:gz") as archive:
                archive.add(out / source, arcname=f"toy_{name}_student")
        else:
            shutil.copyfile(out / source, files / target)
        kept.append(target)
    size = sum(os.path.getsize(files / target) for target in kept)
    if size > LARGEST_BYTES:
        raise RuntimeError(f"the files in '{files}' have {size} bytes, more than {LARGEST_BYTES}")
    return ", ".join(kept)


def _clock(seconds: float) -> str:
    """As Trainer.max_time reads it: DD:HH:MM:SS."""
    minutes, left = divmod(int(seconds), 60)
    return f"00:{minutes // 60:02d}:{minutes % 60:02d}:{left:02d}"
