"""One sample on its way from picture to latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from data.prepare.common.geometry import Size, fill
from data.prepare.common.raw_shards import RawSample
from data.prepare.common.shard_files import LeftOut, Prepared
from data.prepare.common.sizes import size_fields
from data.prepare.images.image_files import UnreadableImageError, open_picture, write_picture
from data.prepare.images.source_sample import SampleFaultError
from data.prepare.images.sources import from_members
from data.prepare.latents.member import latent_member
from data.prepare.latents.settings import StoredDtype
from data.shards.buckets import nearest_bucket
from data.shards.decoders import LATENT_MEMBER


@dataclass(frozen=True)
class Fitted:
    """A sample that is ready for the VAE."""

    key: str
    where: str
    image: Image.Image
    """RGB, of one of the set's sizes."""
    members: Mapping[str, bytes | str]
    """Caption, and condition image if there is one."""
    fields: Mapping[str, Any]
    """Of the json member."""


def fit_sample(sample: RawSample, sizes: Sequence[Size]) -> Fitted | LeftOut:
    """Decodes a sample, resizes its picture and cuts out the middle.

    Args:
        sample: of a shard of images.
        sizes: of the set.
    """
    try:
        found = from_members(sample)
        image = open_picture(found.image).image
        size = (image.height, image.width)
        fit = fill(size, sizes[int(nearest_bucket(np.array([size]), sizes)[0])])
        control = None if found.control is None else open_picture(found.control).image
        if control is not None and (control.height, control.width) != size:
            raise SampleFaultError(
                f"the condition image is {control.width}x{control.height} and its picture {size[1]}x{size[0]}"
            )
    except (SampleFaultError, UnreadableImageError) as error:
        return LeftOut(sample.key, "unreadable", f"{sample.where}: {error}")
    members: dict[str, bytes | str] = {"txt": found.caption if isinstance(found.caption, str) else ""}
    if control is not None:
        members["cond.png"] = write_picture(fit.apply(control), "png", 100)
    fields = {**found.fields, **size_fields(found.fields, size, fit)}
    return Fitted(sample.key, sample.where, fit.apply(image), members, fields)


def pack(sample: Fitted, mean: Tensor, logvar: Tensor | None, dtype: StoredDtype) -> Prepared:
    """The sample of the new shard.

    Args:
        sample: whose picture was encoded.
        mean: (C, h, w), float32, unscaled.
        logvar: the same shape, or None where it is not stored.
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
    return Prepared(sample.key, {LATENT_MEMBER: content, **sample.members}, sample.fields, sums)
