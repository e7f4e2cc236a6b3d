"""Stage `lora`: brings a style LoRA of the base to a one-step student, which stays one-step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sdxs_lightning.export import write_adapters
from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.lora_files import add_to_weights, parameter_count, read_lora
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule


@dataclass(frozen=True)
class StyleLoRA:
    """A LoRA of the base.

    Raises:
        ValueError: for a scale of 0, NaN or infinity.
    """

    path: str
    """A .safetensors file of diffusers, PEFT or kohya, or a folder with one; made for this base."""
    scale: float = 1.0
    """Factor of the LoRA in the real score."""

    def __post_init__(self) -> None:
        if self.scale == 0 or not math.isfinite(self.scale):
            raise ValueError(
                f"style.scale is {self.scale}; set 1, or another factor (0 is the base without the style)."
            )


class StyleDistillation(OneStepDistillation):
    """Trains adapters on a frozen one-step student by score distillation towards the base with a style LoRA.

    The LoRA is added to the weights of the real score only. The fake score starts from the plain base: it models the
    student's samples, which have no style at first, so the difference of the two scores is the style, and the student keeps
    its content and its one step. Pairs of the target sampler have the style too: the sampler is the real score, or the network
    of `pairs.weights` with the LoRA, if it has the LoRA's layers (if not, SDXS lowers the weight of feature matching).

    Args:
        family: the base.
        student: the student to adapt; needs `weights` and `lora`.
        fake_score: trained to denoise the student's samples.
        update_schedule: without warm-up.
        style: the LoRA of the base.
        **kwargs: as in `OneStepDistillation`.

    Raises:
        ValueError: without adapters of the student, or with a warm-up.

    Source: SDXS, arXiv:2403.16627, section 3.4 and figure 4.
    """

    export_name = "lora"

    def __init__(
        self,
        family: Family,
        student: StudentGenerator,
        fake_score: FakeScore | None,
        update_schedule: UpdateSchedule,
        style: StyleLoRA,
        **kwargs: Any,
    ) -> None:
        if student.lora is None:
            raise ValueError(
                "stage `lora` trains adapters on a frozen student: set student.init_args.lora, such as {rank: 64}."
            )
        if update_schedule.warmup_updates:
            raise ValueError(
                f"update_schedule.warmup_updates is {update_schedule.warmup_updates}, and stage `lora` has no warm-up, since "
                "its student draws in one step already; set it to 0."
            )
        super().__init__(
            family=family,
            student=student,
            fake_score=fake_score,
            update_schedule=update_schedule,
            **kwargs,
        )
        self.style = style

    def _load_real_score(self) -> Denoiser:
        """The base with the style; never shared with the fake score, which must not have it."""
        if self.fake_score is not None:
            self.fake_score.shared_base(
                self.real_score_dtype
            )  # casts the frozen weights under its adapters, if it has any
        unet = self.family.load_unet()
        real_score = Denoiser(unet, self.family.schedule, self.family.prediction_type)
        if next(unet.parameters()).is_meta:  # the memory plan, for which the style changes nothing
            return real_score
        found = read_lora(self.style.path, unet, "style.path")
        add_to_weights(unet, found.adapters, self.style.scale)
        rank_zero_info(
            f"The real score has the style '{self.style.path}': {len(found.adapters)} layers, "
            f"{parameter_count(found.adapters):,} weights, scale {self.style.scale}."
        )
        if found.text_encoder_layers:
            rank_zero_warn(
                f"'{self.style.path}' also adapts {found.text_encoder_layers} layers of text encoders, which are not used: "
                "fake score and student read the same prompts as the real score. If the style comes out weak, raise "
                "style.scale."
            )
        return real_score

    def _build_pairs(self) -> None:
        """Adds the style to a target sampler's own network too, if it has the layers."""
        super()._build_pairs()
        own = None if self.pairs is None else self.pairs.own
        if own is None or next(own.module.parameters()).is_meta:
            return
        try:
            found = read_lora(self.style.path, own.module.unet, "style.path")
        except ValueError as error:
            rank_zero_warn(
                f"the target sampler (pairs.weights) stays without the style: {error} Feature matching then pulls away from "
                "it; lower its weight (segmented.lambda_start and lambda_end)."
            )
            return
        add_to_weights(own.module.unet, found.adapters, self.style.scale)

    def write_export(self, folder: Path, average: bool, dtype: torch.dtype) -> None:  # type: ignore[override]
        """Writes a folder for `pipe.load_lora_weights` on the student's pipeline."""
        assert self.ema is not None
        ema = self.ema if average else None
        write_adapters(self.student.denoiser.unet, ema, folder, dtype, self.global_rank == 0)
