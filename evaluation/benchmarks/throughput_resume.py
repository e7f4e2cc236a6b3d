"""SIGKILL at random steps: compares the data and random draws of a resumed run with the uninterrupted run.

Each trial trains with Lightning in a process of its own, kills it at a random step, resumes from its newest checkpoint with
another number of workers, and compares every step that follows: sample ids, positions, captions, crops, mirroring (through
the pixels), caption dropout, noise, timesteps.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image

from data.shards.datamodule import ShardDataModule
from data.shards.writer import ShardWriter, encode_latents
from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.seeding import Stream, integers, normal, uniform

if TYPE_CHECKING:
    from evaluation.benchmarks.throughput import ResumeOptions

_SAMPLES, _BATCH, _EPOCHS = 90, 8, 3  # eleven batches per epoch, two samples left over
_STEPS = _EPOCHS * (_SAMPLES // _BATCH)
_SEED = 3


def run(options: ResumeOptions) -> dict[str, Any]:
    """Run all trials; `failed` is a message if one of them differed."""
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_samples(root / "shards")
        expected = _uninterrupted(root)
        trials = [_trial(root, number, chance, options.workers, expected) for number in range(options.kills)]
    right = sum(trial["equal"] for trial in trials)
    return {
        "kills": len(trials),
        "equal": right,
        "steps_of_a_run": _STEPS,
        "steps_compared": sum(trial["steps_compared"] for trial in trials),
        "compared": list(expected[0]),
        "failed": ""
        if right == len(trials)
        else f"{len(trials) - right} of {len(trials)} resumed runs differ.",
        "trials": trials,
    }


class Recorder(pl.LightningModule):
    """Trains one parameter and writes a line after each completed step."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.log_file = log

    def training_step(self, batch: TrainingBatch, batch_index: int) -> None:
        optimizer: Any = self.optimizers()
        assert batch.latents is not None
        self.manual_backward((self.weight * batch.latents.mean()).sum())
        optimizer.step()
        optimizer.zero_grad()
        with open(self.log_file, "a") as file:
            file.write(json.dumps({"step": self.global_step} | describe(batch)) + "\n")
        time.sleep(0.002)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class AtomicCheckpoint(pl.Callback):
    """Saves a checkpoint after every other step, atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % 2 == 0:
            path = self.folder / f"{trainer.global_step:04d}.ckpt"
            trainer.save_checkpoint(path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)


def describe(batch: TrainingBatch) -> dict[str, Any]:
    """Data that a step received, and its random draws."""
    assert batch.images is not None and batch.crops is not None
    positions = batch.positions
    return {
        "positions": positions.tolist(),
        "sample_ids": batch.sample_ids,
        "captions": batch.captions,
        "crops": batch.crops.tolist(),
        "pixels": _digest(batch.images),
        "caption_dropout": (uniform(_SEED, Stream.DROPOUT, positions) < 0.2).tolist(),
        "noise": _digest(normal(_SEED, Stream.STUDENT_NOISE, positions, (4, 4, 4))),
        "timesteps": integers(_SEED, Stream.SCORE_TIMESTEP, positions, 0, 1000).tolist(),
    }


def _digest(values: torch.Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(values.numpy()).tobytes()).hexdigest()[:16]


def write_samples(folder: Path) -> None:
    """Write images of many shapes with several captions and latents, in shards of unequal sizes."""
    numbers = np.random.default_rng(0)
    for shard, count in enumerate((23, 7, 31, 11, 18)):
        with ShardWriter(folder, prefix=f"{shard}-") as writer:
            for number in range(count):
                shape = (*numbers.integers(40, 80, size=2).tolist(), 3)
                stream = io.BytesIO()
                Image.fromarray(numbers.integers(0, 256, shape, dtype=np.uint8)).save(stream, "JPEG")
                fields = {"caption": f"{shard} {number}", "others": [f"{shard} {number} {k}" for k in "abc"]}
                latents = encode_latents(torch.full((4, 4, 4), float(number)))
                writer.write({"jpg": stream.getvalue(), "json": fields, "latent.safetensors": latents})


def train(shards: Path, folder: Path, log: Path, workers: int, checkpoint: Path | None) -> None:
    """Run one training to its end, unless it is killed."""
    torch.set_num_threads(1)
    data = ShardDataModule(
        str(shards),
        _BATCH,
        contents=["images", "latents"],
        num_workers=workers,
        seed=_SEED,
        shuffle_window_shards=2,
        resolution=32,
        crop="random",
        flip=True,
        caption_fields=["caption", "others"],
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=_EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AtomicCheckpoint(folder)],
    )
    trainer.fit(Recorder(log), data, ckpt_path=checkpoint, weights_only=False)


def _start(*arguments: Any) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=arguments)
    process.start()
    return process


def _quietly(*arguments: Any) -> None:
    os.setsid()  # so that its workers can be killed too
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    train(*arguments)


def _lines(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    complete = log.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def _uninterrupted(root: Path) -> list[dict[str, Any]]:
    folder, log = root / "uninterrupted", root / "uninterrupted.jsonl"
    folder.mkdir()
    process = _start(root / "shards", folder, log, 0, None)
    process.join()
    lines = _lines(log)
    if process.exitcode != 0 or len(lines) != _STEPS:
        raise ValueError(
            f"the uninterrupted run ended with code {process.exitcode} after {len(lines)} steps."
        )
    return lines


def _trial(
    root: Path, number: int, chance: random.Random, workers: Sequence[int], expected: list[dict[str, Any]]
) -> dict[str, Any]:
    folder, log, resumed = root / str(number), root / f"{number}.jsonl", root / f"{number}-resumed.jsonl"
    folder.mkdir()
    before, after = chance.choice(workers), chance.choice(workers)
    kill_after, delay = chance.randrange(3, _STEPS - 2), chance.uniform(0, 0.01)
    process = _start(root / "shards", folder, log, before, None)
    while process.is_alive() and len(_lines(log)) < kill_after:
        time.sleep(0.002)
    time.sleep(delay)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _kill_group(process.pid)
    checkpoints = sorted(folder.glob("*.ckpt"))
    process = _start(root / "shards", folder, resumed, after, checkpoints[-1] if checkpoints else None)
    process.join()
    assert process.pid is not None
    _kill_group(process.pid)
    first = int(checkpoints[-1].stem) if checkpoints else 0
    seen, got = _lines(log), _lines(resumed)
    return {
        "killed_after_step": len(seen),
        "resumed_from_step": first,
        "workers": [before, after],
        "steps_compared": len(got),
        "equal": process.exitcode == 0 and seen == expected[: len(seen)] and got == expected[first:],
    }


def _kill_group(group: int) -> None:
    """End the workers that a killed training left behind."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
