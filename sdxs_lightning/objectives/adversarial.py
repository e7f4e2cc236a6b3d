"""The diffusion GAN of DMD2: a head on the fake score's features classifies re-noised real and fake latents.

Unlike distribution matching alone, it can correct the teacher's errors.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import softplus

from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.objectives.checks import check_weight
from sdxs_lightning.objectives.term import ObjectiveSettings, Phase


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The student's non-saturating GAN loss: mean softplus(-fake_logits).

    Args:
        fake_logits: (B,), float, logits of the student's samples; positive means real.

    Returns:
        (), float32.

    Source: GAN, arXiv:1406.2661, section 3 (the non-saturating form); DMD2, arXiv:2405.14867, section 4.3.
    """
    return softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss: mean softplus(fake_logits) + mean softplus(-real_logits).

    Args:
        real_logits: (B,), float, logits of real latents; positive means real.
        fake_logits: (B',), float, logits of detached samples of the student; B' may differ from B.

    Returns:
        (), float32; 2 log 2 at chance.

    Source: GAN, arXiv:1406.2661, eq. 1; DMD2, arXiv:2405.14867, section 4.3.
    """
    return softplus(fake_logits.float()).mean() + softplus(-real_logits.float()).mean()


@dataclass(frozen=True)
class DiffusionAdversarial(ObjectiveSettings):
    """Settings of the diffusion GAN."""

    student_weight: float = 1e-3
    """Weight of the student's loss; DMD2: 1e-3 for SD-1.5, 5e-3 for SDXL."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss, which also trains the fake score's encoder if that provides the features."""
    timesteps: TimestepRange = TimestepRange(0, 999)
    """Timesteps at which real and fake latents are compared."""
    features: Literal["fake_score", "real_score"] = "fake_score"
    """Network whose bottleneck the discriminator reads: the fake score, then also trained by its loss as in DMD2, or the frozen
    base."""
    phase: Phase = "distillation"
    """Phase in which it acts. In the warm-up too ("always"), the discriminator learns beside the student from the first update,
    and needs no head start later (DMDX, arXiv:2507.18569); it then reads the real score."""

    def __post_init__(self) -> None:
        check_weight(
            "DiffusionAdversarial",
            student_weight=self.student_weight,
            discriminator_weight=self.discriminator_weight,
        )

    def student_loss(self, fake_logits: Tensor) -> Tensor:
        """Weighted `generator_loss`: (), float32."""
        return self.student_weight * generator_loss(fake_logits)

    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Weighted `discriminator_loss`: (), float32."""
        return self.discriminator_weight * discriminator_loss(real_logits, fake_logits)
