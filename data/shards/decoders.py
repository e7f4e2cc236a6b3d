"""What the reader decodes, and nothing else: images, text, JSON, tensors in safetensors.

A shard from elsewhere is untrusted input. Formats that can carry code (pickle, .pth, .npy with objects) have
no decoder here, so a member of that kind is never opened.
"""

import io
import json
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

LATENT_MEMBER = "latent.safetensors"
LATENT_TENSOR = "latents"
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
CONTROL_IMAGE_MEMBERS = ("cond.png", "cond.jpg", "cond.jpeg", "cond.webp")
CAPTION_MEMBERS = ("txt", "text", "caption")
JSON_MEMBER = "json"
READABLE = (*IMAGE_MEMBERS, *CAPTION_MEMBERS, JSON_MEMBER, *CONTROL_IMAGE_MEMBERS, LATENT_MEMBER)


class BadSampleError(ValueError):
    """A member that does not hold what its name says; the message names shard and key."""


def decode(extension: str, content: bytes, where: str) -> Any:
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
        return np.asarray(decode_image(content, where))
    if extension == JSON_MEMBER:
        return decode_json(content, where)
    raise BadSampleError(
        f"{where}: members of the kind '{extension}' are not read; there are decoders for "
        f"{', '.join(READABLE)} (data/shards/decoders.py), and none for a format that can carry code."
    )


def decode_latents(content: bytes, where: str) -> NDArray[np.generic]:
    """The tensor "latents" of a safetensors file, (4, h, w), in the dtype it was stored in."""
    try:
        latents: NDArray[np.generic] = safetensors.numpy.load(content)[LATENT_TENSOR]
    except (
        Exception
    ) as error:  # the package raises its own type, KeyError, and TypeError for a dtype of torch only
        raise BadSampleError(
            f"{where}: {LATENT_MEMBER} does not hold a float16 or float32 tensor named '{LATENT_TENSOR}' "
            f"({error})."
        ) from error
    if latents.ndim != 3 or latents.dtype.kind != "f":
        raise BadSampleError(
            f"{where}: latents of one sample are floating point (4, h, w), but these are {latents.dtype} "
            f"{latents.shape}."
        )
    return latents


def decode_text(content: bytes, where: str) -> str:
    """UTF-8 text without surrounding white space."""
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError(
            f"{where}: the caption is not UTF-8 ({error.reason} at byte {error.start})."
        ) from error


def decode_json(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise BadSampleError(f"{where}: the json member cannot be parsed ({error}).") from error
    if not isinstance(value, dict):
        raise BadSampleError(
            f"{where}: the json member holds a {type(value).__name__}, but an object is needed."
        )
    return value


def decode_image(content: bytes, where: str) -> Image.Image:
    """An RGB image, decoded to its last row; transparency is laid over white."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()  # a JPEG that was cut short fails here rather than giving a grey lower half
            image: Image.Image = opened
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSampleError(f"{where}: the image cannot be decoded ({error}).") from error
