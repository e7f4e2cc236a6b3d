"""Image processing before a metric network, written as strings that enter a protocol and its hash.

A step is one of

    crop                  the centred square of the shorter side, as torchvision's center_crop rounds it
    crop PX               the centred PX x PX; an image with a smaller side is unchanged, as in DMD2's patch FID
    resize PX FILTER      to PX x PX with Pillow's filter of that name, on bytes, ignoring the aspect ratio
    jpeg QUALITY          written as JPEG by Pillow and read again

They use Pillow on 8-bit images, as the protocols' original scripts do: a float resize or another library moves FID by more
than its third digit.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from PIL import Image

Step = Callable[[Image.Image], Image.Image]


def centre(image: Image.Image, side_px: int) -> Image.Image:
    """Crop the centred side_px x side_px; an image with a smaller side is returned unchanged."""
    if min(image.size) < side_px:
        return image
    left, top = (round((length - side_px) / 2) for length in image.size)
    return image.crop((left, top, left + side_px, top + side_px))


def resized(image: Image.Image, side_px: int, filter_name: str) -> Image.Image:
    """Resize to side_px x side_px."""
    if image.size == (side_px, side_px):
        return image
    return image.resize((side_px, side_px), Image.Resampling[filter_name.upper()])


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Encode as JPEG and decode, with Pillow's other defaults (4:2:0)."""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    with Image.open(file, formats=("JPEG",)) as opened:
        return opened.convert("RGB")


def parse_step(text: str) -> Step:
    """The function of a step.

    Raises:
        ValueError: for an unknown step.
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
        "evaluation/networks/image_steps.py"
    )


def apply_steps(image: Image.Image, steps: Sequence[str]) -> Image.Image:
    """Apply the steps in order."""
    for step in steps:
        image = parse_step(step)(image)
    return image


def still_to_do(steps: Sequence[str], from_jpeg: bool, size: tuple[int, int]) -> Sequence[str]:
    """Remaining steps for an image that was read from a file.

    For a protocol with a JPEG step, a JPEG file has passed the first one, and a JPEG of the final size has passed all steps.

    Args:
        steps: steps of the protocol.
        from_jpeg: whether the file is a JPEG.
        size: width and height of the image.
    """
    if not from_jpeg or not steps or not steps[0].startswith("jpeg"):
        return steps
    sides = [int(step.split()[1]) for step in steps if step.startswith("resize")]
    return () if sides and size == (sides[-1], sides[-1]) else steps[1:]
