"""The safetensors member that a sample's latents are stored in."""

from __future__ import annotations

import numpy as np
import safetensors.numpy
from torch import Tensor

from data.prepare.latents.settings import StoredDtype
from data.shards.decoders import LATENT_TENSOR, LOGVAR_TENSOR


def latent_member(mean: Tensor, logvar: Tensor | None, dtype: StoredDtype) -> bytes:
    """The bytes of one sample.

    Args:
        mean: (C, h, w), float32, unscaled.
        logvar: the same shape, or None.
        dtype: of the stored numbers.

    Raises:
        ValueError: for numbers that are not finite in that dtype.
    """
    tensors = {LATENT_TENSOR: mean} | ({} if logvar is None else {LOGVAR_TENSOR: logvar})
    with np.errstate(over="ignore"):  # reported below, as our own sentence
        arrays = {name: np.ascontiguousarray(one.numpy().astype(dtype)) for name, one in tensors.items()}
    if not all(np.isfinite(one).all() for one in arrays.values()):
        raise ValueError(f"the VAE gives latents that are not finite in {dtype}")
    return safetensors.numpy.save(arrays)
