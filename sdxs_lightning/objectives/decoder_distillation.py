"""The tiny decoder's losses: L1 on averaged images, a distance of single pixels, and the weight of the projected GAN.

They compare the tiny decoder's images with those of the base's own decoder for the same latents, or with the images that the
latents were encoded from.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import avg_pool2d

from sdxs_lightning.objectives.checks import check_same_shape, check_weight


def averaged_l1(images: Tensor, target: Tensor, factor: int) -> Tensor:
    """Mean |images - target| after both were averaged over squares of factor x factor pixels.

    Detail inside a square is left to the GAN: L1 on single pixels would blur what the latents do not determine. Averaging is
    down-sampling without aliases, and with the VAE's own factor there is one square per latent.

    Args:
        images: (B, 3, H, W), float, H and W multiples of factor.
        target: same shape; gets no gradient.
        factor: side of a square; 1 compares pixels.

    Returns:
        (), float32.

    Raises:
        ValueError: unless the shapes agree and factor divides them.

    Source: SDXS, arXiv:2403.16627, eq. 5, first term; that "down-sampling" is area averaging is ours.
    """
    check_same_shape(images=images, target=target)
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"averaging needs images whose sides are multiples of the factor, got {height}x{width} and factor {factor}; "
            "change reconstruction.factor."
        )
    # Averaging is linear: once, over the difference.
    difference = images.float() - target.detach().float()
    return avg_pool2d(difference, factor).abs().mean()


def pixel_mse(images: Tensor, target: Tensor) -> Tensor:
    """Mean of (images - target)^2 over single pixels: what PSNR measures.

    Args:
        images: (B, 3, H, W), float.
        target: same shape; gets no gradient.

    Returns:
        (), float32.

    Raises:
        ValueError: unless the shapes agree.
    """
    check_same_shape(images=images, target=target)
    return (images.float() - target.detach().float()).square().mean()


def adaptive_weight(
    reconstruction_gradient: Tensor, adversarial_gradient: Tensor, fraction: float, maximum: float
) -> Tensor:
    """The factor that makes the GAN's gradient `fraction` of the reconstruction's in 2-norm.

    Args:
        reconstruction_gradient: any shape: at the decoder's last layer.
        adversarial_gradient: same shape, same place.
        fraction: of the reconstruction's norm that the GAN's gets.
        maximum: the factor is never larger, however small the GAN's gradient is.

    Returns:
        (), float32, without graph.

    Source: VQGAN, arXiv:2012.09841, eq. 7, there with fraction 0.8 and maximum 1e4.
    """
    wanted = fraction * reconstruction_gradient.detach().float().norm()
    weight = wanted / adversarial_gradient.detach().float().norm().clamp_min(1e-12)
    bounded: Tensor = weight.clamp(max=maximum)
    return bounded


@dataclass(frozen=True)
class Reconstruction:
    """Settings of the loss against the target images."""

    weight: float = 1.0
    """Factor of the averaged L1."""
    factor: int | None = None
    """Side of the squares that are averaged before the comparison; null is the VAE's own factor, 8 for SD and SDXL."""
    full_resolution_weight: float | None = None
    """Factor of the distance of single pixels; null leaves it out, as SDXS does. Raises PSNR, blurs what latents leave open."""
    full_resolution_distance: Literal["l1", "mse"] = "l1"
    """Of single pixels: mean |d|, or mean d^2, which is what PSNR measures."""

    def __post_init__(self) -> None:
        check_weight("Reconstruction", weight=self.weight)
        if self.full_resolution_weight is not None:
            check_weight("Reconstruction", full_resolution_weight=self.full_resolution_weight)
        if self.factor is not None and self.factor < 1:
            raise ValueError(f"reconstruction.factor must be 1 or more, or null, got {self.factor}.")

    def loss(self, images: Tensor, target: Tensor, vae_factor: int) -> Tensor:
        """Weighted `averaged_l1`, with the full-resolution term where there is one: (), float32."""
        loss = self.weight * averaged_l1(images, target, self.factor or vae_factor)
        if self.full_resolution_weight is not None:
            squared = self.full_resolution_distance == "mse"
            pixels = pixel_mse(images, target) if squared else averaged_l1(images, target, 1)
            loss = loss + self.full_resolution_weight * pixels
        return loss


@dataclass(frozen=True)
class ProjectedAdversarial:
    """Settings of the projected GAN: when it starts, and how strong it is."""

    fraction: float = 0.5
    """Norm of the GAN's gradient at the decoder's last layer over that of the reconstruction."""
    max_weight: float = 1e4
    """Bound of the factor that this takes; VQGAN's."""
    l1_only_share: float = 0.1
    """Share of the run's updates, from its start, in which the decoder learns from the reconstruction alone."""
    r1_weight: float | None = 1e-5
    """Factor of the R1 penalty on the heads' inputs; ADD's 1e-5. Null leaves it out."""
    crop_px: int | None = None
    """Side of the random square, at full resolution, that the feature network gets; null gives it the complete image."""

    def __post_init__(self) -> None:
        check_weight("ProjectedAdversarial", fraction=self.fraction, max_weight=self.max_weight)
        if self.r1_weight is not None:
            check_weight("ProjectedAdversarial", r1_weight=self.r1_weight)
        if not 0 <= self.l1_only_share < 1:
            raise ValueError(f"adversarial.l1_only_share must be in [0, 1), got {self.l1_only_share}.")
        if self.crop_px is not None and self.crop_px < 1:
            raise ValueError(f"adversarial.crop_px must be 1 or more, or null, got {self.crop_px}.")

    def starts_at(self, max_updates: int) -> int:
        """The decoder update, counted from 0, that is the first with the GAN."""
        return round(self.l1_only_share * max_updates)

    def weight(self, reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
        """`adaptive_weight` with these settings."""
        return adaptive_weight(reconstruction_gradient, adversarial_gradient, self.fraction, self.max_weight)
