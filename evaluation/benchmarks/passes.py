"""Work of the distillation per student update, counted without weights: `python -m evaluation.benchmarks.passes`.

The unit is one forward pass of the base's U-Net for one sample. Every matrix product and convolution of a real iteration of the
stage is counted by torch's FLOP counter, on the meta device at full size, backward passes included: a backward pass costs 2
where weights and inputs get gradients, 1 where only inputs or only weights do. Text encoders and VAE are not counted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from evaluation.reports.result_file import check_writable, write_result
from evaluation.user_errors import as_user_errors
from sdxs_lightning.command_line import Option, run_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sdxs_lightning.objectives.term import StudentTerm
    from sdxs_lightning.stages.distillation.step import OneStepDistillation

PROGRAM = "python -m evaluation.benchmarks.passes"
BATCH = 2


@dataclass(frozen=True, kw_only=True)
class PassesOptions:
    """Counts the passes of a student update for DMD2's settings and for cheaper ones.

    In units of one forward pass of the base's U-Net on one sample, by base and by student: the base's architecture, or the
    pruned U-Net of SDXS (sdxs-512, sdxs-1024).
    """

    EXAMPLES: ClassVar[str] = f"{PROGRAM} --out evaluation/results/passes.json"

    base: Annotated[tuple[str, ...], Option(choices=("sd15", "sdxl"))] = ("sd15",)
    """Bases; SDXL takes minutes."""
    out: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class Setting:
    """Options of the stage that change its work."""

    ratio: int
    """Fake score updates per student update."""
    gan: Literal["fake_score", "real_score"] | None = None
    """Network whose features the discriminator reads; None is without a GAN."""
    pruned: bool = False
    """Whether the student is SDXS's pruned U-Net rather than one of the base's architecture."""
    per_sample: int = 1
    """Fake score updates on one batch of samples."""
    every_nth: int = 1
    """Fake score and discriminator learn from every n-th sample of a batch."""
    lora_rank: int | None = None
    """Rank if the fake score is adapters on the frozen base."""
    guided_fake_score: bool = False
    """Long and short guidance."""
    instead: type[StudentTerm] | None = None
    """Term of `objectives` in the place of distribution matching; `DecoupledGuidance` goes beside it."""


_GAN: Literal["fake_score"] = "fake_score"


def settings() -> dict[str, Setting]:
    """The rows."""
    from sdxs_lightning.objectives.decoupled_guidance import DecoupledGuidance
    from sdxs_lightning.objectives.score_identity import ScoreIdentity

    pruned = partial(Setting, pruned=True)
    return {
        "DMD2, stage 1": Setting(10),
        "DMD2, stage 2 (GAN)": Setting(10, gan=_GAN),
        "pruned student": pruned(10),
        "pruned student, GAN": pruned(10, gan=_GAN),
        "GAN on the real score's features": pruned(10, gan="real_score"),
        "samples used 10 times": pruned(10, per_sample=10),
        "samples used 10 times, GAN": pruned(10, gan=_GAN, per_sample=10),
        "samples used 10 times, GAN on the real score's features": pruned(
            10, gan="real_score", per_sample=10
        ),
        "every second sample for the fake score, GAN": pruned(10, gan=_GAN, every_nth=2),
        "LoRA fake score": pruned(10, lora_rank=64),
        "LoRA fake score, GAN": pruned(10, gan=_GAN, lora_rank=64),
        "LoRA fake score of rank 16, GAN": pruned(10, gan=_GAN, lora_rank=16),
        "decoupled guidance": pruned(10, instead=DecoupledGuidance),
        "long and short guidance": pruned(10, guided_fake_score=True),
        "score identity": pruned(10, instead=ScoreIdentity),
        "ratio 5": pruned(5),
        "ratio 5, samples used 5 times": pruned(5, per_sample=5),
        "ratio 5, samples used 5 times, GAN": pruned(5, gan=_GAN, per_sample=5),
        "ratio 5, samples used 5 times, LoRA fake score, GAN": pruned(
            5, gan=_GAN, per_sample=5, lora_rank=64
        ),
        "ratio 5, every second sample for the fake score, GAN": pruned(5, gan=_GAN, every_nth=2),
        "full student, ratio 2, samples used twice": Setting(2, per_sample=2),
        "full student, ratio 1": Setting(1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(PROGRAM, PassesOptions, run, arguments)


@as_user_errors()
def run(options: PassesOptions) -> str:
    """Counts, and returns the table."""
    if options.out is not None:
        check_writable(options.out)
    found = {base: count_all(base) for base in options.base}
    if options.out is not None:
        write_result(options.out, {"passes_per_student_update": found})
    return "\n".join(f"{base}:\n\n{passes_table(rows)}" for base, rows in found.items())


def passes_table(rows: dict[str, dict[str, float]]) -> str:
    """The rows of one base as Markdown."""
    from evaluation.reports.markdown import markdown_table

    cells = [[name, f"{row['passes']:.1f}", f"{row['of_fake_score']:.0%}"] for name, row in rows.items()]
    return markdown_table(["", "passes", "of these for the fake score"], cells)


def count_all(base: Literal["sd15", "sdxl"] | str) -> dict[str, dict[str, float]]:
    """All rows for one base."""
    from evaluation.benchmarks.full_size import save_configs
    from sdxs_lightning.families.folders import unet_config
    from sdxs_lightning.surgery.config import prune_config
    from sdxs_lightning.surgery.presets import PRESETS

    with tempfile.TemporaryDirectory() as temporary:
        folder = save_configs(base, Path(temporary))
        pruned = Path(temporary) / "pruned"
        pruned.mkdir()
        topology = PRESETS["sdxs-512" if base == "sd15" else "sdxs-1024"]
        config = prune_config(unet_config(folder / "unet"), topology)
        (pruned / "config.json").write_text(json.dumps(config))
        unit = Counting(stage_of(folder, None, Setting(1))).base_forward()
        return {
            name: Counting(stage_of(folder, pruned if setting.pruned else None, setting)).passes(unit)
            for name, setting in settings().items()
        }


def stage_of(base: Path, student: Path | None, setting: Setting) -> OneStepDistillation:
    """A stage without weights.

    Args:
        base: folder with the base's JSON files.
        student: folder with the student's config; None takes the base's.
        setting: its options.
    """
    import torch

    from sdxs_lightning.families.detect import detect_family
    from sdxs_lightning.memory_plan.weightless import WeightlessFamily
    from sdxs_lightning.networks.discriminator import Discriminator
    from sdxs_lightning.networks.fake_score import FakeScore
    from sdxs_lightning.networks.lora import LoRA
    from sdxs_lightning.networks.student_generator import StudentGenerator
    from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
    from sdxs_lightning.objectives.decoupled_guidance import DecoupledGuidance
    from sdxs_lightning.objectives.denoising import Denoising
    from sdxs_lightning.objectives.distribution_matching import DistributionMatching
    from sdxs_lightning.stages.distillation.step import OneStepDistillation
    from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule

    adamw = partial(torch.optim.AdamW, lr=1e-5)
    decoupled = setting.instead is DecoupledGuidance
    matching = DistributionMatching(
        guidance_scale=1.0 if decoupled else 1.75,
        fake_guidance_scale=1.75 if setting.guided_fake_score else 1.0,
    )
    lora = None if setting.lora_rank is None else LoRA(rank=setting.lora_rank)
    return OneStepDistillation(
        family=WeightlessFamily(detect_family(str(base))),
        student=StudentGenerator(adamw, weights=None if student is None else str(student)),
        fake_score=FakeScore(adamw, lora=lora),
        update_schedule=UpdateSchedule(
            max_student_updates=10**6,
            fake_score_updates_per_student_update=setting.ratio,
            fake_score_updates_per_sample=setting.per_sample,
            fake_score_every_nth_sample=setting.every_nth,
        ),
        distribution_matching=matching if setting.instead is None or decoupled else None,
        objectives={} if setting.instead is None else {"instead": setting.instead()},
        denoising=Denoising(caption_dropout=0.1 if setting.guided_fake_score else 0.0),
        discriminator=None if setting.gan is None else Discriminator(adamw),
        adversarial=None if setting.gan is None else DiffusionAdversarial(features=setting.gan),
    )


@dataclass
class Counting:
    """A stage on the meta device, whose methods are run under the FLOP counter."""

    stage: OneStepDistillation
    schedule: Any = field(init=False)

    def __post_init__(self) -> None:
        import torch

        self.schedule = self.stage.update_schedule
        self.stage.configure_model()
        self.stage.to(torch.device("meta"))
        self.stage.on_fit_start()

    def base_forward(self) -> float:
        """FLOPs of one pass of the base's U-Net on one sample."""
        import torch

        from sdxs_lightning.memory_plan.step_memory import BatchShape

        batch = BatchShape(self.stage.family.latent_shape()).make(BATCH)
        conditioning = self.stage.family.encode_prompts(batch.captions)
        noise = torch.empty(BATCH, *self.stage.family.latent_shape(), device="meta")
        assert self.stage.real_score is not None
        network = self.stage.real_score.module
        return self._flops(lambda: network(noise, batch.positions, conditioning)) / BATCH

    def passes(self, unit: float) -> dict[str, float]:
        """Passes per student update in all, and the share of fake score and discriminator.

        Args:
            unit: FLOPs of one pass of the base.
        """
        from sdxs_lightning.memory_plan.step_memory import BatchShape

        stage, batch = self.stage, BatchShape(self.stage.family.latent_shape()).make(BATCH)
        terms = stage.terms.distillation
        with _by_hand(stage):
            student = self._flops(lambda: stage._student_backward(stage._sample(batch, terms), terms))
            part = self.schedule.for_fake_score(batch)
            sampling = self._flops(lambda: stage._sample(part, {}))
            sample = stage._sample(part, {})
            critic = self._flops(lambda: stage._fake_score_and_discriminator_backward(sample, part))
        ratio, uses = (
            self.schedule.fake_score_updates_per_student_update,
            self.schedule.fake_score_updates_per_sample,
        )
        total = student + (ratio // uses - 1) * sampling + ratio * critic
        return {"passes": total / unit / BATCH, "of_fake_score": ratio * critic / total}

    @staticmethod
    def _flops(work: Callable[[], Any]) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())


@contextmanager
def _by_hand(stage: OneStepDistillation) -> Iterator[None]:
    """Backward passes without a Trainer."""

    def backward(loss: Tensor) -> None:
        loss.backward()

    vars(stage)["manual_backward"] = backward
    try:
        yield
    finally:
        del vars(stage)["manual_backward"]


if __name__ == "__main__":
    main()
