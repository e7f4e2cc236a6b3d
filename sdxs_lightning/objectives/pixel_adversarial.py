"""The projected GAN on the student's images, for the texture that score distillation alone lacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sdxs_lightning.objectives.checks import check_weight
from sdxs_lightning.objectives.projected_gan import hinge_generator_loss
from sdxs_lightning.objectives.term import ObjectiveSettings, Phase


@dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation of real and fake images, which keeps the discriminator from memorising the real ones.

    Source: DiffAugment, arXiv:2006.10738, whose ranges are the defaults.
    """

    colour: float | None = 1.0
    """Scale, in (0, 1], of the ranges of brightness (+-0.5 in [-1, 1]), saturation (1 +- 1) and contrast (1 +- 0.5); null
    disables it."""
    translation: float | None = 0.125
    """Largest shift as a share of the side, in (0, 1), rounded to pixels, padded with grey. Null disables it."""
    cutout: float | None = 0.5
    """Side of the grey square as a share of the image's, in (0, 1), with its centre anywhere. Null disables it."""

    def __post_init__(self) -> None:
        if self.colour is not None and not 0 < self.colour <= 1:
            raise ValueError(f"augmentation.colour must be in (0, 1], or null, got {self.colour}.")
        for name in ("translation", "cutout"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"augmentation.{name} must be in (0, 1), or null, got {share}.")


@dataclass(frozen=True)
class PixelAdversarial(ObjectiveSettings):
    """Settings of the GAN on images.

    Source: SDXS, arXiv:2403.16627, names a short fine-tune with the projected GAN; the losses are ADD's, arXiv:2311.17042,
        section 3.2. Neither gives a weight relative to score distillation: that is ours.
    """

    student_weight: float = 0.1
    """Weight of the student's loss. On the toy world, with heads trained for 15 to 60 updates, the gradient at the latents is
    6.5 to 9.4 times that of distribution matching at weight 1 each, so 0.1 makes them about equal."""
    r1_weight: float | None = 1e-5
    """Weight of the R1 penalty on the heads' inputs; ADD's 1e-5. Null disables it."""
    crop_px: int | None = None
    """Side of the random full-resolution crop given to the feature network; null gives the complete image."""
    augmentation: Augmentation | None = Augmentation()
    """Augmentation of real and fake images; null disables it."""
    real: Literal["latents", "images"] = "latents"
    """Real images: the data's latents, decoded like the student's, or its images. With latents both sides have the decoder's
    artefacts, so the student is not trained towards detail that its decoder cannot produce; with images it is."""
    decoder: str | None = None
    """Folder of an AutoencoderTiny; null uses the base's VAE, which is slow and needs much memory with a graph."""
    phase: Phase = "distillation"
    """Phase in which it acts: "always" is in the warm-up too (DMDX, arXiv:2507.18569)."""

    def __post_init__(self) -> None:
        check_weight("PixelAdversarial", student_weight=self.student_weight)
        if self.r1_weight is not None:
            check_weight("PixelAdversarial", r1_weight=self.r1_weight)
        if self.crop_px is not None and self.crop_px < 1:
            raise ValueError(f"pixel_adversarial.crop_px must be 1 or more, or null, got {self.crop_px}.")

    def student_loss(self, fake_logits: Sequence[Tensor]) -> Tensor:
        """Weighted `hinge_generator_loss`: (), float32."""
        return self.student_weight * hinge_generator_loss(fake_logits)
