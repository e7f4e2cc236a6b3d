"""The code of a card: how the published model is called, and its execution for the samples."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.families.folders import pipeline_variant
from sdxs_lightning.families.quiet import quiet_libraries
from sdxs_lightning.inference.model_folder import ModelFolder
from sdxs_lightning.publishing.runs import Kind, Run

if TYPE_CHECKING:
    from PIL.Image import Image

STUDENT_PROMPTS = (
    "a photo of a cat on a wooden table",
    "a watercolour of a village by the sea",
    "a portrait of an old sailor",
    "a bowl of fruit, still life",
)
TOY_PROMPTS = (
    "a red circle above a blue square",
    "a large green heart on a white background",
    "a pink ring left of a yellow cross",
    "a small orange triangle on a navy background",
)
CONDITION = "condition.png"


@dataclass(frozen=True)
class Settings:
    """How the published model is called."""

    steps: int
    guidance_scale: float
    """0 for a student; above 1 for a base."""
    scale: float | None
    """Of a ControlNet or LoRA."""


@dataclass(frozen=True)
class Snippet:
    """Python code that makes one image."""

    code: str
    """With the names under which a reader loads the models; it leaves the image in `image`."""
    local_code: str
    """The same with the folders here."""

    def run(self) -> Image:
        """Executes the code on the folders here, without network.

        Raises:
            UserError: if it fails.
        """
        scope: dict[str, Any] = {}
        quiet_libraries()
        try:
            with redirect_stderr(io.StringIO()):  # the libraries' progress bars
                exec(compile(self.local_code, "<the card's code>", "exec"), scope)  # our own text, made below
        except Exception as error:
            raise UserError(
                f"the card's code fails on this run ({type(error).__name__}: {error})."
            ) from error
        image: Image = scope["image"]
        return image


def prompts_of(run: Run) -> tuple[str, ...]:
    """Prompts that the run's base understands."""
    return TOY_PROMPTS if "data.toy." in str(run.config["data"]["class_path"]) else STUDENT_PROMPTS


def snippet_of(
    run: Run,
    names: tuple[str, str],
    folders: tuple[Path, Path],
    prompt: str,
    seed: int,
    settings: Settings,
) -> Snippet:
    """The card's code.

    Args:
        run: the run.
        names: hub ids (or folders) of the published model, and of the student or base that a LoRA, ControlNet or decoder is
            used with; for a pipeline the same.
        folders: the published folder here, and that of the student or base.
        prompt: of the image.
        seed: of its noise.
        settings: of the call.
    """
    here, there = str(folders[0].resolve()), str(folders[1].resolve())
    condition = str(folders[0].resolve() / CONDITION)
    dtype = _base_arguments(folders[1]) if run.for_base else ""
    return Snippet(
        _code(run, quoted(names[0]), quoted(names[1]) + dtype, CONDITION, prompt, seed, settings),
        _code(run, quoted(here), quoted(there) + dtype, condition, prompt, seed, settings),
    )


def _base_arguments(base: Path) -> str:
    """Further arguments of a base's `from_pretrained`.

    Without a dtype, transformers 5 loads text encoders in that of their config, float16 in many bases, and diffusers its own
    networks in float32, and the first product fails. Our own exports say float32.
    """
    variant = pipeline_variant(base)
    return ", torch_dtype=torch.float32" + (f", variant={quoted(variant)}" if variant else "")


def _code(
    run: Run, name: str, partner: str, condition: str, prompt: str, seed: int, settings: Settings
) -> str:
    kind = run.family_name
    imports, load = _LOADING[run.kind](run, kind, name, partner, settings)
    arguments = f"num_inference_steps={settings.steps}, guidance_scale={settings.guidance_scale:g}"
    if run.kind == "controlnet":
        imports += "\nfrom diffusers.utils import load_image"
        load += f"\ncondition = load_image({quoted(condition)})"
        arguments = f"image=condition, {arguments}, controlnet_conditioning_scale={settings.scale}"
    return (
        f"import torch\n{imports}\n\n{load}\n"
        f"generator = torch.Generator().manual_seed({seed})\n"
        f"image = pipeline({quoted(prompt)}, {arguments}, generator=generator).images[0]\n"
    )


def quoted(text: str) -> str:
    """A Python string literal in double quotes, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _pipeline(run: Run, kind: str, name: str, partner: str, settings: Settings) -> tuple[str, str]:
    return f"from diffusers import {kind}Pipeline", f"pipeline = {kind}Pipeline.from_pretrained({name})"


def _lora(run: Run, kind: str, name: str, partner: str, settings: Settings) -> tuple[str, str]:
    plain = "base" if run.for_base else "student"
    return f"from diffusers import {kind}Pipeline", (
        f"pipeline = {kind}Pipeline.from_pretrained({partner})\n"
        f'pipeline.load_lora_weights({name}, weight_name="pytorch_lora_weights.safetensors", adapter_name="style")\n'
        f'pipeline.set_adapters(["style"], [{settings.scale}])  # 0 is the {plain} without the style'
    )


def _controlnet(run: Run, kind: str, name: str, partner: str, settings: Settings) -> tuple[str, str]:
    stock = '"ControlNetModel"' in (run.exported / "config.json").read_text()
    imports = f"from diffusers import {kind}ControlNetPipeline{', ControlNetModel' if stock else ''}"
    imports += "" if stock else "\nfrom sdxs_lightning.networks.controlnet import load_controlnet"
    make = "ControlNetModel.from_pretrained" if stock else "load_controlnet"
    return (
        imports,
        f"pipeline = {kind}ControlNetPipeline.from_pretrained({partner}, controlnet={make}({name}))",
    )


def _decoder(run: Run, kind: str, name: str, partner: str, settings: Settings) -> tuple[str, str]:
    return (
        f"from diffusers import AutoencoderTiny, {kind}Pipeline",
        f"pipeline = {kind}Pipeline.from_pretrained({partner}, vae=AutoencoderTiny.from_pretrained({name}))",
    )


_LOADING: dict[Kind, Callable[[Run, str, str, str, Settings], tuple[str, str]]] = {
    "pipeline": _pipeline,
    "lora": _lora,
    "controlnet": _controlnet,
    "decoder": _decoder,
}
"""Imports and loading of each kind."""


def partner_folder(run: Run, given: Path | None) -> Path:
    """The student or base here that a LoRA, ControlNet or decoder is used with; a pipeline itself.

    Raises:
        UserError: if there is no such pipeline folder.
    """
    if run.kind == "pipeline":
        return run.exported
    found = Path(run.partner) if given is None else given
    if not (found / "model_index.json").is_file():
        named = f"the run names '{run.partner}'" if given is None else f"--partner is '{given}'"
        raise UserError(
            f"the samples of a {run.kind} need the pipeline that it is used with, and {named}, which is no pipeline folder "
            "here; give one as --partner."
        )
    return found


def settings_of(
    run: Run, partner: Path, steps: int | None, guidance_scale: float | None, scale: float | None
) -> Settings:
    """How the card's code calls the model.

    Args:
        run: the run.
        partner: as from `partner_folder`.
        steps: of a base; None is 25.
        guidance_scale: of a base; None is 7.5.
        scale: of a LoRA or ControlNet; None is 1 for a LoRA and that of the training for a ControlNet.

    Raises:
        UserError: for settings that the model does not have.
    """
    if scale is not None and run.kind in ("pipeline", "decoder"):
        raise UserError(f"--scale is of LoRAs and ControlNets, and the run made a {run.kind}.")
    if scale is None and run.kind in ("lora", "controlnet"):
        scale = 1.0 if run.kind == "lora" else run.conditioning_scale
    if run.for_base:
        guided = 7.5 if guidance_scale is None else guidance_scale
        return Settings(steps or 25, guided, scale)
    if steps is not None or guidance_scale is not None:
        raise UserError(
            "a student has its own number of steps and no guidance; --steps and --guidance_scale are of what a base uses."
        )
    return Settings(len(ModelFolder.read(partner, "torch").plan.steps), 0.0, scale)
