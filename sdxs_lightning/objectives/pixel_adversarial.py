"""The projected GAN on the student's images: texture, which score distillation alone leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sdxs_lightning.objectives.checks import check_weight
from sdxs_lightning.objectives.projected_gan import hinge_generator_loss
from sdxs_lightning.objectives.term import ObjectiveSettings


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of the discriminator's images, real and fake alike, so that it cannot memorise the real ones.

    Source: DiffAugment, arXiv:2006.10738, whose ranges are the defaults.
    """

    colour: float | None = 1.0
    """Factor of the ranges of brightness (+-0.5 in [-1, 1]), saturation (1 +- 1) and contrast (1 +- 0.5), in (0, 1]; null
    leaves colours."""
    translation: float | None = 0.125
    """Largest shift as a share of the side, in (0, 1), rounded to pixels; grey comes in. Null leaves images in place."""
    cutout: float | None = 0.5
    """Side of the grey square as a share of the image's, in (0, 1), its centre anywhere. Null covers nothing."""

    def __post_init__(self) -> None:
        if self.colour is not None and not 0 < self.colour <= 1:
            raise ValueError(f"augmentation.colour must be in (0, 1], or null, got {self.colour}.")
        for name in ("translation", "cutout"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"augmentation.{name} must be in (0, 1), or null, got {share}.")


@dataclass(frozen=True)
class PixelAdversarial(ObjectiveSettings):
    """Settings of the GAN on images: its weight, and what the discriminator compares.

    Source: SDXS, arXiv:2403.16627, names a short GAN fine-tune with the projected GAN; ADD, arXiv:2311.17042, section 3.2, has
        its losses. Neither gives a weight beside score distillation: that is ours.
    """

    student_weight: float = 0.1
    """Factor of the student's loss. On the toy world, with heads of 15 to 60 updates, the gradient at the latents is 6.5 to 9.4
    times that of distribution matching at weight 1 each; so 0.1 makes them about equal."""
    r1_weight: float | None = 1e-5
    """Factor of the R1 penalty on the heads' inputs; ADD's 1e-5. Null leaves it out."""
    crop_px: int | None = None
    """Side of the random square, at full resolution, that the feature network gets; null gives it the complete image."""
    augmentation: Augmentation | None = Augmentation()
    """Null leaves images as they are."""
    real: Literal["latents", "images"] = "latents"
    """What is real: the data's latents, decoded as the student's are, or its images. Latents leave the decoder's own traces
    on both sides, so the student is not trained towards what its decoder cannot draw; images pull it towards that too."""
    decoder: str | None = None
    """Folder of an AutoencoderTiny that decodes latents; null is the base's own VAE, slow and large with a graph."""

    def __post_init__(self) -> None:
        check_weight("PixelAdversarial", student_weight=self.student_weight)
        if self.r1_weight is not None:
            check_weight("PixelAdversarial", r1_weight=self.r1_weight)
        if self.crop_px is not None and self.crop_px < 1:
            raise ValueError(f"pixel_adversarial.crop_px must be 1 or more, or null, got {self.crop_px}.")

    def student_loss(self, fake_logits: Sequence[Tensor]) -> Tensor:
        """Weighted `hinge_generator_loss`: (), float32."""
        return self.student_weight * hinge_generator_loss(fake_logits)
