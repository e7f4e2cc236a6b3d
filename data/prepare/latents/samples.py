"""One sample from its members to the image that the VAE encodes, and from its latents to the members of the new shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image
from torch import Tensor

from data.prepare.common.geometry import resize_to_cover, size_fields
from data.prepare.common.raw_shards import RawSample
from data.prepare.common.shard_files import UNREADABLE, LeftOutSample, PreparedSample
from data.prepare.images.image_files import UnreadableImageError, encode_image, read_image
from data.prepare.images.sources import SampleFaultError, from_members
from data.prepare.latents.options import StoredDtype
from data.shards.decoders import LATENT_MEMBER, LATENT_TENSOR, LOGVAR_TENSOR
from data.shards.images import MAX_PIXELS
from data.shards.order.buckets import Size, nearest_bucket


@dataclass(frozen=True)
class FittedSample:
    """A sample that is ready for the VAE."""

    key: str
    where: str
    image: Image.Image
    """RGB, of one of the set's sizes."""
    members: Mapping[str, bytes | str]
    """Caption, and condition image if there is one."""
    fields: Mapping[str, Any]
    """Fields of the json member."""


def fit_sample(sample: RawSample, sizes: Sequence[Size]) -> FittedSample | LeftOutSample:
    """Decodes a sample, and resizes and crops its image to the size of the nearest aspect ratio.

    Args:
        sample: of a shard of images.
        sizes: of the set.
    """
    try:
        found = from_members(sample)
        image = read_image(found.image).image
        size = (image.height, image.width)
        step = resize_to_cover(size, sizes[int(nearest_bucket(np.array([size]), sizes)[0])])
        if step.resized[0] * step.resized[1] > MAX_PIXELS:
            raise SampleFaultError(
                f"the image is {size[1]}x{size[0]}, too elongated to be resized to {step.resized[1]}x{step.resized[0]}"
            )
        control = None if found.control is None else read_image(found.control).image
        if control is not None and (control.height, control.width) != size:
            raise SampleFaultError(
                f"the condition image is {control.width}x{control.height} and its image {size[1]}x{size[0]}"
            )
    except (SampleFaultError, UnreadableImageError) as error:
        return LeftOutSample(sample.key, UNREADABLE, f"{sample.where}: {error}")
    members: dict[str, bytes | str] = {"txt": found.caption if isinstance(found.caption, str) else ""}
    if control is not None:
        members["cond.png"] = encode_image(step.apply(control), "png", 100)
    fields = {**found.fields, **size_fields(found.fields, size, step)}
    return FittedSample(sample.key, sample.where, step.apply(image), members, fields)


def pack(sample: FittedSample, mean: Tensor, logvar: Tensor | None, dtype: StoredDtype) -> PreparedSample:
    """The sample of the new shard.

    Args:
        sample: whose image was encoded.
        mean: (C, h, w), float32, unscaled.
        logvar: the same shape, or None if it is not stored.
        dtype: of the stored numbers.

    Raises:
        ValueError: for latents that are not finite in that dtype.
    """
    content = latent_member(mean, logvar, dtype)
    exact = mean.double()
    sums = {
        "values": float(exact.numel()),
        "latents": exact.sum().item(),
        "squares": exact.square().sum().item(),
    }
    return PreparedSample(sample.key, {LATENT_MEMBER: content, **sample.members}, sample.fields, sums)


def latent_member(mean: Tensor, logvar: Tensor | None, dtype: StoredDtype) -> bytes:
    """The safetensors member of one sample's latents; arguments and errors as `pack`."""
    tensors = {LATENT_TENSOR: mean} | ({} if logvar is None else {LOGVAR_TENSOR: logvar})
    with np.errstate(over="ignore"):  # reported below
        arrays = {name: np.ascontiguousarray(one.numpy().astype(dtype)) for name, one in tensors.items()}
    if not all(np.isfinite(one).all() for one in arrays.values()):
        raise ValueError(f"the VAE gives latents that are not finite in {dtype}")
    return safetensors.numpy.save(arrays)
