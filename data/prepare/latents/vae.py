"""The VAE that encodes a set of latents: found, checked, and called on batches of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.prepare.latents.options import VaeDtype
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.hub_ids import is_hub_id
from sdxs_lightning.core.latents import from_uint8
from sdxs_lightning.families import Family, hub
from sdxs_lightning.families.folders import kl_folder, latent_scale, read_json, vae_class, vae_factor
from sdxs_lightning.families.weights import load_network


class Posterior(NamedTuple):
    """Mean and logarithm of the variance of a batch: (B, C, h, w), float32, on the CPU, unscaled."""

    mean: Tensor
    logvar: Tensor


class VaeEncoder:
    """A VAE's encoder.

    Args:
        folder: of the VAE.
        dtype: of its weights and computations.
        device: where it runs.
    """

    def __init__(self, folder: Path, dtype: VaeDtype, device: torch.device) -> None:
        from diffusers import AutoencoderKL

        self._device, self._dtype = device, getattr(torch, dtype)
        self._vae = load_network(AutoencoderKL, folder, self._dtype).to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Posterior:
        """Encodes RGB images of one size."""
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        # Without TensorFloat-32, which keeps 10 of float32's 23 bits, and with kernels that give the same bits each time.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            posterior = self._vae.encode(from_uint8(pixels).to(self._device, self._dtype)).latent_dist
        return Posterior(posterior.mean.float().cpu(), posterior.logvar.float().cpu())


def find_vae(family: Family, named: str | None) -> Path:
    """The folder of the VAE that encodes: the base's, or another one with the same latents.

    Args:
        family: the base.
        named: VAE folder, pipeline folder or hub id of either; None takes the base's.

    Raises:
        UserError: for one that does not exist, or whose latents are not those of the base's U-Net.
    """
    from diffusers import AutoencoderKL

    try:
        folder = kl_folder(family.folder) if named is None else _folder(named)
        if folder is None:
            raise FileNotFoundError(f"'{family.base}' has no AutoencoderKL; give one with --vae.")
        if vae_class(folder) is not AutoencoderKL:
            raise ValueError(f"'{folder}' holds no AutoencoderKL.")
    except (OSError, ValueError) as error:
        raise UserError(f"--vae: {error}" if named else f"--model: {error}") from error
    config = read_json(folder / "config.json")
    channels = config.get("latent_channels", 4)
    try:
        scaling_factor, shift_factor = latent_scale(folder, family.scaling_factor)
    except ValueError as error:
        raise UserError(f"--vae: {error}" if named else f"--model: {error}") from error
    expected = family.unet_config["in_channels"]
    same_scale = math.isclose(scaling_factor, family.scaling_factor, abs_tol=1e-6) and math.isclose(
        shift_factor, family.shift_factor, abs_tol=1e-6
    )
    if channels != expected or not same_scale:
        raise UserError(
            f"--vae '{folder}' gives {channels} channels (scaling_factor {scaling_factor}, shift_factor {shift_factor}), and "
            f"the U-Net of '{family.base}' reads {expected} (scaling_factor {family.scaling_factor}, shift_factor "
            f"{family.shift_factor}); they do not belong together."
        )
    return folder


def check_dtype(folder: Path, dtype: VaeDtype) -> None:
    """Refuses float16 for a VAE whose config says that it overflows.

    Raises:
        UserError: naming the alternatives.
    """
    if dtype == "float16" and read_json(folder / "config.json").get("force_upcast", False):
        raise UserError(
            f"--vae_dtype float16: the VAE in '{folder}' overflows in float16 (force_upcast in its config); give float32 or "
            "bfloat16, or with --vae one that was made for float16, such as madebyollin/sdxl-vae-fp16-fix."
        )


def pixels_per_latent(folder: Path) -> int:
    """Pixels of a side per latent."""
    return vae_factor(read_json(folder / "config.json"))


def _folder(named: str) -> Path:
    path = Path(named)
    if not path.exists() and is_hub_id(named):
        try:
            return hub.fetch(named, "vae/config.json", ("vae",)) / "vae"
        except FileNotFoundError:
            return hub.fetch(named, "config.json", ("",))
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"'{named}' is neither a VAE folder (config.json) nor a pipeline folder (vae/).")
