"""What the reader decodes, and nothing else: images, text, JSON, tensors in safetensors.

A shard from elsewhere is untrusted input. Formats that can carry code (pickle, .pth, .npy with objects) have
no decoder here, so a member of that kind is never opened.
"""

import json
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.shards.images import UndecodableImageError, decode_pil, decode_pixels

Bytes = bytes | memoryview

LATENT_MEMBER = "latent.safetensors"
LATENT_TENSOR = "latents"
LOGVAR_TENSOR = "logvar"
"""Beside the mean, where it was stored: latents drawn from the VAE's posterior are mean + exp(logvar / 2) * noise."""
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
CONTROL_IMAGE_MEMBERS = ("cond.png", "cond.jpg", "cond.jpeg", "cond.webp")
CAPTION_MEMBERS = ("txt", "text", "caption")
JSON_MEMBER = "json"
READABLE = (*IMAGE_MEMBERS, *CAPTION_MEMBERS, JSON_MEMBER, *CONTROL_IMAGE_MEMBERS, LATENT_MEMBER)

MAX_TEXT_BYTES = 1 << 20
"""Of a caption or a json member; one of more is no caption."""


class BadSampleError(ValueError):
    """A member that does not hold what its name says; the message names shard and key."""


def decode(extension: str, content: Bytes, where: str) -> Any:
    """Decode one member.

    Args:
        extension: what follows the key in the member's name, lower case.
        content: its bytes.
        where: shard and key, for the message.

    Returns:
        images: uint8 (H, W, 3); text: str; JSON: its object; latents: floating (4, h, w).

    Raises:
        BadSampleError: if the content cannot be decoded, or if there is no decoder for the extension.
    """
    if extension == LATENT_MEMBER:
        return decode_latents(content, where)
    if extension in CAPTION_MEMBERS:
        return decode_text(content, where)
    if extension in IMAGE_MEMBERS or extension in CONTROL_IMAGE_MEMBERS:
        return decode_array(content, where)
    if extension == JSON_MEMBER:
        return decode_json(content, where)
    raise BadSampleError(
        f"{where}: members of the kind '{extension}' are not read; there are decoders for "
        f"{', '.join(READABLE)} (data/shards/decoders.py), and none for a format that can carry code."
    )


def decode_latents(content: Bytes, where: str, tensor: str = LATENT_TENSOR) -> NDArray[np.generic]:
    """A tensor of a safetensors file, (4, h, w), in the dtype it was stored in; a view of `content`.

    Read by the format's own description rather than by the safetensors package, which copies a tensor three times and
    parses each header anew; the headers of a data set are all the same.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        dtype, shape, begin, end = _latent_layout(bytes(content[8 : 8 + length]), tensor)
        latents: NDArray[np.generic] = np.frombuffer(content[8 + length :][begin:end], dtype).reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BadSampleError(
            f"{where}: {LATENT_MEMBER} does not hold a whole float16 or float32 tensor named '{tensor}' "
            f"({error})."
        ) from error
    if latents.ndim != 3:
        raise BadSampleError(f"{where}: latents of one sample are (4, h, w), but these are {latents.shape}.")
    # All bits of the exponent are set in infinity and NaN alone. Six times as fast as isfinite of float16.
    bits: NDArray[Any] = latents.view(np.int16 if latents.itemsize == 2 else np.int32)
    exponent = 0x7C00 if latents.itemsize == 2 else 0x7F800000
    if ((bits & exponent) == exponent).any():
        raise BadSampleError(f"{where}: {LATENT_MEMBER} holds NaN or infinity.")
    return latents


@lru_cache(maxsize=64)
def _latent_layout(header: bytes, tensor: str) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Dtype, shape, begin and end of a tensor, from the JSON header of a safetensors file."""
    entry = json.loads(header)[tensor]
    if entry["dtype"] not in ("F16", "F32"):
        raise ValueError(f"it is {entry['dtype']}")
    begin, end = entry["data_offsets"]
    return (
        np.dtype(entry["dtype"].replace("F16", "<f2").replace("F32", "<f4")),
        tuple(entry["shape"]),
        begin,
        end,
    )


def latent_size(content: Bytes, where: str) -> tuple[int, int]:
    """Height and width of latents, from the header alone.

    Raises:
        BadSampleError: as `decode_latents`.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        _, (_, height, width), _, _ = _latent_layout(bytes(content[8 : 8 + length]), LATENT_TENSOR)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BadSampleError(f"{where}: {LATENT_MEMBER} has no header of latents ({error}).") from error
    return height, width


def decode_text(content: Bytes, where: str) -> str:
    """UTF-8 text without surrounding white space."""
    _check_length(content, where)
    try:
        return str(content, "utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError(
            f"{where}: the caption is not UTF-8 ({error.reason} at byte {error.start})."
        ) from error


def decode_json(content: Bytes, where: str) -> dict[str, Any]:
    """A JSON object."""
    _check_length(content, where)
    try:
        value = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"{where}: the json member cannot be parsed ({error}).") from error
    if not isinstance(value, dict):
        raise BadSampleError(
            f"{where}: the json member holds a {type(value).__name__}, but an object is needed."
        )
    return value


def _check_length(content: Bytes, where: str) -> None:
    if len(content) > MAX_TEXT_BYTES:
        raise BadSampleError(
            f"{where}: a text member has {len(content):,} bytes, more than {MAX_TEXT_BYTES:,} (MAX_TEXT_BYTES in "
            "data/shards/decoders.py)."
        )


def decode_image(content: Bytes, where: str) -> Image.Image:
    """An RGB image, decoded to its last row; transparency is laid over white."""
    try:
        return decode_pil(content)
    except UndecodableImageError as error:
        raise BadSampleError(f"{where}: the image cannot be decoded ({error}).") from error


def decode_array(content: Bytes, where: str) -> NDArray[np.uint8]:
    """As `decode_image`, as (H, W, 3) uint8 and by the fastest decoder."""
    try:
        return decode_pixels(content)
    except UndecodableImageError as error:
        raise BadSampleError(f"{where}: the image cannot be decoded ({error}).") from error
