"""The report of a distillation: report.json, samples.png and progress.png, written at the end of training."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from evaluation.callbacks.independence import require_independent
from evaluation.callbacks.progress import Throughput, peak_memory_gib
from evaluation.callbacks.sample_grids import DistillationMetrics
from evaluation.callbacks.student_updates import (
    averaged_student,
    callback_of,
    check_counts,
    paused,
    student_updates_of,
)
from evaluation.images.generate import ImageMaker, RealImages
from evaluation.protocols.protocols import Protocol, get_protocol
from evaluation.reports.grids import progress_curves, sheet
from evaluation.reports.markdown import score_file_markdown
from evaluation.reports.result_file import write_result
from evaluation.runner.machine import milliseconds_per_image, where
from evaluation.runner.scores import ProtocolNetworks, score_images
from evaluation.runner.teacher_scores import (
    GUIDANCE_SCALE,
    RESULTS,
    STEPS,
    Entry,
    Teacher,
    add_timings,
    look_up,
    measure_missing,
    store,
    stored_entry,
)
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.stages.distillation.step import OneStepDistillation

OWN_RESULTS = "teacher.json"
"""File in the run's folder for teacher scores that were measured by the run."""


class Report(pl.Callback):
    """Measures the averaged student before and after training, and its teacher, on held-out prompts.

    Teacher scores are looked up in `teacher_results` (and in `teacher.json` of the run's folder) by protocol and weights;
    missing ones are measured, which takes minutes. Latencies are always measured.

    Args:
        folder: destination; None means the trainer's default_root_dir.
        protocol: a toy protocol.
        samples: number of images, None for the protocol's; FID depends on it, and stored teacher scores will not match.
        teacher_steps: steps of the teacher's rows; samples.png shows the most and the fewest.
        teacher_guidance_scale: guidance of the teacher.
        teacher_spacing: spacing of the teacher's timesteps.
        teacher_results: JSON file of `python -m evaluation.benchmarks.tables teacher`; None means the committed one.
        columns: images per row of samples.png.
        batch_size: images per call on each device.
        clip: open_clip folder, None for the protocol's.
        classifier: attribute classifier's folder, None for the protocol's.
        reference: npz of the reference's statistics, None for the protocol's.
    """

    def __init__(
        self,
        folder: str | None = None,
        protocol: str = "toy",
        samples: int | None = None,
        teacher_steps: Sequence[int] = STEPS,
        teacher_guidance_scale: float = GUIDANCE_SCALE,
        teacher_spacing: Spacing = "trailing",
        teacher_results: str | None = None,
        columns: int = 10,
        batch_size: int = 100,
        clip: str | None = None,
        classifier: str | None = None,
        reference: str | None = None,
    ) -> None:
        check_counts(type(self).__name__, samples=samples, columns=columns, batch_size=batch_size)
        changes = {"samples": samples, "clip": clip, "classifier": classifier, "reference": reference}
        self.protocol = get_protocol(protocol, **changes)
        self.folder, self.batch_size = folder, batch_size
        self.teacher_steps = sorted(teacher_steps, reverse=True)
        self.teacher_guidance_scale, self.teacher_spacing = teacher_guidance_scale, teacher_spacing
        self.teacher_results = Path(teacher_results) if teacher_results is not None else RESULTS
        self.prompts = self.protocol.captions()
        self.sample_ids = torch.arange(min(columns, self.protocol.samples))
        self._before: dict[str, float] | None = None
        self._before_samples: Tensor | None = None
        self._networks: ProtocolNetworks | None = None
        self._to_store: dict[str, Entry] = {}
        self._start_seconds = 0.0
        self._earlier_seconds = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Loads the metric networks and reads the teacher's scores, so that what is missing is reported before training.

        Raises:
            ValueError: for a file of teacher's scores that is none.
        """
        stored_entry(self.teacher_results, self.protocol)
        self._start_seconds = time.perf_counter()
        self._networks = self._networks or ProtocolNetworks.load(self.protocol)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that no metric network is used in training."""
        assert isinstance(pl_module, OneStepDistillation) and self._networks is not None
        require_independent(
            [self._networks.clip, self._networks.classifier], pl_module.frozen_image_networks()
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the initial student; a resumed run has its scores in the checkpoint."""
        if self._before is None:
            with paused(trainer):
                self._before = self._student(trainer, pl_module)
                self._before_samples = self._samples(averaged_student(trainer, pl_module, self.protocol.seed))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the student and missing teacher scores; writes the three files."""
        assert isinstance(pl_module, OneStepDistillation)
        with paused(trainer):
            student = self._student(trainer, pl_module)
            teacher = self._teacher(pl_module, self.protocol)
            entry = self._teacher_entry(trainer, teacher, self.protocol, self.teacher_steps, with_real=True)
            entry = add_timings(entry, teacher, self.prompts[0])
            rows = self._sample_rows(trainer, pl_module, teacher)
            curve = callback_of(trainer, DistillationMetrics)
            line = None if curve is None else self._teacher_line(trainer, pl_module, curve, entry)
        if not trainer.is_global_zero:
            return
        folder = self._folder(trainer)
        # Not earlier: a rank that finds scores stored by another would skip collective measurements and block the others.
        for name, measured in self._to_store.items():
            store(folder / OWN_RESULTS, name, measured)
        report = self._compose(trainer, pl_module, student, entry, curve)
        write_result(folder / "report.json", report)
        sheet(rows, [self.prompts[index] for index in self.sample_ids.tolist()]).save(folder / "samples.png")
        label = f"teacher, {self.teacher_steps[0]} steps"
        warmup_updates = pl_module.update_schedule.warmup_updates
        progress_curves(report["history"], line, label, folder / "progress.png", warmup_updates)
        sys.stdout.write(f"Protocol {self.protocol.name}:\n\n{score_file_markdown(report)}\n")
        rank_zero_info(
            f"Report: {folder / 'report.json'}, {folder / 'samples.png'}, {folder / 'progress.png'}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Scores of the initial student."""
        samples = None if self._before_samples is None else self._before_samples.cpu()
        return {"before": self._before, "before_pictures": samples, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._before_samples = state_dict["before"], state_dict["before_pictures"]
        self._earlier_seconds = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._start_seconds

    def _folder(self, trainer: pl.Trainer) -> Path:
        folder = Path(self.folder if self.folder is not None else trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _student(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """Report row of the current averaged student."""
        maker = averaged_student(trainer, module, self.protocol.seed)
        scores = self._measure(trainer, self.protocol, self._networks, maker, self.prompts, module.device)
        assert isinstance(module, OneStepDistillation)
        steps = len(module.student.timesteps)
        return {"nfe": steps, **scores, "ms_per_image": milliseconds_per_image(maker, self.prompts[0])}

    def _measure(
        self,
        trainer: pl.Trainer,
        protocol: Protocol,
        networks: ProtocolNetworks | None,
        maker: ImageMaker,
        prompts: Sequence[str],
        device: torch.device,
    ) -> dict[str, float]:
        networks = networks or ProtocolNetworks.load(protocol)
        ranks = trainer.global_rank, trainer.world_size
        return score_images(maker, prompts, networks, device, self.batch_size, *ranks).as_dict()

    def _teacher(self, module: OneStepDistillation, protocol: Protocol) -> Teacher:
        settings = self.teacher_guidance_scale, self.teacher_spacing, protocol.seed
        return Teacher(module.family, module.device, *settings)

    def _teacher_entry(
        self, trainer: pl.Trainer, teacher: Teacher, protocol: Protocol, steps: Sequence[int], with_real: bool
    ) -> Entry:
        """Stored teacher scores, completed by measurements."""
        networks: ProtocolNetworks | None = self._networks if protocol == self.protocol else None
        measured: list[str] = []

        def measure_images(what: str, maker: ImageMaker, prompts: Sequence[str]) -> dict[str, float]:
            rank_zero_info(
                f"Measuring {what}: no stored figures for this base under protocol {protocol.name!r}."
            )
            measured.append(what)
            return self._measure(trainer, protocol, networks, maker, prompts, teacher.device)

        known = look_up([self.teacher_results, self._folder(trainer) / OWN_RESULTS], protocol, teacher)
        entry = measure_missing(known, protocol, teacher, steps, measure_images, with_real)
        if measured:
            self._to_store[protocol.name] = entry
        return {**entry, "teacher": {str(count): entry["teacher"][str(count)] for count in steps}}

    def _teacher_line(
        self, trainer: pl.Trainer, module: OneStepDistillation, curve: DistillationMetrics, entry: Entry
    ) -> dict[str, float]:
        """Scores of the many-step teacher under the curve's protocol, so that they are comparable."""
        steps = self.teacher_steps[:1]
        if curve.protocol != self.protocol:
            teacher = self._teacher(module, curve.protocol)
            entry = self._teacher_entry(trainer, teacher, curve.protocol, steps, with_real=False)
        line: dict[str, float] = entry["teacher"][str(steps[0])]
        return line

    def _samples(self, maker: ImageMaker) -> Tensor:
        captions = [self.prompts[index] for index in self.sample_ids.tolist()]
        return maker(captions, self.sample_ids).cpu()

    def _sample_rows(
        self, trainer: pl.Trainer, module: OneStepDistillation, teacher: Teacher
    ) -> dict[str, Tensor]:
        """Same prompts and noise in each row."""
        many, few = self.teacher_steps[0], self.teacher_steps[-1]
        assert self._before_samples is not None
        return {
            "real": self._samples(RealImages(self.protocol.split)),
            f"teacher\n{many} steps": self._samples(teacher.images(many)),
            f"teacher\n{few} step{'s' * (few > 1)}": self._samples(teacher.images(few)),
            "student\nbefore": self._before_samples,
            "student\n1 step": self._samples(averaged_student(trainer, module, self.protocol.seed)),
        }

    def _compose(
        self,
        trainer: pl.Trainer,
        module: OneStepDistillation,
        student: dict[str, float],
        entry: Entry,
        curve: DistillationMetrics | None,
    ) -> dict[str, Any]:
        """Content of report.json: documented keys first, then further details."""
        throughput = callback_of(trainer, Throughput)
        latest = {} if throughput is None else throughput.latest
        many = entry["teacher"][str(self.teacher_steps[0])]
        return {
            "seconds": self._seconds(),
            "student_updates": student_updates_of(module),
            "student": student,
            "student_before": self._before,
            "teacher": entry["teacher"],
            "real_vs_real": entry["real_vs_real"],
            "protocol": self.protocol.describe(),
            **where(module.device),
            "vae_floor": entry["vae_floor"],
            "fid_ratio": student["fid"] / many["fid"],
            "caption_accuracy_ratio": student["caption_accuracy"] / max(many["caption_accuracy"], 1e-9),
            "speedup": many["ms_per_image"] / student["ms_per_image"],
            "latency_batch_size": entry["latency_batch_size"],
            "teacher_guidance_scale": self.teacher_guidance_scale,
            "teacher_spacing": self.teacher_spacing,
            "base_sha256": entry["base_sha256"],
            "seed": module.seed,
            "peak_memory_gib": peak_memory_gib(module.device),
            "throughput": {
                key.removeprefix("throughput/"): value
                for key, value in latest.items()
                if key.startswith("throughput/")
            },
            "curve_protocol": None if curve is None else curve.protocol.describe(),
            "history": [] if curve is None else curve.history,
        }
