"""The images of a measurement: made by a model, or read from files; each is a function of its number."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

from evaluation.images.image_sets import NumberedImages
from evaluation.images.prompt_files import captions_digest
from evaluation.networks.image_steps import apply_steps, still_to_do
from evaluation.protocols.protocols import hash_model
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.latents import to_uint8
from sdxs_lightning.core.seeding import Stream, normal

Reader = Callable[[Sequence[int]], list[Image.Image]]
"""Numbers to images."""
Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Samples(Protocol):
    """A numbered set of images; goes to other processes by pickling, before anything heavy is loaded."""

    @property
    def count(self) -> int:
        """How many."""

    @property
    def formats(self) -> str:
        """`lossless`, or the endings of the files."""

    @property
    def are_files(self) -> bool:
        """Whether they are read by the processor rather than made on the networks' device."""

    def open(self, device: torch.device) -> Reader:
        """Load the model, or open the files."""

    def origin(self) -> dict[str, Any]:
        """Everything that the images depend on, for JSON."""

    def prepare(self, image: Image.Image, number: int, steps: Sequence[str]) -> Image.Image:
        """An image through the steps of a protocol."""


@dataclass(frozen=True)
class PipelineImages:
    """Images of a diffusers pipeline, from the noise that training-time measurements use too."""

    pipeline: Any
    """A text-to-image pipeline of Stable Diffusion's or SDXL's kind."""
    steps: int
    """Sampling steps."""
    guidance_scale: float
    """1 means none."""
    seed: int
    """Of the noise."""
    image_px: int | None = None
    """Side of the images; None is the model's own."""

    def __call__(self, captions: Sequence[str], sample_ids: Tensor) -> Tensor:
        """B captions and their numbers (B,) int64 to (B,3,H,W) uint8."""
        unet = self.pipeline.unet
        side = unet.config.sample_size
        if self.image_px is not None:
            side = self.image_px // self.pipeline.vae_scale_factor
        device = self.pipeline.device
        noise = normal(
            self.seed, Stream.EVALUATION, sample_ids.to(device), (unet.config.in_channels, side, side)
        )
        images: Tensor = self.pipeline(
            prompt=list(captions),
            latents=noise.to(unet.dtype),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            height=side * self.pipeline.vae_scale_factor,
            width=side * self.pipeline.vae_scale_factor,
            # Of schedulers that draw noise between steps; the first noise is given.
            generator=[torch.Generator().manual_seed(number) for number in sample_ids.tolist()],
            output_type="pt",
        ).images
        return to_uint8(
            images.float().nan_to_num(0.0) * 2 - 1
        )  # NaN, as half precision makes, is black everywhere


@dataclass(frozen=True)
class ModelSamples:
    """Images that a pipeline folder makes of captions."""

    model: str
    """Diffusers folder."""
    prompts: tuple[str, ...]
    """Sample i is made from the i-th."""
    steps: int = 1
    """Sampling steps."""
    guidance_scale: float = 1.0
    """1 means none."""
    seed: int = 0
    """Of the noise."""
    image_px: int | None = None
    """Side of the images; None is the model's own."""
    precision: Precision = "fp32"
    """Of the networks."""

    are_files: ClassVar[bool] = False
    """See Samples."""

    @property
    def count(self) -> int:
        return len(self.prompts)

    @property
    def formats(self) -> str:
        return "lossless"

    def check(self) -> None:
        """Check the folder before anything is loaded.

        Raises:
            UserError: if there is no pipeline in the folder.
        """
        if not (Path(self.model) / "model_index.json").is_file():
            raise UserError(
                f"no diffusers pipeline at {self.model} (model_index.json is missing); --model takes its folder"
            )

    def switched_off(self) -> list[str]:
        """Parts of the model folder that a measurement does without."""
        named = json.loads((Path(self.model) / "model_index.json").read_text())
        checker = ["the safety checker"] if (named.get("safety_checker") or [None])[0] is not None else []
        return checker + (
            ["SDXL's watermark"] if "StableDiffusionXL" in str(named.get("_class_name")) else []
        )

    def maker(self, device: torch.device) -> PipelineImages:
        """The pipeline, loaded.

        Raises:
            UserError: if there is none in the folder, or if it makes images of no such size.
        """
        self.check()
        for library in (diffusers_logging, transformers_logging):
            library.disable_progress_bar()  # of files; they tear the command's own progress apart
        pipeline = load_pipeline(self.model).to(device, DTYPES[self.precision])
        pipeline.set_progress_bar_config(disable=True)
        if self.image_px is not None and self.image_px % pipeline.vae_scale_factor:
            raise UserError(f"--image_px {self.image_px} is no multiple of {pipeline.vae_scale_factor}.")
        return PipelineImages(pipeline, self.steps, self.guidance_scale, self.seed, self.image_px)

    def open(self, device: torch.device) -> Reader:
        maker = self.maker(device)

        def make(numbers: Sequence[int]) -> list[Image.Image]:
            images = maker([self.prompts[number] for number in numbers], torch.tensor(numbers))
            return [Image.fromarray(frame) for frame in images.permute(0, 2, 3, 1).cpu().numpy()]

        return make

    def origin(self) -> dict[str, Any]:
        return {
            "model_sha256": hash_model(self.model),
            "prompts_sha256": captions_digest(self.prompts),
            "nfe": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "image_px": self.image_px,
            "precision": self.precision,
        }

    def prepare(self, image: Image.Image, number: int, steps: Sequence[str]) -> Image.Image:
        return apply_steps(image, steps)


@dataclass(frozen=True)
class StoredSamples:
    """The first images of a folder, a zip file or shards."""

    source: NumberedImages
    """All of them."""
    first: int | None = None
    """How many of them; None takes all."""

    are_files: ClassVar[bool] = True
    """See Samples."""

    @property
    def count(self) -> int:
        return len(self.source.names) if self.first is None else self.first

    @property
    def formats(self) -> str:
        lossy = {"jpg", "webp", "avif", "gif"} & set(self.source.formats.split("+"))
        return self.source.formats if lossy else "lossless"

    def open(self, device: torch.device) -> Reader:
        return lambda numbers: [self.source.read(number) for number in numbers]

    def origin(self) -> dict[str, Any]:
        return {"images_sha256": self.source.digest(), "stamp": self.source.stamp()}

    def prepare(self, image: Image.Image, number: int, steps: Sequence[str]) -> Image.Image:
        """See Samples; the steps that its file shows to have been taken are left out."""
        name = self.source.names[number].lower()
        from_jpeg = name.endswith((".jpg", ".jpeg", ".jfif")) or self.source.formats == "jpg"
        return apply_steps(image, still_to_do(steps, from_jpeg, image.size))


def load_pipeline(folder: str | Path) -> Any:
    """A pipeline as it is measured: without safety checker, which returns black images, and without SDXL's watermark."""
    named = json.loads((Path(folder) / "model_index.json").read_text())
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if "safety_checker" in named:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if "StableDiffusionXL" in str(named.get("_class_name")):
        options["add_watermarker"] = False
    pipeline = DiffusionPipeline.from_pretrained(str(folder), **options)
    assert getattr(pipeline, "safety_checker", None) is None and getattr(pipeline, "watermark", None) is None
    return pipeline


def is_constant(image: Image.Image) -> bool:
    """Whether all pixels are equal, as in the black images of a safety checker or of overflow in half precision."""
    return all(low == high for low, high in image.convert("RGB").getextrema())  # type: ignore[misc]


def stacked(images: Sequence[Image.Image], device: torch.device) -> Tensor:
    """Images of one size as (B,3,H,W) uint8."""
    frames = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(device)
