"""Scaling of latents, and conversion between images and uint8."""

import torch
from torch import Tensor


def scale(latents: Tensor, scaling_factor: float, shift_factor: float | None = None) -> Tensor:
    """Converts VAE encoder output to U-Net input: (latents - shift_factor) * scaling_factor.

    Args:
        latents: (B, C, h, w), float, the VAE encoder's output, as stored in shards.
        scaling_factor: `scaling_factor` of the VAE's config; 0.18215 for SD, 0.13025 for SDXL.
        shift_factor: `shift_factor` of the VAE's config; None (every SD and SDXL) means 0.

    Returns:
        (B, C, h, w), float32, with about unit variance.
    """
    return (latents.float() - (shift_factor or 0.0)) * scaling_factor


def unscale(latents: Tensor, scaling_factor: float, shift_factor: float | None = None) -> Tensor:
    """Converts U-Net output to VAE decoder input; the inverse of `scale`, with the same arguments."""
    return latents.float() / scaling_factor + (shift_factor or 0.0)


def to_uint8(images: Tensor) -> Tensor:
    """Converts pixels in [-1, 1] to uint8: clamped, then rounded to nearest.

    Truncation would shift every image by half a byte, which changes FID, so all code uses this function.

    Args:
        images: (B, 3, H, W), float; values outside [-1, 1] are clamped.

    Returns:
        (B, 3, H, W), uint8, same device.

    Raises:
        ValueError: for integer images, which are already converted.

    Source: equals VaeImageProcessor.postprocess of diffusers for float32 images.
    """
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes float images in [-1, 1], got {images.dtype}.")
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def from_uint8(images_uint8: Tensor) -> Tensor:
    """Converts uint8 to pixels in [-1, 1], float32; `to_uint8` inverts it exactly.

    Args:
        images_uint8: (B, 3, H, W), uint8.

    Returns:
        (B, 3, H, W), float32, same device.

    Raises:
        ValueError: for another dtype.
    """
    if images_uint8.dtype != torch.uint8:
        raise ValueError(f"from_uint8 takes uint8 images, got {images_uint8.dtype}.")
    return images_uint8.float() / 127.5 - 1.0
