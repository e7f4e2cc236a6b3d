"""Sections `distill` and `distill_sdxl`: iterations of the DMD2 stage at full size, and DMD2's own arrangement of the work."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evaluation.benchmarks.gpu.expected import of_arrangement
from evaluation.benchmarks.gpu.random_base import Kind, RandomBase
from evaluation.benchmarks.gpu.reference_arrangement import ReferenceArrangement
from evaluation.benchmarks.gpu.section import SectionRun, bf16_peak, seconds_of
from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.families import Family
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from sdxs_lightning.training.gradients import clip_gradients

RATIO: dict[Kind, int] = {"sd15": 10, "sdxl": 5}
"""Fake score updates per student update, DMD2's."""
GUIDANCE: dict[Kind, float] = {"sd15": 1.75, "sdxl": 8.0}


@dataclass(frozen=True)
class Arrangement:
    """Execution options; the mathematics is the same."""

    batch_size: int
    compile_blocks: bool = False
    channels_last: bool = True
    gradient_checkpointing: bool = False
    fused: bool = True
    lora: bool = False
    gan: bool = True


class MeasuredDistillation(OneStepDistillation):
    """The stage without a Trainer, its parts between CUDA events."""

    def prepare(self, device: torch.device, channels_last: bool) -> None:
        """Builds everything on the device, with an optimizer per network."""
        self.configure_model()
        self.to(device)
        # The meta device, on which the arithmetic is counted, has no autocast.
        self.autocast_device = "cuda" if device.type == "cuda" else "cpu"
        if channels_last:
            for network in (self.student, self.fake_score):
                cast(nn.Module, network).to(memory_format=torch.channels_last)
        self.on_fit_start()
        self.steppers = {
            name: cast(dict[str, Any], network.configure_optimizers())["optimizer"]
            for name, network in self.networks.items()
        }
        self.events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward without a Trainer."""
        loss.backward()

    def iterate(self, batch: TrainingBatch, student: bool) -> None:
        """One iteration, with or without a student update."""
        terms = self.terms.distillation if student else {}
        with self.part("data, copy to the device"):
            batch = batch.to(self.device)
        with torch.autocast(self.autocast_device, torch.bfloat16, enabled=self.autocast_device == "cuda"):
            with self.part("student, forward" if student else "student, forward without graph"):
                sample = self._sample(batch, terms)
            if student:
                with self.part("scores, terms and student, backward"):
                    self._student_backward(sample, terms)
            with self.part("fake score and discriminator, forward and backward"):
                self._fake_score_and_discriminator_backward(sample.detach(), batch)
        with self.part("clipping and optimizers, with student" if student else "clipping and optimizers"):
            for name, optimizer in self.steppers.items():
                if student or name != "student":
                    clip_gradients(self.networks[name].parameters(), self.gradient_clip_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            if student and self.ema is not None:
                self.ema.update(self.student)
        self._scalars.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Records a part's time on a GPU."""
        if self.device.type != "cuda":
            yield
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self.events.setdefault(name, []).append((begin, end))

    def part_milliseconds(self) -> dict[str, float]:
        """Mean of each part since the last call."""
        if self.events:
            torch.cuda.synchronize()
        found = {
            name: sum(begin.elapsed_time(end) for begin, end in pairs) / len(pairs)
            for name, pairs in self.events.items()
        }
        self.events.clear()
        return found


def stage_of(
    kind: Kind, family: Family, arrangement: Arrangement, foreach: bool | None = None
) -> MeasuredDistillation:
    """DMD2's recipe with GAN on a full student.

    Args:
        kind: of the base.
        family: the base.
        arrangement: execution options.
        foreach: of AdamW; torch does not choose it on the meta device by itself.
    """
    adamw = partial(torch.optim.AdamW, lr=1e-6, fused=arrangement.fused, foreach=foreach)
    switches = {
        "compile_blocks": arrangement.compile_blocks,
        "gradient_checkpointing": arrangement.gradient_checkpointing,
    }
    return MeasuredDistillation(
        family=family,
        student=StudentGenerator(adamw, **switches),  # type: ignore[arg-type]
        fake_score=FakeScore(adamw, lora=LoRA(rank=64) if arrangement.lora else None, **switches),  # type: ignore[arg-type]
        update_schedule=UpdateSchedule(
            max_student_updates=10**6, fake_score_updates_per_student_update=RATIO[kind]
        ),
        distribution_matching=DistributionMatching(guidance_scale=GUIDANCE[kind]),
        discriminator=Discriminator(adamw) if arrangement.gan else None,
        adversarial=DiffusionAdversarial() if arrangement.gan else None,
        real_score_dtype="bfloat16",
    )


def run_sd15(run: SectionRun) -> None:
    """SD-1.5 at 512 px: batch sizes, DMD2's arrangement, and switches one by one; compilation, which takes minutes, last."""
    sizes = (2,) if run.tiny else (4, 8, 16)
    plain = [Arrangement(size) for size in sizes]
    best = plain[-1]
    variants = [
        replace(best, lora=True),
        replace(best, gradient_checkpointing=True),
        replace(best, channels_last=False),
        replace(best, fused=False),
        replace(best, gan=False),
        replace(plain[0], compile_blocks=True),
    ]
    with tempfile.TemporaryDirectory() as folder:
        peak = bf16_peak(run)
        _measure(run, "sd15", plain[:1], Path(folder), peak)
        _measure_reference(run, "sd15", sizes[0], Path(folder))
        _measure(run, "sd15", [] if run.tiny else [*plain[1:], *variants], Path(folder), peak)


def run_sdxl(run: SectionRun) -> None:
    """SDXL at 1024 px: with adapters for the fake score, then in full."""
    # The tiny discriminator normalises a single value per channel, which takes two samples.
    arrangement = Arrangement(2 if run.tiny else 1, gradient_checkpointing=True)
    with tempfile.TemporaryDirectory() as folder:
        arrangements = [replace(arrangement, lora=True), *([] if run.tiny else [arrangement])]
        _measure(run, "sdxl", arrangements, Path(folder), bf16_peak(run))


def _measure(run: SectionRun, kind: Kind, arrangements: list[Arrangement], folder: Path, peak: float) -> None:
    for arrangement in arrangements:
        run.attempt(
            partial(_measured, run, kind, arrangement, folder, peak),
            arrangement="ours",
            base=kind,
            **asdict(arrangement),
        )


def _measured(
    run: SectionRun, kind: Kind, arrangement: Arrangement, folder: Path, peak: float
) -> dict[str, Any]:
    family = RandomBase.of(kind, folder, run.device, run.tiny)
    stage = stage_of(kind, cast(Family, family), arrangement)
    stage.prepare(run.device, arrangement.channels_last)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batch, (repeats, warmups) = family.host_batch(arrangement.batch_size), (1, 0) if run.tiny else (5, 2)
    seconds = {}
    for student in (True, False):
        seconds[student] = seconds_of(partial(stage.iterate, batch, student), run.device, repeats, warmups)
    total = _per_student_update(seconds, RATIO[kind])
    found = {
        "images_per_second": RATIO[kind] * arrangement.batch_size / total,
        "student_iteration_ms": 1000 * seconds[True],
        "other_iteration_ms": 1000 * seconds[False],
    }
    expected = of_arrangement(kind, arrangement)
    if run.tiny:
        flops = {student: counted_flops(partial(stage.iterate, batch, student)) for student in (True, False)}
    elif expected is not None and arrangement.gan:
        per_sample = {True: "student_tflop_per_sample", False: "other_tflop_per_sample"}
        flops = {
            student: 1e12 * arrangement.batch_size * expected[name] for student, name in per_sample.items()
        }
        if str(arrangement.batch_size) in expected["planned_gib"]:
            found["planned_gib"] = expected["planned_gib"][str(arrangement.batch_size)]
    else:
        flops = None
    if flops is not None:
        work = _per_student_update(flops, RATIO[kind])
        found |= {"tflop_per_student_update": work / 1e12, "mfu": work / total / (peak * 1e12)}
    if run.device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if "planned_gib" in found:
            found["peak_over_plan"] = found["peak_gib"] / found["planned_gib"]
    return found | {f"{name}, ms": value for name, value in stage.part_milliseconds().items()}


def counted_flops(iterate: Callable[[], object]) -> float:
    """FLOPs of a call, each product counted once."""
    with FlopCounterMode(display=False) as counter:
        iterate()
    return float(counter.get_total_flops())


def _measure_reference(run: SectionRun, kind: Kind, batch_size: int, folder: Path) -> None:
    def measure() -> dict[str, Any]:
        family = RandomBase.of(kind, folder, run.device, run.tiny)
        reference = ReferenceArrangement(family, GUIDANCE[kind], run.device)
        latents: Tensor = torch.randn(batch_size, *family.latent_shape(), device=run.device)
        repeats, warmups = (1, 0) if run.tiny else (3, 2)
        seconds = {
            student: seconds_of(partial(reference.iterate, latents, student), run.device, repeats, warmups)
            for student in (True, False)
        }
        images_per_second = RATIO[kind] * batch_size / _per_student_update(seconds, RATIO[kind])
        ours = run.measured(arrangement="ours", base=kind, **asdict(Arrangement(batch_size)))
        ratio = {"ours_is_faster_by": ours["images_per_second"] / images_per_second} if ours else {}
        return ratio | {
            "images_per_second": images_per_second,
            "student_iteration_ms": 1000 * seconds[True],
            "other_iteration_ms": 1000 * seconds[False],
        }

    run.attempt(measure, arrangement="DMD2's", base=kind, batch_size=batch_size)


def _per_student_update(per_iteration: dict[bool, float], ratio: int) -> float:
    return per_iteration[True] + (ratio - 1) * per_iteration[False]
