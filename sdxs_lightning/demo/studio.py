"""What the demo's pages call: a student, its base, and the rule that the newest input wins."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from sdxs_lightning.core.errors import UserError, first_line
from sdxs_lightning.core.image_formats import fitted
from sdxs_lightning.families.folders import check_libraries, pipeline_variant, read_json
from sdxs_lightning.inference.generator import OneStepGenerator

Result = TypeVar("Result")
Condition = Callable[[Any], Any]
MAX_PIXELS = 16_000_000
"""Of an uploaded image."""


@dataclass(frozen=True)
class Made:
    """Images and how long they took."""

    images: list[Image.Image]
    seconds: float
    inputs: tuple[Image.Image, ...] = ()
    """The condition that the ControlNet saw."""


class NewestWins:
    """Runs one piece of work at a time, and of each visitor's waiting ones only the newest.

    With a queue, an image would appear for each letter typed, ever later. Here a visitor has at most one piece of work in
    progress and one that waits; older ones are dropped. Several visitors take turns in the order in which they came.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: OrderedDict[str, object] = OrderedDict()
        """The newest waiting work of each visitor; `threading.Lock` would not keep their order."""
        self._busy = False

    def run(self, visitor: str, work: Callable[[], Result]) -> Result | None:
        """The result of `work`, or None if a newer one of the same visitor came while it waited."""
        ticket = object()
        with self._changed:
            self._line[visitor] = ticket  # in the place of an older one, which now goes
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._line.get(visitor) is not ticket or self._is_first(visitor))
            if self._line.get(visitor) is not ticket:
                return None
            del self._line[visitor]
            self._busy = True
        try:
            return work()
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _is_first(self, visitor: str) -> bool:
        return not self._busy and next(iter(self._line)) == visitor


class Studio:
    """A student and what belongs to it.

    Args:
        generator: the student.
        condition: makes a condition image of an image (H, W, 3) uint8; None without ControlNet.
        has_lora: whether the generator has a LoRA.
        base: makes an image of the base from (prompt, seed); None without base.
        base_title: what the base is called on the page.
    """

    def __init__(
        self,
        generator: OneStepGenerator,
        condition: Condition | None = None,
        has_lora: bool = False,
        base: Callable[[str, int], Image.Image] | None = None,
        base_title: str = "",
    ) -> None:
        self.generator = generator
        self.condition = condition if generator.networks.has_control else None
        self.has_lora = has_lora
        self.base = base
        self.base_title = base_title
        self._newest_wins = NewestWins()
        self._base_turns = NewestWins()  # its own, since its many steps would stop everyone's live images
        self._lora_scale = 0.0
        if has_lora:
            generator.set_lora_scale(0.0)

    def text(self, visitor: str, prompt: str, seed: int | None, count: int) -> Made | None:
        """Images of a prompt; None where a newer request came."""
        seeds = range(whole_seed(seed), whole_seed(seed) + int(count))
        return self._make(visitor, [prompt] * len(seeds), seeds)

    def sketch(self, visitor: str, prompt: str, seed: int | None, drawing: Any, scale: float) -> Made | None:
        """An image along a drawing (H, W, 4 or 3) uint8, whose strokes are dark on white or on nothing."""
        lines = uploaded(Image.fromarray(strokes(drawing)), self.generator.model.size)
        return self._make(visitor, [prompt], [seed], (lines,), control_images=lines, control_scale=scale)

    def image(
        self,
        visitor: str,
        prompt: str,
        seed: int | None,
        image: Image.Image,
        strength: float,
        controlled: bool,
        scale: float,
    ) -> Made | None:
        """An image like another, of any mode: from its noisy latents, or, `controlled`, along its condition."""
        picture = uploaded(image, self.generator.model.size)
        if not controlled:
            return self._make(visitor, [prompt], [seed], (), image=picture, strength=strength)
        if self.condition is None:
            raise UserError("the demo runs without a ControlNet; start it with --controlnet DIR.")
        lines = Image.fromarray(self.condition(np.asarray(picture)))
        return self._make(visitor, [prompt], [seed], (lines,), control_images=lines, control_scale=scale)

    def styled(self, visitor: str, prompt: str, seed: int | None, scale: float) -> Made | None:
        """An image with the LoRA at a scale."""
        return self._make(visitor, [prompt], [seed], (), lora_scale=scale)

    def by_base(self, visitor: str, prompt: str, seed: int | None) -> Made | None:
        """The base's image of a prompt."""
        base = self.base
        if base is None:
            raise UserError("the demo runs without a base; start it with --base DIR.")

        number = whole_seed(seed)

        def work() -> Made:
            started = time.perf_counter()
            image = base(prompt, number)
            return Made([image], time.perf_counter() - started)

        return self._base_turns.run(visitor, work)

    def _make(
        self,
        visitor: str,
        prompts: Sequence[str],
        seeds: Sequence[int | None],
        inputs: tuple[Image.Image, ...] = (),
        lora_scale: float = 0.0,
        **given: Any,
    ) -> Made | None:
        numbers = [whole_seed(seed) for seed in seeds]

        def work() -> Made:
            if self.has_lora and lora_scale != self._lora_scale:
                self.generator.set_lora_scale(lora_scale)
                self._lora_scale = lora_scale
            started = time.perf_counter()
            images = self.generator.generate(list(prompts), numbers, **given)
            seconds = time.perf_counter() - started
            frames = images.permute(0, 2, 3, 1).numpy()
            return Made([Image.fromarray(frame) for frame in frames], seconds, inputs)

        return self._newest_wins.run(visitor, work)


def uploaded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A visitor's image as RGB at a size (height, width).

    Raises:
        UserError: for one that is too large, or cannot be RGB.
    """
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"the image has {image.width}x{image.height} pixels; up to {MAX_PIXELS // 1_000_000} million are accepted."
        )
    try:
        return fitted(image, size)
    except ValueError as error:
        raise UserError(f"the image cannot be used: {error}.") from error


def whole_seed(value: int | None) -> int:
    """The seed of a page's field.

    Raises:
        UserError: for an empty field, as while a visitor types another number.
    """
    if value is None:
        raise UserError("Give a seed, a whole number.")
    return int(value)


def strokes(drawing: Any) -> Any:
    """White lines on black, (H, W, 3) uint8, from dark strokes on white or on a transparent canvas."""
    pixels = np.asarray(drawing).astype(np.float32)
    shade = pixels[..., :3].mean(-1)
    opacity = pixels[..., 3] / 255 if pixels.shape[-1] == 4 else 1.0
    ink = ((255 - shade) * opacity).round().clip(0, 255).astype(np.uint8)
    return np.repeat(ink[..., None], 3, axis=-1)


def stock_base(
    folder: str, steps: int, guidance_scale: float, device: torch.device, dtype: torch.dtype
) -> Callable[[str, int], Image.Image]:
    """The base in its own diffusers pipeline.

    Raises:
        UserError: for a folder that diffusers cannot load.
    """
    from diffusers import DiffusionPipeline

    try:
        check_libraries(Path(folder), read_json(Path(folder) / "model_index.json"))
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=pipeline_variant(Path(folder)),
            local_files_only=True,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--base '{folder}' cannot be loaded: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)

    def draw(prompt: str, seed: int) -> Image.Image:
        noise = torch.Generator().manual_seed(seed)
        made = pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=noise,
            output_type="pil",
        )
        image: Image.Image = made.images[0]
        return image

    return draw
