"""The code of a card: how the published model is called, and its execution for the samples."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.publishing.runs import Run

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
DECODER_STEPS = 8


@dataclass(frozen=True)
class Snippet:
    """Python code that makes one image."""

    code: str
    """With the names under which a reader loads the models; it leaves the image in `image`."""
    folders: Mapping[str, Path]
    """The folders here that stand for these names."""

    def run(self) -> Image:
        """Executes the code on the folders here, without network.

        Raises:
            UserError: if it fails.
        """
        code = self.code
        for name, folder in self.folders.items():
            code = code.replace(f'"{name}"', repr(str(folder)))
        scope: dict[str, Any] = {}
        try:
            with redirect_stderr(io.StringIO()):  # the libraries' progress bars
                exec(compile(code, "<the card's code>", "exec"), scope)  # our own text, made below
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
    run: Run, folder: Path, name: str, partner: str, prompt: str, seed: int, steps: int, scale: float
) -> Snippet:
    """The card's code.

    Args:
        run: the run.
        folder: the published folder here.
        name: hub id of the published model.
        partner: hub id (or folder) of the student or base that a LoRA, ControlNet or decoder is used with.
        prompt: of the image.
        seed: of its noise.
        steps: of the student.
        scale: of a ControlNet or LoRA.
    """
    kind = run.family_name
    folders = {name: folder.resolve()}
    arguments = f"num_inference_steps={steps}, guidance_scale=0"
    if run.kind == "pipeline":
        imports = f"from diffusers import {kind}Pipeline"
        load = f'pipeline = {kind}Pipeline.from_pretrained("{name}")'
    elif run.kind == "lora":
        imports = f"from diffusers import {kind}Pipeline"
        load = (
            f'pipeline = {kind}Pipeline.from_pretrained("{partner}")\n'
            f'pipeline.load_lora_weights("{name}", weight_name="pytorch_lora_weights.safetensors", adapter_name="style")\n'
            f'pipeline.set_adapters(["style"], [{scale}])  # 0 is the student without the style'
        )
    elif run.kind == "controlnet":
        stock = '"ControlNetModel"' in (run.exported / "config.json").read_text()
        imports = f"from diffusers import {kind}ControlNetPipeline{', ControlNetModel' if stock else ''}\n"
        imports += "from diffusers.utils import load_image"
        imports += "" if stock else "\nfrom sdxs_lightning.networks.controlnet import load_controlnet"
        make = "ControlNetModel.from_pretrained" if stock else "load_controlnet"
        load = (
            f'pipeline = {kind}ControlNetPipeline.from_pretrained("{partner}", controlnet={make}("{name}"))\n'
            f'condition = load_image("{CONDITION}")'
        )
        folders[CONDITION] = (folder / CONDITION).resolve()
        arguments = f"image=condition, {arguments}, controlnet_conditioning_scale={scale}"
    else:
        imports = f"from diffusers import AutoencoderTiny, {kind}Pipeline"
        load = f'pipeline = {kind}Pipeline.from_pretrained("{partner}", vae=AutoencoderTiny.from_pretrained("{name}"))'
        arguments = f"num_inference_steps={DECODER_STEPS}"
    if run.kind != "pipeline":
        here = Path(partner_folder(run)).resolve()
        folders = {partner: here, **folders}
    code = (
        f"import torch\n{imports}\n\n{load}\n"
        f"generator = torch.Generator().manual_seed({seed})\n"
        f"image = pipeline({prompt!r}, {arguments}, generator=generator).images[0]\n"
    )
    return Snippet(code, folders)


def partner_folder(run: Run) -> str:
    """The student or base here that a LoRA, ControlNet or decoder is used with.

    Raises:
        UserError: if the run names none, or not a pipeline folder.
    """
    found = run.base if run.kind == "decoder" else run.student
    if found is None or not (Path(found) / "model_index.json").is_file():
        raise UserError(
            f"the samples of a {run.kind} need the pipeline that it is used with, and the run names '{found}', which is no "
            "pipeline folder here; run this command where it is."
        )
    return found
