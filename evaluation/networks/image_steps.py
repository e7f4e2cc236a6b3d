"""Image processing before a metric network, written as words that stand in a protocol and in its hash.

A step is one of

    crop                  the centred square of the shorter side, as torchvision's center_crop rounds it
    crop PX               the centred PX x PX; an image that is smaller on one side stays as it is, as in DMD2's patch FID
    resize PX FILTER      to PX x PX with Pillow's filter of that name, on bytes; an image that is not square is squashed
    jpeg QUALITY          written as JPEG by Pillow and read again

They work on bytes with Pillow, because that is what the protocols' own scripts did: a resize in float or on another library
moves FID by more than its third digit.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from PIL import Image

Step = Callable[[Image.Image], Image.Image]


def centre(image: Image.Image, side_px: int) -> Image.Image:
    """The centred side_px x side_px; an image that is smaller on one side as it is."""
    if min(image.size) < side_px:
        return image
    left, top = (round((length - side_px) / 2) for length in image.size)
    return image.crop((left, top, left + side_px, top + side_px))


def resized(image: Image.Image, side_px: int, filter_name: str) -> Image.Image:
    """To side_px x side_px; an image of that size stays as it is."""
    if image.size == (side_px, side_px):
        return image
    return image.resize((side_px, side_px), Image.Resampling[filter_name.upper()])


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Through a JPEG file in memory, with Pillow's other defaults (4:2:0)."""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    with Image.open(file) as opened:
        return opened.convert("RGB")


def parse_step(text: str) -> Step:
    """The function that a step's words name.

    Raises:
        ValueError: for other words.
    """
    match text.split():
        case ["crop"]:
            return lambda image: centre(image, min(image.size))
        case ["crop", side] if side.isdigit():
            return lambda image: centre(image, int(side))
        case ["resize", side, name] if side.isdigit() and name.upper() in Image.Resampling.__members__:
            return lambda image: resized(image, int(side), name)
        case ["jpeg", quality] if quality.isdigit() and 1 <= int(quality) <= 100:
            return lambda image: as_jpeg(image, int(quality))
    raise ValueError(
        f"no image step '{text}'; there are 'crop', 'crop PX', 'resize PX FILTER' and 'jpeg QUALITY'; see "
        "evaluation/image_steps.py"
    )


def apply_steps(image: Image.Image, steps: Sequence[str]) -> Image.Image:
    """All steps in their order; without any the image itself."""
    for step in steps:
        image = parse_step(step)(image)
    return image


def still_to_do(steps: Sequence[str], from_jpeg: bool, size: tuple[int, int]) -> Sequence[str]:
    """What is left for an image that was read from a file.

    A protocol that stores its images as JPEG finds its own files again: the first JPEG step has been taken, and an image of
    the last size has been through all of them.

    Args:
        steps: of the protocol.
        from_jpeg: whether the file is a JPEG.
        size: width and height of the image in it.
    """
    if not from_jpeg or not steps or not steps[0].startswith("jpeg"):
        return steps
    sides = [int(step.split()[1]) for step in steps if step.startswith("resize")]
    return () if sides and size == (sides[-1], sides[-1]) else steps[1:]
