"""Checks and converts what a caller gives: prompts, seeds, sizes, images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.image_formats import as_rgb

Images = Sequence[Any] | Tensor | np.ndarray[Any, Any] | Image.Image
"""One image or several: PIL, uint8 arrays (H, W, 3), or a uint8 tensor (B, 3, H, W)."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Of networks, by the names of command lines."""


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its short name.

    Raises:
        UserError: for another name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"`dtype` is '{dtype}', but must be one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def image_size(
    size: int | tuple[int, int] | None, trained: tuple[int, int], multiple: int
) -> tuple[int, int]:
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
    height, width = (size, size) if isinstance(size, int) else size
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
        UserError: unless there are as many seeds as prompts.
    """
    if seeds is None or isinstance(seeds, int):
        first = seeds or 0
        return list(range(first, first + count))
    if len(seeds) != count:
        raise UserError(f"there are {len(seeds)} seeds for {count} prompt(s); give one for each.")
    return [int(seed) for seed in seeds]


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
    single = isinstance(images, Image.Image) or (not isinstance(images, Sequence) and images.ndim == 3)
    listed: Sequence[Any] = [images] if single else list(images)  # type: ignore[arg-type]
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
            return torch.from_numpy(np.array(as_rgb(image))).permute(2, 0, 1)
        except ValueError as error:
            raise UserError(f"{what}[{index}]: {error}.") from error
    if isinstance(image, Tensor):
        frame, channels = image.cpu(), 0
    else:
        array = np.asarray(image)
        if array.ndim != 3:
            raise UserError(f"{what}[{index}] has shape {array.shape}, expected (height, width, 3).")
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
