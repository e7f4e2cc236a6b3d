"""Section `toy`: the quickstart a hundred times longer, on large batches; student and curve stay beside the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from evaluation.benchmarks.gpu.section import SectionRun

UPDATES, BATCH_SIZE = 10_000, 256
MARGIN_SECONDS = 45.0
"""Time reserved for the measurements at the end."""


def run(run: SectionRun) -> None:
    """DMD2 with GAN from a regression warm-up; as many updates as the time allows, measured as the quickstart is."""
    updates, size = (2, 4) if run.tiny else (UPDATES, BATCH_SIZE)
    warmup = max(1, updates // 10)
    out = Path(os.environ.get("OUT", tempfile.mkdtemp())) / "toy_gpu"
    flags = {
        "trainer.default_root_dir": out,
        "trainer.accelerator": "cuda" if run.device.type == "cuda" else "cpu",
        "trainer.max_time": _clock(max(10.0, run.left - MARGIN_SECONDS)),
        "data.init_args.batch_size": size,
        "model.init_args.update_schedule.max_student_updates": updates,
        "model.init_args.update_schedule.warmup_updates": warmup,
        "model.init_args.update_schedule.fake_score_only_iterations": min(80, warmup),
    }
    if run.tiny:  # measuring takes longer than two updates
        flags |= {
            "trainer.callbacks": "null",
            "trainer.enable_checkpointing": "false",
            "data.init_args.train_images": 64,
            "model.init_args.pairs.count": 4,
        }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, "train.py", "--config", "configs/quickstart.yaml", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, object] = {"updates": updates, "batch_size": size, "exit_code": ended.returncode}
    if ended.returncode:
        row["error"] = ended.stderr[-500:]
    report = out / "report.json"
    if report.is_file():
        found = json.loads(report.read_text())
        row |= {name: found["student"][name] for name in ("fid", "clip_score", "caption_accuracy")}
        row["seconds"] = found["seconds"]
    run.add(**row)


def _clock(seconds: float) -> str:
    """As Trainer.max_time reads it: DD:HH:MM:SS."""
    minutes, left = divmod(int(seconds), 60)
    return f"00:{minutes // 60:02d}:{minutes % 60:02d}:{left:02d}"
