"""The projected GAN on the student's images: decode, augment, extract frozen features, discriminate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdxs_lightning.core.seeding import Stream, uniform
from sdxs_lightning.families import Family
from sdxs_lightning.networks.decoded_image_features import DecodedImageFeatures
from sdxs_lightning.networks.image_features import ImageFeatures
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.objectives.pixel_adversarial import PixelAdversarial
from sdxs_lightning.objectives.projected_gan import projected_discriminator_loss
from sdxs_lightning.objectives.term import DistillationContext, LatentSample, Scalars
from sdxs_lightning.stages.distillation.augmentation import NUMBERS, augment, cut_squares
from sdxs_lightning.stages.distillation.gan import Gan, RealBatch


class PixelGan(Gan):
    """Discriminator heads on frozen features of images.

    Args:
        discriminator: the heads.
        objective: losses, and the images that the discriminator compares.
        features: the frozen feature network. Not one that a metric uses, which would invalidate the metric.

    Source: SDXS, arXiv:2403.16627, section 3.3; ADD, arXiv:2311.17042, section 3.2; DiffAugment, arXiv:2006.10738.
    """

    def __init__(
        self, discriminator: ProjectedDiscriminator, objective: PixelAdversarial, features: ImageFeatures
    ) -> None:
        self.discriminator, self.objective = discriminator, objective
        self.phase = objective.phase
        self._image_features = DecodedImageFeatures(features, objective.decoder, "pixel_adversarial.decoder")
        self._last_features: tuple[Tensor, list[Tensor]] | None = None

    def build(self, family: Family, context: DistillationContext) -> None:
        self._family = family
        self._image_features.build(family)
        side = self.objective.crop_px or family.resolution
        self.discriminator.build(self._image_features.network.shapes(side))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self._image_features.to(device, dtype)

    def frozen_networks(self) -> dict[str, nn.Module]:
        """The feature network, and the decoder unless it is the base's VAE."""
        return self._image_features.frozen_networks("image_features", "pixel_decoder")

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """The student's adversarial loss, differentiated through features, augmentation and decoder."""
        features = self._features(self._image_features.decode(sample.latents), sample.positions, sample.seed)
        self._last_features = sample.latents.detach(), [feature_map.detach() for feature_map in features]
        loss = self.objective.student_loss(self.discriminator(features))
        return loss, {"adversarial": loss}

    def discriminator_loss(
        self, fake: LatentSample, real: RealBatch, context: DistillationContext, fake_features: Tensor | None
    ) -> tuple[Tensor, Scalars]:
        with torch.no_grad():
            real_features = self._features(self._real_images(real), real.batch.positions, real.seed)
            own_features = self._features_of_sample(fake)
        r1_weight = self.objective.r1_weight
        return projected_discriminator_loss(self.discriminator, real_features, own_features, r1_weight)

    def _features_of_sample(self, fake: LatentSample) -> list[Tensor]:
        """Reuses the features of the student's term if they are of the same latents, since decoding is expensive."""
        last, self._last_features = self._last_features, None
        if last is not None and (last[0].data_ptr(), last[0].shape) == (
            fake.latents.data_ptr(),
            fake.latents.shape,
        ):
            return last[1]
        return self._features(self._image_features.decode(fake.latents), fake.positions, fake.seed)

    def _features(self, images: Tensor, positions: Tensor, seed: int) -> list[Tensor]:
        """Feature maps of the cropped and augmented images; differentiable."""
        numbers = uniform(seed, Stream.AUGMENTATION, positions, (2 + NUMBERS,))
        if self.objective.crop_px is not None:
            images = cut_squares(images, numbers[:, :2], self.objective.crop_px)
        if self.objective.augmentation is not None:
            images = augment(images, numbers[:, 2:], self.objective.augmentation)
        return self._image_features.extract(images)

    def _real_images(self, real: RealBatch) -> Tensor:
        """(B, 3, H, W), float32: the batch's images, or its latents decoded like the student's."""
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
        return self._image_features.decode(self._family.scale_latents(latents))
