"""Decoders of members: images, text, JSON, safetensors.

Shards are untrusted input. Formats that can execute code (pickle, .pth, .npy with objects) have no decoder and are never
opened.
"""

import json
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.shards.images import Bytes, UndecodableImageError, decode_deep_grey, decode_pixels
from sdxs_lightning.core.errors import OneLineError
from sdxs_lightning.core.unique_keys import unique_keys

LATENT_MEMBER = "latent.safetensors"
LATENT_TENSOR = "latents"
LOGVAR_TENSOR = "logvar"
"""Optional tensor beside the mean: latents sampled from the VAE's posterior are mean + exp(logvar / 2) * noise."""
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
CONTROL_IMAGE_MEMBERS = ("cond.png", "cond.jpg", "cond.jpeg", "cond.webp")
CAPTION_MEMBERS = ("txt", "text", "caption")
JSON_MEMBER = "json"
READABLE = (*IMAGE_MEMBERS, *CAPTION_MEMBERS, JSON_MEMBER, *CONTROL_IMAGE_MEMBERS, LATENT_MEMBER)

MAX_TEXT_BYTES = 1 << 20
"""Maximum size of a caption or a json member."""

_MAX_HEADER_BYTES = 1 << 20
_MAX_SIDE = 1 << 16
_MAX_NESTING = 64
_LARGEST_LATENT = 65504.0
"""Maximum of float16, the dtype in which latents are written."""


class BadSampleError(OneLineError, ValueError):
    """Raised for an invalid member; the message names shard and key."""


def decode(extension: str, content: Bytes, where: str) -> Any:
    """Decode one member.

    Args:
        extension: extension of the member, lower case.
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
    """A tensor of a safetensors file, (4, h, w), in its stored dtype; a view of `content`.

    Parsed here rather than by the safetensors package, which copies a tensor three times and parses each header again;
    all headers of a data set are equal.
    """
    try:
        layout, data = _latent_layout(_header(content), tensor), content[8 + _header_length(content) :]
        if layout.size != len(data):
            raise ValueError(f"its header states {layout.size} bytes of data, and it has {len(data)}")
        latents: NDArray[np.generic] = np.frombuffer(data[layout.begin : layout.end], layout.dtype).reshape(
            layout.shape
        )
    except _HEADER_ERRORS as error:
        raise BadSampleError(
            f"{where}: {LATENT_MEMBER} does not hold a complete float16 or float32 tensor named '{tensor}' "
            f"({_short(error)})."
        ) from error
    # Only infinity and NaN have all exponent bits set. Six times as fast as isfinite for float16.
    bits: NDArray[Any] = latents.view(np.int16 if latents.itemsize == 2 else np.int32)
    exponent = 0x7C00 if latents.itemsize == 2 else 0x7F800000
    if ((bits & exponent) == exponent).any():
        raise BadSampleError(f"{where}: {LATENT_MEMBER} holds NaN or infinity.")
    if latents.itemsize == 4 and float(np.abs(latents).max()) > _LARGEST_LATENT:
        raise BadSampleError(f"{where}: {LATENT_MEMBER} holds values beyond {_LARGEST_LATENT:g}.")
    return latents


class _Layout(NamedTuple):
    """Location of a tensor in a safetensors file."""

    dtype: np.dtype[Any]
    shape: tuple[int, int, int]
    begin: int
    end: int
    size: int
    """Bytes of all tensors."""


_HEADER_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def _header_length(content: Bytes) -> int:
    return int.from_bytes(content[:8], "little")


def _header(content: Bytes) -> bytes:
    length = _header_length(content)
    if len(content) < 8 or length > min(_MAX_HEADER_BYTES, len(content) - 8):
        raise ValueError(f"its header states {length} bytes of {len(content)} in all")
    return bytes(content[8 : 8 + length])


@lru_cache(maxsize=64)
def _latent_layout(header: bytes, tensor: str) -> _Layout:
    """Layout of a tensor from the JSON header of a safetensors file."""
    entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique_keys)
    entry = entries[tensor]
    # As the format demands, and the safetensors package checks: each byte is of one tensor.
    size = 0
    for begin, end in sorted(one["data_offsets"] for name, one in entries.items() if name != "__metadata__"):
        if begin != size or end < begin:
            raise ValueError(f"the data_offsets of its tensors leave a gap or overlap at byte {size}")
        size = end
    if entry["dtype"] not in ("F16", "F32"):
        raise ValueError(f"its dtype is {entry['dtype']!r}")
    dtype = np.dtype("<f2" if entry["dtype"] == "F16" else "<f4")
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, end]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("its shape or data_offsets are no positive integers")
    if len(shape) != 3 or not all(1 <= side <= _MAX_SIDE for side in shape):
        raise ValueError(f"latents of one sample are (4, h, w), but these are {tuple(shape)}")
    if end - begin != dtype.itemsize * shape[0] * shape[1] * shape[2]:
        raise ValueError(
            f"its shape {tuple(shape)} does not take the {end - begin} bytes of its data_offsets"
        )
    return _Layout(dtype, (shape[0], shape[1], shape[2]), begin, end, size)


def latent_shape(content: Bytes, where: str) -> tuple[int, int, int]:
    """The shape of latents, from the header alone.

    Args:
        content: the beginning of the file, or all of it.
        where: shard and key, for messages.

    Raises:
        BadSampleError: as `decode_latents`.
    """
    try:
        return _latent_layout(_header(content), LATENT_TENSOR).shape
    except _HEADER_ERRORS as error:
        raise BadSampleError(
            f"{where}: {LATENT_MEMBER} has no header of latents ({_short(error)})."
        ) from error


def decode_text(content: Bytes, where: str) -> str:
    """Decode UTF-8 text, stripped of white space and byte-order mark."""
    _check_length(content, where)
    try:
        text = str(content, "utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError(
            f"{where}: the caption is not UTF-8 ({error.reason} at byte {error.start})."
        ) from error
    if "\0" in text:
        raise BadSampleError(f"{where}: the caption holds zero bytes, which a damaged file does and no text.")
    return text


def decode_json(content: Bytes, where: str) -> dict[str, Any]:
    """Decode a JSON object with unique keys, valid Unicode strings and a nesting depth of at most 64."""
    _check_length(content, where)
    try:
        value = json.loads(str(content, "utf-8-sig"), object_pairs_hook=unique_keys)
        _check_json(value)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"{where}: the json member cannot be parsed ({_short(error)}).") from error
    if not isinstance(value, dict):
        raise BadSampleError(
            f"{where}: the json member holds a {type(value).__name__}, but an object is needed."
        )
    return value


def _check_json(value: Any) -> None:
    """Refuse lone surrogates in strings, and nesting so deep that recursive code may fail.

    JSON can escape half of a surrogate pair, which tokenizers, tables and UTF-8 do not accept.
    """
    level = [value]
    for _ in range(_MAX_NESTING):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, str):
                try:
                    one.encode()
                except UnicodeEncodeError:
                    raise ValueError(
                        "a string holds half of a surrogate pair, which is no character"
                    ) from None
            elif isinstance(one, dict):
                inner += one
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {_MAX_NESTING} deep")


def _short(error: Exception) -> str:
    """The text of an error in one short line, since it may quote the file's content."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
    return text if len(text) <= 200 else text[:200] + "..."


def _check_length(content: Bytes, where: str) -> None:
    if len(content) > MAX_TEXT_BYTES:
        raise BadSampleError(
            f"{where}: a text member has {len(content):,} bytes, more than {MAX_TEXT_BYTES:,} (MAX_TEXT_BYTES in "
            "data/shards/decoders.py)."
        )


def decode_array(content: Bytes, where: str, deep: bool = False) -> NDArray[Any]:
    """Decode an image to (H, W, 3) uint8 with the fastest available decoder; with `deep`, 16-bit grey to uint16."""
    try:
        found = decode_deep_grey(content) if deep else None
        return decode_pixels(content) if found is None else found
    except UndecodableImageError as error:
        raise BadSampleError(f"{where}: the image cannot be decoded ({_short(error)}).") from error
