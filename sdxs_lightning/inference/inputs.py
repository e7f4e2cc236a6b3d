"""Checks and converts what a caller gives: prompts, seeds, sizes, images."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.image_formats import as_rgb

Images = Sequence[Any] | Tensor | np.ndarray[Any, Any] | Image.Image
"""One image or several: PIL, uint8 arrays (H, W, 3), or a uint8 tensor (B, 3, H, W)."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Of networks, by the names of command lines."""
SEEDS = -(2**63), 2**64 - 1
"""What torch.Generator takes."""


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its short name.

    Raises:
        UserError: for another name, or a dtype in which networks do not run.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in (*DTYPES.values(), torch.float64):
        raise UserError(f"`dtype` is '{dtype}', but must be one of {', '.join(DTYPES)}.")
    return found


def prompt_list(prompts: str | Iterable[str], name: str = "prompts") -> list[str]:
    """One prompt or several as a list; `name` is for messages.

    Raises:
        UserError: without any, or for one that is no text, such as bytes of a command line that are no UTF-8.
    """
    listed = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
    if not listed:
        raise UserError("there is no prompt; give at least one.")
    for i, prompt in enumerate(listed):
        if not isinstance(prompt, str):
            raise UserError(f"`{name}`[{i}] is a {type(prompt).__name__}, expected text.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"`{name}`[{i}] is '{prompt}', which is no text in UTF-8.") from error
    return listed


def finite(value: float, name: str) -> float:
    """A number, such as a scale.

    Raises:
        UserError: for NaN and infinity, of which nothing but black images would come, and for what is no number.
    """
    if not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"`{name}` is {value!r}, but must be a finite number.")
    return float(value)


def image_size(size: int | Sequence[int] | None, trained: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width of the output, pixels.

    Args:
        size: as given: a side, (height, width), or None for the trained size.
        trained: the trained size.
        multiple: of which both must be multiples.

    Raises:
        UserError: for a size that the model cannot draw.
    """
    if size is None:
        return trained
    try:
        sides = [operator.index(side) for side in (size if isinstance(size, Sequence) else (size, size))]
        height, width = sides
    except (TypeError, ValueError) as error:
        raise UserError(f"`size` is {size!r}, but must be a side in pixels, or (height, width).") from error
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise UserError(
            f"`size` is {height}x{width}, but height and width must be multiples of {multiple}; the nearest is "
            f"{_nearest(height, multiple)}x{_nearest(width, multiple)}, and the model was trained at "
            f"{trained[0]}x{trained[1]}."
        )
    return height, width


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


def seed_list(seeds: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per prompt; one number counts on from there, None from 0.

    Raises:
        UserError: unless there are as many seeds as prompts, and all are integers of torch's range.
    """
    listed: Sequence[Any] = range(count)
    if isinstance(seeds, Sequence | Tensor | np.ndarray):
        listed = list(seeds)
        if len(listed) != count:
            raise UserError(f"there are {len(listed)} seeds for {count} prompt(s); give one for each.")
    elif seeds is not None:
        first = _seed(seeds)
        listed = range(first, first + count)
    return [_seed(seed) for seed in listed]


def _seed(value: Any) -> int:
    try:
        seed = operator.index(value)
    except TypeError as error:
        raise UserError(f"`seeds` has {value!r}, but a seed is an integer.") from error
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise UserError(f"`seeds` has {seed}, and torch takes those from -2**63 to 2**64 - 1.")
    return seed


def image_tensor(images: Images, count: int, size: tuple[int, int], what: str) -> Tensor:
    """Images as (B, 3, H, W) uint8 on the CPU, of one for each prompt; a single one is used for all.

    Args:
        images: as given.
        count: number of prompts.
        size: height and width that they must have.
        what: "image" or "control_images", for messages.

    Raises:
        UserError: for another number, size, dtype or number of channels.
    """
    several = isinstance(images, Sequence) or (isinstance(images, Tensor | np.ndarray) and images.ndim > 3)
    listed: Sequence[Any] = list(images) if several else [images]  # type: ignore[arg-type]
    frames = [_frame(one, i, what) for i, one in enumerate(listed)]
    if len(frames) not in (1, count):
        raise UserError(
            f"{what} has {len(frames)} image(s) for {count} prompt(s); give one for each, or one for all."
        )
    for i, frame in enumerate(frames):
        if tuple(frame.shape[1:]) != size:
            raise UserError(
                f"{what}[{i}] is {frame.shape[1]}x{frame.shape[2]}, and the output {size[0]}x{size[1]} (height x width); "
                "resize it, or give its size as `size`."
            )
    return torch.stack(frames * (count if len(frames) == 1 else 1))


def _frame(image: Any, index: int, what: str) -> Tensor:
    """One image as (3, H, W) uint8."""
    if isinstance(image, Image.Image):
        try:
            return torch.from_numpy(np.array(as_rgb(ImageOps.exif_transpose(image)))).permute(2, 0, 1)
        except ValueError as error:
            raise UserError(f"{what}[{index}]: {error}.") from error
    if isinstance(image, Tensor):
        frame, channels = image.cpu(), 0
    else:
        array = np.asarray(image)
        if array.ndim != 3 or array.dtype == object:
            raise UserError(
                f"{what}[{index}] is {array.dtype} of shape {array.shape}, expected uint8 (height, width, 3)."
            )
        frame, channels = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1), 2
    if frame.ndim != 3 or frame.shape[0] != 3 or frame.dtype != torch.uint8:
        expected = "(3, height, width)" if channels == 0 else "(height, width, 3)"
        given = tuple(image.shape)
        raise UserError(f"{what}[{index}] is {frame.dtype} of shape {given}, expected uint8 {expected}.")
    return frame


def noise_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator on the CPU for each image, as `generator=[torch.Generator().manual_seed(seed), ...]` of a pipeline.

    An image so depends on its own seed only, and is the same on any device.
    """
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(
    generators: Sequence[torch.Generator], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """N(0, 1), (B, *shape), the next numbers of each generator; equals diffusers' randn_tensor."""
    drawn = torch.cat([torch.randn((1, *shape), generator=one, dtype=dtype) for one in generators])
    return to_device(drawn, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to a device; to a GPU without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
