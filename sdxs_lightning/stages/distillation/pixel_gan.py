"""The projected GAN on the student's images: decode, augment, look through a frozen network, tell real from fake."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdxs_lightning.core.seeding import Stream, uniform
from sdxs_lightning.families import Family
from sdxs_lightning.networks.decoded_image_features import DecodedImageFeatures
from sdxs_lightning.networks.image_features import ImageFeatures
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator, projected_critic_loss
from sdxs_lightning.objectives.pixel_adversarial import PixelAdversarial
from sdxs_lightning.stages.distillation.augmentation import NUMBERS, augment, cut_squares
from sdxs_lightning.stages.distillation.gan import Data
from sdxs_lightning.stages.distillation.sample import DistillationContext, Sample
from sdxs_lightning.stages.distillation.student_terms import Scalars


class PixelGan:
    """Heads on frozen image features tell data from the student's images.

    Args:
        discriminator: the heads.
        objective: losses, and what the discriminator is shown.
        features: the frozen network; not the one that judges the result, or its score means nothing.

    Source: SDXS, arXiv:2403.16627, section 3.3; ADD, arXiv:2311.17042, section 3.2; DiffAugment, arXiv:2006.10738.
    """

    needs_real_score = False
    reads_denoising_pass = False

    def __init__(
        self, discriminator: ProjectedDiscriminator, objective: PixelAdversarial, features: ImageFeatures
    ) -> None:
        self.discriminator, self.objective = discriminator, objective
        self._eye = DecodedImageFeatures(features, objective.decoder, "pixel_adversarial.decoder")
        self._last_seen: tuple[Tensor, list[Tensor]] | None = None

    def build(self, family: Family, context: DistillationContext) -> None:
        """See `Gan`."""
        self._family = family
        self._eye.build(family)
        self.discriminator.build(self._eye.network.shapes(self.objective.crop_px or family.resolution))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """See `Gan`."""
        self._eye.to(device, dtype)

    def frozen_networks(self) -> dict[str, nn.Module]:
        """See `Gan`."""
        return self._eye.frozen_networks("image_features", "pixel_decoder")

    def student_term(self, sample: Sample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """Makes the sample's image look real; the graph goes through features, augmentation and decoder."""
        features = self._see(self._eye.decode(sample.latents), sample.positions, sample.seed)
        self._last_seen = sample.latents.detach(), [part.detach() for part in features]
        loss = self.objective.student_loss(self.discriminator(features))
        return loss, {"adversarial": loss}

    def discriminator_loss(
        self, fake: Sample, real: Data, context: DistillationContext, fake_features: Tensor | None
    ) -> tuple[Tensor, Scalars]:
        """See `Gan`. Only the heads learn, so images and features are made without graph."""
        with torch.no_grad():
            real_features = self._see(self._real_images(real), real.batch.positions, real.seed)
            seen = self._features_of(fake)
        return projected_critic_loss(self.discriminator, real_features, seen, self.objective.r1_weight)

    def _features_of(self, fake: Sample) -> list[Tensor]:
        """Of the sample: those of the student's term, if that has just looked at the same memory; decoding is the dear part."""
        last, self._last_seen = self._last_seen, None
        if last is not None and last[0].data_ptr() == fake.latents.data_ptr():
            return last[1]
        return self._see(self._eye.decode(fake.latents), fake.positions, fake.seed)

    def _see(self, images: Tensor, positions: Tensor, seed: int) -> list[Tensor]:
        """Feature maps of the images, cut and augmented as their positions say; with graph where images have one."""
        numbers = uniform(seed, Stream.AUGMENTATION, positions, (2 + NUMBERS,))
        if self.objective.crop_px is not None:
            images = cut_squares(images, numbers[:, :2], self.objective.crop_px)
        if self.objective.augmentation is not None:
            images = augment(images, numbers[:, 2:], self.objective.augmentation)
        return self._eye.see(images)

    def _real_images(self, real: Data) -> Tensor:
        """(B, 3, H, W), float32: the batch's own, or its latents as the student's are decoded."""
        side, latents, images = self._family.resolution, real.batch.latents, real.batch.images
        if self.objective.real == "images":
            if images is None or images.shape[-2:] != (side, side):
                found = "none" if images is None else f"some of {images.shape[-2]}x{images.shape[-1]}"
                raise ValueError(
                    f"the discriminator needs images of {side}x{side} pixels in every batch and got {found}; let data.contents "
                    "name images, or set pixel_adversarial.real to latents."
                )
            return images.float()
        if latents is None or tuple(latents.shape[1:]) != self._family.latent_shape():
            found = "none" if latents is None else f"shape {tuple(latents.shape[1:])}"
            raise ValueError(
                f"the discriminator needs latents of shape {self._family.latent_shape()} in every batch and got {found}; make "
                "latent shards for this base and resolution, or set pixel_adversarial.real to images."
            )
        return self._eye.decode(self._family.scale_latents(latents))
