"""Stage `controlnet`: trains the ControlNet of a frozen one-step student, by the losses of the distillation."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.image_condition import ImageCondition, description_of
from sdxs_lightning.core.seeding import Stream, normal, uniform
from sdxs_lightning.families import Family
from sdxs_lightning.networks.adapter_views import BaseView
from sdxs_lightning.networks.controlled import (
    ControlledBaseView,
    ControlledDenoiser,
    ControlledFakeScore,
    ControlledStudent,
    ControlNetSource,
)
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.objectives.term import LatentSample, StudentTerm
from sdxs_lightning.stages.controlnet.control_images import (
    check_dropout,
    control_images_of,
    extracted,
    with_some_dropped,
)
from sdxs_lightning.stages.distillation.gan import RealBatch
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.student_inputs import StudentInputs
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from sdxs_lightning.training.plannable import PlannedNetwork


@dataclass(frozen=True)
class ControlSettings:
    """How the condition takes part in the distillation.

    Raises:
        ValueError: for a share out of range, a scale below 0, or one of a ControlNet that there is not.
    """

    base_controlnet: str | None = None
    """Folder or hub id of the base's pretrained ControlNet, attached, frozen, to the real score (way `pretrained`; name it as
    fake_score.init_args.controlnet.weights too); null leaves the real score plain (way `joint`)."""
    conditioning_scale: float = 1.0
    """Factor of the base ControlNet's residuals, on the fake score too where that has the same."""
    noise_redrawn: float = 0.5
    """Share of the samples made from pairs whose noise is drawn anew: else the layout follows from the noise, and the condition
    need not be read. SDXS has it, but not its share."""
    condition_dropout: float = 0.0
    """Share of the samples whose condition image is black."""

    def __post_init__(self) -> None:
        if not 0 <= self.noise_redrawn <= 1:
            raise ValueError(f"control.noise_redrawn is a share in [0, 1], got {self.noise_redrawn}.")
        check_dropout("control.condition_dropout", self.condition_dropout)
        if not 0 <= self.conditioning_scale < math.inf:
            raise ValueError(f"control.conditioning_scale must be 0 or more, got {self.conditioning_scale}.")
        if self.base_controlnet is None and self.conditioning_scale != 1:
            raise ValueError(
                f"control.conditioning_scale is {self.conditioning_scale} and control.base_controlnet null: it is the scale of "
                "that ControlNet; name one, or leave it out (the student's and the fake score's have controlnet."
                "conditioning_scale)."
            )


class ControlNetDistillation(OneStepDistillation):
    """Trains a ControlNet for a frozen one-step student: stage `controlnet`, ways `pretrained` and `joint`.

    The student's U-Net is frozen; its ControlNet is what the student's updates move, what is averaged and exported. Everything
    else is the distillation's: warm-up on pairs, score difference, segmented or DMD2, GAN, further objectives.

    Args:
        family: the base.
        student: the one-step student with the ControlNet to train.
        fake_score: a `ControlledFakeScore`, which sees the condition; None if the run is warm-up only.
        update_schedule: which networks are updated on which iteration, and when the run ends.
        control: the base's ControlNet, and how conditions are used.
        condition: extracts the condition of the target sampler's images, for pairs without condition images of their own;
            the same that made the data's.
        settings: the other arguments of `OneStepDistillation`.

    Raises:
        ValueError: if the arguments are inconsistent.

    Source: SDXS, arXiv:2403.16627, section 3.4 (way `pretrained`); joint distribution matching, arXiv:2503.06652 (`joint`).
    """

    export_name = "controlnet"
    reads_conditions = True
    student: ControlledStudent
    family: Family

    def __init__(
        self,
        family: Family,
        student: ControlledStudent,
        fake_score: FakeScore | None,
        update_schedule: UpdateSchedule,
        control: ControlSettings = ControlSettings(),
        condition: ImageCondition | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(family, student, fake_score, update_schedule, **settings)
        self.control, self.condition = control, condition
        self._check_settings()
        if self.pairs is not None and condition is not None:
            self.pairs.extract = lambda images: extracted(condition, images)

    def configure_model(self) -> None:
        """Builds all networks, and shards each if the strategy has a device mesh. Idempotent.

        Raises:
            ValueError: if `condition` is not what makes the data's.
        """
        if self.ema is not None:
            return
        self._check_conditions()  # before minutes of loading
        super().configure_model()
        student = self.student.denoiser
        # nn.Module's own to(): that of diffusers warns about every cast.
        nn.Module.to(student.unet, dtype=self.real_score_dtype)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        rank_zero_info(f"ControlNet: {trained:,} trained parameters on a frozen student.")

    def _check_conditions(self) -> None:
        """Checks that both sources of conditions make the same."""
        data = getattr(self._trainer, "datamodule", None)  # none where memory is planned
        made: ImageCondition | None = getattr(getattr(data, "settings", None), "condition", None)
        if self.condition is None or made is None:
            return
        own, datas = description_of(self.condition), description_of(made)
        if own != datas:
            raise ValueError(
                f"model.init_args.condition is {own}, of the target sampler's images, and data.condition {datas}: the "
                "ControlNet would learn both as one. Set them to the same."
            )

    def _load_real_score(self) -> Denoiser:
        """The base, with its ControlNet if there is one, which the fake score shares where it is frozen there too."""
        plain = super()._load_real_score()
        named = self.control.base_controlnet
        if named is None:
            return plain
        fake = self._fake_score_with_the_base_controlnet
        if fake is not None:
            controlnet = fake.denoiser.controlnet
        else:
            source = ControlNetSource(named, train=False)
            controlnet = source.make(plain.unet, self.family, "control.base_controlnet").eval()
        scale = self.control.conditioning_scale
        if isinstance(plain, BaseView):  # the fake score's U-Net, whose adapters the real score leaves alone
            return ControlledBaseView(plain, controlnet, scale)
        return ControlledDenoiser(plain, controlnet, scale, "controlnet")

    @property
    def _fake_score_with_the_base_controlnet(self) -> ControlledFakeScore | None:
        """The fake score, if it has the base's ControlNet, frozen."""
        fake, named = self.fake_score, self.control.base_controlnet
        if named is None or not isinstance(fake, ControlledFakeScore) or fake.controlnet_source.train:
            return None
        return fake if _same_source(fake.controlnet_source.weights, named) else None

    def _check_settings(self) -> None:
        pairs = None if self.pairs is None else self.pairs.settings
        if pairs is not None and pairs.samples and self.condition is None:
            raise ValueError(
                f"pairs.source is '{pairs.source}', and condition is null: the target sampler's images would get conditions of "
                "other images, and the ControlNet would learn to ignore them. Set model.init_args.condition to what makes the "
                "data's conditions (data.conditions, or a class of your own), or pairs.source to batch, for pairs with "
                "condition images."
            )
        named, frozen = self.control.base_controlnet, None
        if isinstance(self.fake_score, ControlledFakeScore) and not self.fake_score.controlnet_source.train:
            frozen = self.fake_score.controlnet_source.weights
        if frozen is not None and not _same_source(frozen, named):
            raise ValueError(
                f"fake_score.controlnet is '{frozen}', frozen, and control.base_controlnet is {named}: the two scores would "
                "differ by it, and not by what the student makes. Name it as control.base_controlnet too, or let the fake "
                "score learn one (fake_score.controlnet.train: true)."
            )
        fake = self._fake_score_with_the_base_controlnet
        scale = self.control.conditioning_scale
        if fake is not None and fake.controlnet_source.conditioning_scale != scale:
            raise ValueError(
                f"fake_score.controlnet.conditioning_scale is {fake.controlnet_source.conditioning_scale} and "
                f"control.conditioning_scale {scale}, of one ControlNet: both scores have it, so set them to the same."
            )

    def _inputs(self, batch: TrainingBatch, terms: Mapping[str, StudentTerm]) -> StudentInputs:
        """As the distillation's, with condition images; some of the pairs' noise is drawn anew."""
        noise, conditioning, target = super()._inputs(batch, terms)
        controls = conditioning.control_images
        if controls is None:
            controls = self._extracted(target) if self._extracts(batch, target) else None
        if controls is None:
            controls = self._control_images(batch)
        if target is not None and self.control.noise_redrawn > 0:
            fresh = normal(self.seed, Stream.REDRAWN_NOISE, batch.positions, tuple(noise.shape[1:]))
            redrawn = uniform(self.seed, Stream.REDRAWN_SAMPLES, batch.positions) < self.control.noise_redrawn
            noise = torch.where(redrawn[:, None, None, None], fresh, noise)
        controls = with_some_dropped(controls, self.control.condition_dropout, self.seed, batch.positions)
        return StudentInputs(noise, replace(conditioning, control_images=controls), target)

    def _control_images(self, batch: TrainingBatch) -> Tensor:
        channels = self.student.denoiser.controlnet.config["conditioning_channels"]
        return control_images_of(batch, self.family, channels)

    def _extracts(self, batch: TrainingBatch, target: Tensor | None) -> bool:
        """Whether conditions are extracted from the targets: always in a run with `condition`, unless the targets are the
        batch's and it brought their own.
        """
        of_batch = self.pairs is not None and not self.pairs.settings.samples
        return (
            target is not None
            and self.condition is not None
            and not (of_batch and batch.control_images is not None)
        )

    def _extracted(self, target: Tensor | None) -> Tensor:
        assert self.condition is not None and target is not None
        images = self.family.decode(target)
        if images.is_meta:  # the memory plan, which counts the decoding
            return torch.empty_like(images)
        return extracted(self.condition, images).float() / 255

    def _real_batch(self, batch: TrainingBatch, fake: LatentSample) -> RealBatch:
        real = super()._real_batch(batch, fake)
        # Dropped as in the fake half, or the discriminator would tell the halves apart by their black conditions.
        controls = self._control_images(batch)
        controls = with_some_dropped(controls, self.control.condition_dropout, self.seed, batch.positions)
        return real._replace(conditioning=replace(real.conditioning, control_images=controls))

    @torch.no_grad()
    def generate(
        self, captions: list[str], noise: Tensor, use_ema: bool = True, control_images: Tensor | None = None
    ) -> Tensor:
        """As the distillation's, under condition images (B, C, H, W) in [0, 1]; None is the student without control."""
        assert self.ema is not None
        generator = self.ema if use_ema else self.student
        attached = self._trainer is not None
        with self.trainer.precision_plugin.forward_context() if attached else nullcontext():
            conditioning = self.family.encode_prompts(captions)
            controls = None if control_images is None else control_images.to(self.device)
            latents = generator(noise.to(self.device), replace(conditioning, control_images=controls))
        return self.family.decode(latents)

    def write_export(self, folder: Path, average: bool, dtype: torch.dtype, vae: str | None = None) -> None:
        """Writes a ControlNet folder in diffusers' layout, which has no VAE (the callback `Export` refuses one)."""
        from sdxs_lightning.export import write_controlnet

        assert self.ema is not None and vae is None
        denoiser = self.ema.denoiser if average else self.student.denoiser
        assert isinstance(denoiser, ControlledDenoiser)
        write_controlnet(denoiser.controlnet, folder, dtype, first_rank=self.global_rank == 0)

    def write_fake_score(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes the fake score's U-Net, and its ControlNet to `<folder>_controlnet` if it was trained; all ranks call it."""
        from sdxs_lightning.export import write_controlnet

        super().write_fake_score(folder, dtype)
        fake = self.fake_score
        if isinstance(fake, ControlledFakeScore) and fake.controlnet_source.train:
            beside = folder.with_name(f"{folder.name}_controlnet")
            write_controlnet(fake.denoiser.controlnet, beside, dtype, first_rank=self.global_rank == 0)

    def plan_networks(self) -> list[PlannedNetwork]:
        networks = super().plan_networks()
        networks.append(PlannedNetwork("student_unet", self.student.denoiser.unet, "frozen"))
        real = self.real_score.module if self.real_score is not None else None
        fake = self.fake_score.denoiser if isinstance(self.fake_score, ControlledFakeScore) else None
        frozen = {
            id(one.controlnet): one.controlnet
            for one in (real, fake)
            if isinstance(one, ControlledDenoiser | ControlledBaseView) and "controlnet" in one.__dict__
        }
        return networks + [PlannedNetwork("base_controlnet", one, "frozen") for one in frozen.values()]


def _same_source(one: str | None, other: str | None) -> bool:
    """Whether two folders or hub ids are the same, however their paths are written."""
    return one is not None and other is not None and os.path.realpath(one) == os.path.realpath(other)
