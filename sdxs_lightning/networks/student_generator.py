"""The one-step or few-step student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.families import Family
from sdxs_lightning.networks.backward_simulation import (
    ImageStarts,
    check_timesteps,
    sample_in_steps,
    simulated_sample,
)
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.guidance_input import GuidanceInput, add_guidance_input, record_learnt
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.networks.network import Network, frozen_fingerprint, load_denoiser, save_adapters_only


class StudentGenerator(Network):
    """Maps noise and a prompt to clean latents in one or a few steps; its U-Net may be smaller than the base's.

    Args:
        optimizer: called with the trainable parameters.
        lr_scheduler: stepped once per student update; None keeps the rate constant.
        weights: U-Net or pipeline folder to start from (such as a pruned or warmed-up student); None starts from the base.
        conditioning_timestep: timestep of a one-step student; None takes the family's.
        timesteps: timesteps of a few-step student, from noise to clean, such as DMD2's [999, 749, 499, 249]; None is one step.
        image_starts: share of the samples of a few-step student's later steps that begin there from the noised image of the
            pair, or of the data where a loss has no pairs, rather than from the student's earlier steps: the student then
            takes an image with a strength.
        lora: trains adapters on frozen weights, merged on export; None trains all weights.
        gradient_checkpointing: recompute blocks in the backward pass: less memory, about a third more compute.
        compile_blocks: torch.compile each block; worthwhile on a GPU for runs longer than minutes.
        guidance: makes the guidance scale an input, over a range of which each training sample draws its own; stock diffusers
            then takes it as guidance_scale. None is a student of the one scale that its objectives name.

    Raises:
        ValueError: if both conditioning_timestep and timesteps are set, or both guidance and lora, or image_starts is no share
            or has no later step.
    """

    denoiser: Denoiser
    frozen_fingerprint: str | None
    """Fingerprint of the weights under the adapters; None without adapters."""
    conditioning_timestep: int
    """Timestep of the first step."""
    timesteps: Sequence[int]
    """Timesteps of all steps, from noise to clean."""
    image_starts: float
    """Share of the samples that begin from an image, at a step after the first."""
    guidance: GuidanceInput | None = None
    """The guidance scale as an input; None without."""
    without_guidance: ClassVar[str] = (
        "set student.init_args.guidance, such as {low: 1.0, high: 4.5}, or start from other weights"
    )
    """What to do, where the weights take the scale and `guidance` is None."""

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        conditioning_timestep: int | None = None,
        timesteps: list[int] | None = None,
        image_starts: float = 0.0,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        guidance: GuidanceInput | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self._weights = weights
        self.lora = lora
        self._conditioning_timestep = conditioning_timestep
        if conditioning_timestep is not None and timesteps is not None:
            raise ValueError(
                f"conditioning_timestep ({conditioning_timestep}) is for a student of one step and timesteps ({timesteps}) for "
                "one of several; set one of them in student.init_args."
            )
        if not 0 <= image_starts <= 1 or (image_starts and len(timesteps or []) < 2):
            raise ValueError(
                f"image_starts is {image_starts}, with timesteps {timesteps}; it is a share in [0, 1], above 0 only for a "
                "student of several timesteps. Change student.init_args."
            )
        if guidance is not None and lora is not None:
            raise ValueError(
                "student.guidance trains a projection of its own, and student.lora freezes all but adapters; set one of them "
                "to null."
            )
        self.guidance = guidance
        self._timesteps = timesteps
        self.image_starts = image_starts
        self._switches = gradient_checkpointing, compile_blocks

    def build(self, family: Family) -> None:
        """Loads the network. Idempotent.

        Raises:
            ValueError: if timesteps are outside the family's schedule, an exported pipeline could not visit them, or the
                weights take a guidance scale and `guidance` is None.
        """
        if hasattr(self, "denoiser"):
            return
        total = family.schedule.num_train_timesteps
        timestep = self._conditioning_timestep
        self.conditioning_timestep = family.conditioning_timestep if timestep is None else timestep
        if not 0 <= self.conditioning_timestep < total:
            raise ValueError(
                f"conditioning_timestep must be in [0, {total - 1}], got {self.conditioning_timestep}; change "
                "student.init_args.conditioning_timestep."
            )
        if self._timesteps is not None:
            check_timesteps(self._timesteps, total)
            self.conditioning_timestep = self._timesteps[0]
        self.timesteps = self._timesteps or [self.conditioning_timestep]
        self.denoiser = load_denoiser(
            family, self._weights, self.lora, *self._switches, "student.init_args.weights"
        )
        if self.guidance is not None:
            add_guidance_input(self.denoiser.unet, self.guidance.dimensions)
            record_learnt(self.denoiser.unet, self.guidance)
        elif self.denoiser.unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "the student's weights take the guidance scale as an input (time_cond_proj_dim): "
                f"{self.without_guidance}."
            )
        self.frozen_fingerprint = frozen_fingerprint(self.denoiser)
        if self.lora is not None:
            save_adapters_only(self)

    def forward(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Maps noise (B, C, h, w) to clean latents pred_x0 (B, C, h, w), float32, through all steps."""
        return sample_in_steps(self.denoiser, noise, conditioning, self.timesteps)

    def simulate(
        self, noise: Tensor, conditioning: Conditioning, step: int = 0, starts: ImageStarts | None = None
    ) -> Tensor:
        """The training counterpart of `forward`: the prediction at the step of this index (`simulated_sample`)."""
        return simulated_sample(self.denoiser, noise, conditioning, self.timesteps, step, starts)
