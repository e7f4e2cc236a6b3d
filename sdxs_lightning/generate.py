"""Makes images: `python -m sdxs_lightning.generate --model DIR --prompt "a red circle" --out image.png`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.disk_room import SMALLEST_FILE_BYTES, check_room
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError
from sdxs_lightning.core.guidance_scale import read_guidance_scale
from sdxs_lightning.core.image_formats import fitted, readable_formats
from sdxs_lightning.core.option_bounds import LARGEST_SCALE, LARGEST_SIDE_PX, MOST_STEPS

if TYPE_CHECKING:
    from PIL import Image

    from sdxs_lightning.inference.generator import OneStepGenerator

Scale = Annotated[float, Option(at_least=-LARGEST_SCALE, at_most=LARGEST_SCALE)]


def parse_size(text: str) -> tuple[int, int]:
    """Height and width, from "512" or "512x768".

    Raises:
        ValueError: for anything else.
    """
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() for side in sides):
        raise ValueError("must be a side in pixels, 512, or height and width, 512x768")
    if max(map(int, sides)) > LARGEST_SIDE_PX:
        raise ValueError(f"a side is at most {LARGEST_SIDE_PX} px")
    return int(sides[0]), int(sides[-1])


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Makes images with a one-step or few-step student.

    The same seed and prompt give the same image as the model's stock diffusers pipeline with guidance_scale=0.
    """

    EXAMPLES: ClassVar[str] = """\
python -m sdxs_lightning.generate --model outputs/quickstart/pipeline --prompt "a red circle" --out image.png
python -m sdxs_lightning.generate --model exports/student-openvino --backend openvino --prompt "a cat" "a dog" --out images/
python -m sdxs_lightning.generate --model student/ --controlnet canny/ --control_image edges.png --prompt "house" --out a.png
python -m sdxs_lightning.generate --model student/ --image photo.png --strength 0.5 --prompt "in winter" --out winter.png
python -m sdxs_lightning.generate --model guided/ --guidance_scale 2 --negative_prompt blurry --prompt "a cat" --out a.png"""

    model: Annotated[str, Option(metavar="DIR")]
    """Diffusers folder of a student, or its export for --backend."""
    prompt: Annotated[tuple[str, ...], Option(called=("prompts",))]
    """What to draw; several make several images."""
    out: Annotated[Path, Option(metavar="PATH")]
    """A .png file for one image, or a folder."""
    seed: Annotated[int, Option(at_least=0, at_most=2**62)] = 0
    """Of the first image; the next ones count on."""
    images_per_prompt: Annotated[int, Option(at_least=1)] = 1
    """Images of each prompt, with different seeds."""
    size: Annotated[tuple[int, int] | None, Option(parse=parse_size, metavar="HEIGHTxWIDTH")] = None
    """Size in pixels, multiples of 8; by default that of the training."""
    backend: Literal["torch", "onnx", "openvino"] = "torch"
    """What runs the model."""
    device: str = "auto"
    """auto, cpu, cuda, or another device of the backend."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the networks (torch)."""
    controlnet: Annotated[str | None, Option(metavar="DIR")] = None
    """ControlNet (torch; exports have theirs inside)."""
    control_image: Annotated[Path | None, Option(metavar="FILE", called=("control_images",))] = None
    """Condition of the ControlNet: edges, a sketch, depth; scaled to the output's size, its middle where the shape differs."""
    control_scale: Scale = 1.0
    """Weight of the ControlNet."""
    lora: Annotated[str | None, Option(metavar="FILE")] = None
    """LoRA (torch; exports have it merged)."""
    lora_scale: Scale = 1.0
    """Weight of the LoRA."""
    image: Annotated[Path | None, Option(metavar="FILE")] = None
    """Image to change; scaled to the output's size, its middle where the shape differs. Needs --strength."""
    strength: float | None = None
    """How much of --image is replaced, above 0 and at most 1."""
    guidance_scale: Annotated[float | None, Option(at_least=0, at_most=LARGEST_SCALE)] = None
    """Of a student that takes it as an input (student.guidance), which needs it; 1 means none."""
    negative_prompt: Annotated[str | None, Option(called=("negative_prompts",))] = None
    """What is not to be seen, for a student that was trained with negative prompts."""
    steps: Annotated[int | None, Option(at_least=1, at_most=MOST_STEPS)] = None
    """Of a student of several steps; by default all that its scheduler has."""
    batch_size: Annotated[int, Option(at_least=1)] = 4
    """Images at once."""

    def __post_init__(self) -> None:
        if self.guidance_scale is not None:  # here, since each batch would say again that 0 is read as 1
            scale = read_guidance_scale("--guidance_scale", self.guidance_scale)
            object.__setattr__(self, "guidance_scale", scale)
        if (self.image is None) != (self.strength is None):
            raise ValueError("--image and --strength belong together.")
        self._refuse_without_effect()
        count = len(self.prompt) * self.images_per_prompt
        if (
            re.fullmatch(r"\.[A-Za-z]\w{1,4}", self.out.suffix)
            and not _is_file(self.out)
            and not self.out.is_dir()
        ):
            raise ValueError(
                f"--out is '{self.out}', and images are written as .png; give such a file, or a folder."
            )
        if count > 1 and _is_file(self.out):
            raise ValueError(f"--out is '{self.out}', one file, for {count} images; give a folder.")

    def _refuse_without_effect(self) -> None:
        """Refuses options that would change nothing; an export has its ControlNet and LoRA inside."""
        if self.backend == "torch" and (self.controlnet is None) != (self.control_image is None):
            missing = "--controlnet" if self.controlnet is None else "--control_image"
            raise ValueError(f"--controlnet and --control_image belong together, and {missing} is missing.")
        if self.control_scale != 1.0 and self.control_image is None:
            raise ValueError(f"--control_scale is {self.control_scale:g}, and there is no --control_image.")
        if self.lora_scale != 1.0 and self.lora is None:
            raise ValueError(f"--lora_scale is {self.lora_scale:g}, and there is no --lora.")


def _is_file(out: Path) -> bool:
    return out.suffix.lower() == ".png"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit codes as in `sdxs_lightning.core.errors`."""
    run_command("python -m sdxs_lightning.generate", GenerateOptions, run, arguments)


def run(options: GenerateOptions) -> str:
    """Makes the images; returns what was written.

    Raises:
        UserError: for an unusable model, adapter or image.
        CheckpointNotWritten: if an image cannot be written.
    """
    # Imported here, so that --help and refused options do not wait for torch.
    from sdxs_lightning.inference.generator import OneStepGenerator

    generator = OneStepGenerator.load(
        options.model,
        options.backend,
        options.controlnet,
        options.lora,
        options.device,
        options.dtype,
        options.lora_scale,
        options.steps,
    )
    count = len(options.prompt) * options.images_per_prompt
    check_room(options.out, count, SMALLEST_FILE_BYTES, "--images_per_prompt", "images")
    prompts = [prompt for prompt in options.prompt for _ in range(options.images_per_prompt)]
    single = _is_file(options.out)
    files = [options.out if single else options.out / f"{i:05d}.png" for i in range(len(prompts))]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(prompts), options.batch_size):
            batch = slice(start, start + options.batch_size)
            for image, file in zip(
                _images(generator, options, prompts[batch], start), files[batch], strict=True
            ):
                image.save(file)
    except OSError as error:
        raise CheckpointNotWritten(f"--out '{options.out}' could not be written: {error}") from error
    return f"{len(files)} image(s): {files[0]}" + (f" ... {files[-1]}" if len(files) > 1 else "")


def _images(
    generator: OneStepGenerator, options: GenerateOptions, prompts: list[str], start: int
) -> list[Image.Image]:
    from PIL import Image

    from sdxs_lightning.inference.generator import NotFiniteWarning
    from sdxs_lightning.inference.inputs import image_size

    size = image_size(options.size, generator.model.size, generator.multiple)
    given: dict[str, Any] = {}
    if options.control_image is not None:
        given |= {
            "control_images": _read(options.control_image, "--control_image", size),
            "control_scale": options.control_scale,
        }
    if options.image is not None:
        given |= {"image": _read(options.image, "--image", size), "strength": options.strength}
    if options.guidance_scale is not None:
        given["guidance_scale"] = options.guidance_scale
    if options.negative_prompt is not None:
        given["negative_prompts"] = options.negative_prompt
    seeds = range(options.seed + start, options.seed + start + len(prompts))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", NotFiniteWarning)
            images = generator.generate(prompts, list(seeds), size=size, **given)
    except NotFiniteWarning as warning:
        raise UserError(str(warning)) from warning
    return [Image.fromarray(frame) for frame in images.permute(0, 2, 3, 1).numpy()]


def _read(file: Path, option: str, size: tuple[int, int]) -> Image.Image:
    """The image at a size (height, width)."""
    from PIL import Image

    try:
        with Image.open(file, formats=readable_formats()) as image:
            return fitted(image, size)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{option} '{file}' cannot be read as an image ({error}).") from error


if __name__ == "__main__":
    main()
