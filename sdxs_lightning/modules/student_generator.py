"""The one-step student."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from sdxs_lightning.batch import Conditioning
from sdxs_lightning.families import Family
from sdxs_lightning.modules.network import Network, prepare_unet
from sdxs_lightning.teacher.denoiser import Denoiser


def one_step(denoiser: Denoiser, noise: Tensor, conditioning: Conditioning, timestep: int) -> Tensor:
    """Noise straight to clean latents: the network's x_0 estimate at one constant timestep.

    Args:
        denoiser: the student's network.
        noise: (B, C, h, w), N(0, 1), unscaled whatever the timestep is (DMD2's "timestep shift" for SDXL).
        conditioning: of B prompts.
        timestep: the conditioning timestep.

    Returns:
        (B, C, h, w), float32, scaled latents.

    Source: DMD2, arXiv:2405.14867, section 4.2.
    """
    timesteps = torch.full((len(noise),), timestep, dtype=torch.int64, device=noise.device)
    prediction = denoiser(noise, timesteps, conditioning)
    pred_x0: Tensor = prediction.pred_x0
    return pred_x0


class StudentGenerator(Network):
    """Maps noise and a prompt to clean latents in one step; its network may be smaller than the base's.

    Args:
        optimizer: called with the trainable parameters.
        lr_scheduler: stepped once per student update; None keeps the rate.
        weights: U-Net folder, or pipeline folder, to start from (a pruned student, a warmed-up one); None starts from
            the base.
        conditioning_timestep: None takes the family's.
        gradient_checkpointing: recompute blocks in the backward pass: less memory, a third more work.
        compile_blocks: torch.compile of each block; pays on a GPU for runs of more than minutes.
    """

    denoiser: Denoiser
    conditioning_timestep: int

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        conditioning_timestep: int | None = None,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self._weights = weights
        self._conditioning_timestep = conditioning_timestep
        self._switches = gradient_checkpointing, compile_blocks

    def build(self, family: Family) -> None:
        """Loads the network; a second call does nothing.

        Raises:
            ValueError: for a conditioning timestep outside the family's schedule.
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
        unet = prepare_unet(family.load_unet(self._weights), *self._switches)
        self.denoiser = Denoiser(unet, family.schedule, family.prediction_type)

    def forward(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Noise (B, C, h, w) -> clean latents pred_x0 (B, C, h, w), float32."""
        return one_step(self.denoiser, noise, conditioning, self.conditioning_timestep)
