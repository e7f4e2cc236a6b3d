"""The standard diffusion loss, which fits the fake score to the student's distribution."""

from dataclasses import dataclass

from torch import Tensor

from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.objectives.checks import check_same_shape, check_weight
from sdxs_lightning.objectives.term import ObjectiveSettings


def denoising_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean square of output - target.

    Args:
        output: (B, 4, h, w), float, the network's raw output at x_t.
        target: same shape, from `noise_schedule.target_of`; gets no gradient.

    Returns:
        (), float32.

    Raises:
        ValueError: unless the shapes agree.

    Source: DDPM, arXiv:2006.11239, eq. 14 (epsilon); DMD, arXiv:2311.18828, eq. 6, for the fake score.
    """
    check_same_shape(output=output, target=target)
    return (output.float() - target.detach().float()).square().mean()


@dataclass(frozen=True)
class Denoising(ObjectiveSettings):
    """Settings of the fake score's denoising loss."""

    weight: float = 1.0
    """Weight of the loss; matters only relative to the discriminator's, which shares the fake score's encoder."""
    timesteps: TimestepRange = TimestepRange(0, 999)
    """Timesteps to train on; all, as in DMD2."""

    caption_dropout: float = 0.0
    """Probability of training on the unconditional prompt, for `distribution_matching.fake_guidance_scale`; 0 is DMD2."""

    def __post_init__(self) -> None:
        check_weight("Denoising", weight=self.weight)
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"denoising.caption_dropout must be in [0, 1), got {self.caption_dropout}.")

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Weighted `denoising_loss`: (), float32."""
        return self.weight * denoising_loss(output, target)
