"""The scale of latents, and the conversion between images and bytes."""

import torch
from torch import Tensor


def scale(latents: Tensor, scaling_factor: float, shift_factor: float | None = None) -> Tensor:
    """VAE encoder output -> U-Net input: (latents - shift_factor) * scaling_factor.

    Args:
        latents: (B, C, h, w), float, as the VAE's encoder outputs them and as shards store them.
        scaling_factor: `scaling_factor` of the VAE's config; 0.18215 for SD, 0.13025 for SDXL.
        shift_factor: `shift_factor` of the VAE's config; None (every SD and SDXL) means 0.

    Returns:
        (B, C, h, w), float32, of about unit variance.
    """
    return (latents.float() - (shift_factor or 0.0)) * scaling_factor


def unscale(latents: Tensor, scaling_factor: float, shift_factor: float | None = None) -> Tensor:
    """U-Net output -> VAE decoder input: the inverse of `scale`, with the same arguments."""
    return latents.float() / scaling_factor + (shift_factor or 0.0)


def to_uint8(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> bytes: clamped, then rounded to the nearest byte.

    Truncation instead of rounding shifts every image by half a byte, which changes FID; so there is one rule.

    Args:
        images: (B, 3, H, W), float; values outside [-1, 1] are clamped.

    Returns:
        (B, 3, H, W), uint8, same device.

    Raises:
        ValueError: for integer images, which have been through here already.

    Source: equals VaeImageProcessor.postprocess of diffusers for float32 images.
    """
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes float images in [-1, 1], got {images.dtype}.")
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def from_uint8(images_uint8: Tensor) -> Tensor:
    """Bytes -> pixels in [-1, 1], float32; `to_uint8` gives the same bytes back.

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
