"""The tiny decoder's losses: L1 on averaged images, a full-resolution distance, and the weight of the projected GAN.

The target is the base decoder's image of the same latents, or the image that the latents were encoded from.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import avg_pool2d

from sdxs_lightning.objectives.checks import check_same_shape, check_weight


def averaged_l1(images: Tensor, target: Tensor, factor: int) -> Tensor:
    """Mean |images - target| after averaging both over squares of factor x factor pixels.

    Detail within a square is left to the GAN: L1 at full resolution would blur what the latents do not determine. Averaging
    downsamples without aliasing; with the VAE's factor each latent has one square.

    Args:
        images: (B, 3, H, W), float, H and W multiples of factor.
        target: same shape; gets no gradient.
        factor: side of a square; 1 compares single pixels.

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
    # Averaging is linear, so the difference is averaged once.
    difference = images.float() - target.detach().float()
    return avg_pool2d(difference, factor).abs().mean()


def pixel_mse(images: Tensor, target: Tensor) -> Tensor:
    """Mean of (images - target)^2, which PSNR measures.

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
    """Weight with which the GAN's gradient has `fraction` times the 2-norm of the reconstruction's.

    Args:
        reconstruction_gradient: any shape, at the decoder's last layer.
        adversarial_gradient: same shape and layer.
        fraction: ratio of the weighted GAN gradient's norm to the reconstruction's.
        maximum: upper bound of the weight.

    Returns:
        (), float32, detached.

    Source: VQGAN, arXiv:2012.09841, eq. 7, there with fraction 0.8 and maximum 1e4.
    """
    wanted = fraction * reconstruction_gradient.detach().float().norm()
    weight = wanted / adversarial_gradient.detach().float().norm().clamp_min(1e-12)
    bounded: Tensor = weight.clamp(max=maximum)
    return bounded


@dataclass(frozen=True)
class Reconstruction:
    """Settings of the reconstruction loss."""

    weight: float = 1.0
    """Weight of the averaged L1."""
    factor: int | None = None
    """Side of the averaged squares; null takes the VAE's factor, 8 for SD and SDXL."""
    full_resolution_weight: float | None = None
    """Weight of the full-resolution distance; null disables it, as in SDXS. Raises PSNR, but blurs detail."""
    full_resolution_distance: Literal["l1", "mse"] = "l1"
    """Full-resolution distance: mean |d|, or mean d^2, which PSNR measures."""

    def __post_init__(self) -> None:
        check_weight("Reconstruction", weight=self.weight)
        if self.full_resolution_weight is not None:
            check_weight("Reconstruction", full_resolution_weight=self.full_resolution_weight)
        if self.factor is not None and self.factor < 1:
            raise ValueError(f"reconstruction.factor must be 1 or more, or null, got {self.factor}.")

    def loss(self, images: Tensor, target: Tensor, vae_factor: int) -> Tensor:
        """Weighted `averaged_l1`, plus the full-resolution distance if enabled: (), float32."""
        loss = self.weight * averaged_l1(images, target, self.factor or vae_factor)
        if self.full_resolution_weight is not None:
            squared = self.full_resolution_distance == "mse"
            pixels = pixel_mse(images, target) if squared else averaged_l1(images, target, 1)
            loss = loss + self.full_resolution_weight * pixels
        return loss


@dataclass(frozen=True)
class ProjectedAdversarial:
    """Settings of the projected GAN of the decoder."""

    fraction: float = 0.5
    """Norm of the weighted GAN gradient relative to the reconstruction's, at the decoder's last layer."""
    max_weight: float = 1e4
    """Upper bound of the resulting weight; VQGAN's."""
    l1_only_share: float = 0.1
    """Share of the run's updates before the GAN starts, trained on the reconstruction alone."""
    r1_weight: float | None = 1e-5
    """Weight of the R1 penalty on the heads' inputs; ADD's 1e-5. Null disables it."""
    crop_px: int | None = None
    """Side of the random full-resolution crop given to the feature network; null gives the complete image."""

    def __post_init__(self) -> None:
        check_weight("ProjectedAdversarial", fraction=self.fraction, max_weight=self.max_weight)
        if self.r1_weight is not None:
            check_weight("ProjectedAdversarial", r1_weight=self.r1_weight)
        if not 0 <= self.l1_only_share < 1:
            raise ValueError(f"adversarial.l1_only_share must be in [0, 1), got {self.l1_only_share}.")
        if self.crop_px is not None and self.crop_px < 1:
            raise ValueError(f"adversarial.crop_px must be 1 or more, or null, got {self.crop_px}.")

    def starts_at(self, max_updates: int) -> int:
        """First decoder update, counted from 0, with the GAN."""
        return round(self.l1_only_share * max_updates)

    def weight(self, reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
        """`adaptive_weight` with these settings."""
        return adaptive_weight(reconstruction_gradient, adversarial_gradient, self.fraction, self.max_weight)
