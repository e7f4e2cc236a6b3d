"""What a model folder says of itself: a diffusers pipeline of a student, or its export for a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.families.folders import Layout, latent_scale, read_json, vae_factor
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.inference.plan import SamplingPlan

Backend = Literal["torch", "onnx", "openvino"]
MANIFEST = "sdxs_runtime.json"
"""In exports for a runtime: what it is, and what a caller must know."""
FORMAT = 1
"""Of the manifest."""
LAYOUTS: Mapping[str, tuple[Layout, float]] = {
    kind.layout.pipeline_class: (kind.layout, kind.kl_scaling_factor)
    for kind in (StableDiffusion, StableDiffusionXL)
}
"""Layout and default scaling factor by pipeline class."""


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder; reads JSON files only."""

    path: Path
    pipeline_class: str
    plan: SamplingPlan
    manifest: Mapping[str, Any] | None
    """None for a diffusers folder."""

    @classmethod
    def read(
        cls, folder: str | Path, backend: Backend, steps: int | None = None, guided: bool = False
    ) -> ModelFolder:
        """Reads and checks a folder.

        Args:
            folder: of the model.
            backend: what is to run it.
            steps: as in `SamplingPlan.from_scheduler`.
            guided: whether a student with the guidance scale as an input is accepted too.

        Raises:
            UserError: for a missing or incomplete folder, one for another backend, or another kind of model.
        """
        path = Path(folder)
        if not (path / "model_index.json").is_file():
            raise UserError(
                f"there is no model in '{folder}' (model_index.json is missing); give "
                f"{model_near(path) or 'the `pipeline` folder that a training exported'}, or an export of "
                "`python -m sdxs_lightning.export_runtime`."
            )
        try:
            kind = str(read_json(path / "model_index.json").get("_class_name"))
            manifest = _read_manifest(path / MANIFEST) if (path / MANIFEST).is_file() else None
            scheduler = read_json(path / "scheduler" / "scheduler_config.json")
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from error
        kind = manifest["pipeline_class"] if manifest else kind
        if kind not in LAYOUTS:
            raise UserError(f"'{folder}' holds a {kind}, accepted are {', '.join(LAYOUTS)}.")
        found = manifest["runtime"] if manifest else "torch"
        if found != backend:
            raise UserError(f"'{folder}' {_ways(found, backend, path)}.")
        model = cls(path, kind, SamplingPlan.from_scheduler(scheduler, str(folder), steps), manifest)
        needed = model.layout.components if manifest is None else ("unet", "vae_decoder", *model.encoders)
        missing = [name for name in needed if not (path / name).is_dir()]
        if missing:
            raise UserError(f"'{folder}' lacks the component folder(s) {', '.join(missing)}.")
        try:
            taken = model.takes_guidance
            _ = model.vae_config
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from error
        if taken and not guided:
            raise UserError(
                f"'{folder}' takes the guidance scale as an input (time_cond_proj_dim), which is not given here: run it by "
                "`python -m sdxs_lightning.generate --guidance_scale 2` or in diffusers, pipeline(prompt, "
                "num_inference_steps=1, guidance_scale=2), or measure it by `python -m evaluation.evaluate --guidance_scale 2`."
            )
        return model

    @property
    def takes_guidance(self) -> bool:
        """Whether the U-Net takes the guidance scale as an input."""
        return self.unet_config.get("time_cond_proj_dim") is not None

    @property
    def layout(self) -> Layout:
        """Files of a model of this kind."""
        return LAYOUTS[self.pipeline_class][0]

    @property
    def encoders(self) -> tuple[str, ...]:
        """Folders of the text encoders."""
        return tuple(name for name in self.layout.components if name.startswith("text_encoder"))

    @property
    def has_pooled_prompts(self) -> bool:
        """Whether the U-Net also takes a pooled embedding and size conditioning (SDXL)."""
        return len(self.encoders) > 1

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """Config of the U-Net."""
        return read_json(self.path / "unet" / "config.json")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """Config of the decoder's autoencoder."""
        return read_json(self.path / ("vae" if self.manifest is None else "vae_decoder") / "config.json")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.unet_config["in_channels"])

    @property
    def factor(self) -> int:
        """Pixels per latent and side."""
        return vae_factor(self.vae_config)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the training images, pixels."""
        side = self.unet_config["sample_size"]
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return int(height) * self.factor, int(width) * self.factor

    def scale_of(self, vae: str) -> float:
        """scaling_factor of a VAE folder, "vae" or "vae_large"; what pipelines multiply and divide latents by."""
        tiny = read_json(self.path / vae / "config.json").get("_class_name") == "AutoencoderTiny"
        return float(latent_scale(self.path / vae, 1.0 if tiny else LAYOUTS[self.pipeline_class][1])[0])


def _read_manifest(file: Path) -> dict[str, Any]:
    """Reads an export's manifest.

    Raises:
        ValueError: if something that the generator needs of it is missing or has another form.
    """
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"'{file}' has format {content.get('format')!r}, and this version reads {FORMAT}; export the model again with it."
        )
    needed: dict[str, Callable[[Any], bool]] = {
        "runtime": lambda value: value in ("onnx", "openvino"),
        "pipeline_class": lambda value: isinstance(value, str),
        "dtype": lambda value: value in ("fp32", "fp16", "int8"),
        "input_dtype": lambda value: value in ("float32", "float16"),
        "control_residuals": _are_residuals,
    }
    for name, fits in needed.items():
        if not fits(content.get(name)):
            raise ValueError(
                f"'{file}' has {name} {content.get(name)!r}, which no export writes; was it edited? Export the model again."
            )
    return content


def _are_residuals(value: Any) -> bool:
    """Whether these are names, channels and halvings of inputs."""
    return isinstance(value, list) and all(
        isinstance(one, list) and [type(part) for part in one] == [str, int, int] for one in value
    )


def is_student(folder: str | Path, steps: int) -> bool:
    """Whether a diffusers folder is a student of so many steps, which the backend torch can load."""
    try:
        return len(ModelFolder.read(folder, "torch", steps).plan.steps) == steps
    except UserError:
        return False


def model_near(path: Path) -> str | None:
    """What to give in the place of a folder of a run that holds no model; None for other folders."""
    run = path.parent if path.name == "pipeline" else path
    if (path / "pipeline" / "model_index.json").is_file():
        return f"its folder 'pipeline', '{path / 'pipeline'}'"
    exports = ("unet", "decoder", "controlnet", "condition_reader", "lora")  # of stages that make no pipeline
    if (run / "checkpoints").is_dir() and not any((run / name).is_dir() for name in exports):
        return (
            f"the `pipeline` folder of a finished run: '{run}' has not exported one; continue it by --ckpt_path last "
            "(configs/README.md, 'How is a run that was stopped exported?')"
        )
    return None


def _ways(found: str, backend: str, path: Path) -> str:
    """How to come from what a folder is to what runs it."""
    if found == "torch":
        return (
            f"is a diffusers folder, which `backend` torch runs; for {backend} export it first: python -m "
            f"sdxs_lightning.export_runtime {path} --to {backend}"
        )
    accepted = (
        f"the export for {backend}" if backend != "torch" else "the diffusers folder that it was made from"
    )
    return f"is an export for {found}, got `backend` {backend}; give `backend` {found}, or {accepted}"
