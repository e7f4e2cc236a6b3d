"""Exports a student as files that stable-diffusion.cpp, ComfyUI and diffusers' single-file loader read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.export import new_folder
from sdxs_lightning.inference.exporting.graphs import Adapted
from sdxs_lightning.inference.exporting.original_names import (
    COMPLETE_LAYERS,
    original_clip,
    original_open_clip,
    original_unet,
    original_vae,
    taesd,
)
from sdxs_lightning.inference.inputs import DTYPES
from sdxs_lightning.inference.model_folder import MANIFEST, ModelFolder
from sdxs_lightning.inference.torch_networks import load_part

MODEL, WITH_GAPS = "model.safetensors", "model_sd_cpp.safetensors"


def export_single_file(
    folder: str | Path, out: Path, dtype: str, adapted: Adapted | None = None
) -> list[str]:
    """Writes model.safetensors, for a pruned SD student model_sd_cpp.safetensors, and a tiny decoder in TAESD's layout.

    Args:
        folder: diffusers folder of a student.
        out: folder to write, completely or not at all; an existing one is replaced.
        dtype: "fp16" or "fp32".
        adapted: LoRA to merge.

    Returns:
        What a user has to know of these files.

    Raises:
        UserError: for an unusable model, or one that the original layout cannot express.
        OSError: if the files cannot be written.
    """
    model = ModelFolder.read(folder, "torch")
    try:
        unet: Any = load_part(model, "unet")
        if adapted is not None and adapted.lora is not None:
            from sdxs_lightning.inference.adapters import ScaledAdapter

            ScaledAdapter.load(adapted.lora, unet, adapted.lora_scale).start()
        others = _vae(model) | _text_encoders(model)
        tiny = _tiny(model)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    weights = dict(unet.state_dict())
    named = original_unet(unet.config, weights)
    gaps = needs_gaps(unet.config)
    with new_folder(out) as written:
        written.mkdir()
        _save(named | others, written / MODEL, dtype)
        _check_read_back(written / MODEL, unet, dtype)
        if gaps:
            with_gaps = original_unet(unet.config, weights, gaps=True)
            _save(with_gaps | others, written / WITH_GAPS, dtype)
        for name, tensors in tiny.items():
            _save(tensors, written / f"{name}.safetensors", dtype)
        notes = _notes(model, unet.config, gaps, list(tiny), others)
        (written / "README.txt").write_text("\n".join(notes) + "\n")
        # By which the folder is known as an export, that the next one may replace.
        (written / MANIFEST).write_text(
            json.dumps({"pipeline_class": model.pipeline_class, "runtime": "single-file"}) + "\n"
        )
    return notes


def _check_read_back(file: Path, unet: Any, dtype: str) -> None:
    """Checks that diffusers' own reader of such files finds the U-Net in it bit by bit.

    Raises:
        UserError: if it does not.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from safetensors.torch import load_file

    found = convert_ldm_unet_checkpoint(load_file(file), config=dict(unet.config))
    wanted = unet.state_dict()
    wrong = [
        name
        for name, value in wanted.items()
        if name not in found or not found[name].equal(value.to(DTYPES[dtype]))
    ]
    if wrong or len(found) != len(wanted):
        raise UserError(
            f"the single file was read back with {len(found)} tensors of the U-Net's {len(wanted)}, {len(wrong)} of them "
            f"different ({', '.join(wrong[:3])}), so nothing was written; export this student for onnx or openvino."
        )


def needs_gaps(config: Mapping[str, Any]) -> bool:
    """Whether stable-diffusion.cpp numbers the blocks otherwise than the other programs: for SD U-Nets of one layer."""
    return config["layers_per_block"] != COMPLETE_LAYERS and config["addition_embed_type"] is None


def _vae(model: ModelFolder) -> dict[str, Tensor]:
    """The KL VAE; a student with a tiny one keeps it in vae_large."""
    from sdxs_lightning.families.folders import kl_folder

    folder = kl_folder(model.path)
    if folder is None:
        raise UserError(
            f"'{model.path}' has a tiny autoencoder and no vae_large, and a single file holds a KL VAE; add the base's VAE as "
            "vae_large, or export for onnx or openvino."
        )
    vae: Any = load_part(model, folder.name)
    return original_vae(len(vae.config.block_out_channels), vae.state_dict())


def _text_encoders(model: ModelFolder) -> dict[str, Tensor]:
    first = load_part(model, "text_encoder").state_dict()
    if model.has_pooled_prompts:
        second = load_part(model, "text_encoder_2").state_dict()
        tensors = original_clip("conditioner.embedders.0.transformer.", first)
        return tensors | original_open_clip("conditioner.embedders.1.model.", second)
    if is_open_clip(model):
        return original_open_clip("cond_stage_model.model.", first)
    return original_clip("cond_stage_model.transformer.", first)


def is_open_clip(model: ModelFolder) -> bool:
    """Whether an SD text encoder is SD-2.x's, which single files keep in open_clip's layout: it has gelu, SD-1.x quick_gelu."""
    config = json.loads((model.path / "text_encoder" / "config.json").read_text())
    return str(config.get("hidden_act", "quick_gelu")) == "gelu"


def _tiny(model: ModelFolder) -> dict[str, dict[str, Tensor]]:
    """Tiny decoder, and encoder if it was trained, by file name."""
    vae: Any = load_part(model, "vae")
    if type(vae).__name__ != "AutoencoderTiny":
        return {}
    weights = vae.state_dict()
    kind = "taesdxl" if model.has_pooled_prompts else "taesd"  # the names by which ComfyUI finds them
    files = {f"{kind}_decoder": taesd(weights, "decoder")}
    encoder = taesd(weights, "encoder")
    if all(bool(one.isfinite().all()) for one in encoder.values()):
        files[f"{kind}_encoder"] = encoder
    return files


def _save(tensors: Mapping[str, Tensor], file: Path, dtype: str) -> None:
    """Writes tensors; raises UserError for one that is not finite in `dtype`."""
    from safetensors.torch import save_file

    chosen = DTYPES[dtype]
    # Contiguous, as stable-diffusion.cpp requires, and never two names for one memory, which safetensors refuses.
    cast = {
        name: (value.to(chosen) if value.is_floating_point() else value).contiguous().clone()
        for name, value in tensors.items()
    }
    broken = next((name for name, value in cast.items() if not value.isfinite().all()), None)
    if broken is not None:
        raise UserError(
            f"the weight {broken} has NaN, or values that {dtype} cannot hold, so nothing was written; give --dtype fp32 if it "
            "is not that already, or find where the weights are from."
        )
    save_file(cast, file, metadata={"format": "pt"})


def _notes(
    model: ModelFolder,
    config: Mapping[str, Any],
    gaps: bool,
    tiny: Sequence[str],
    others: Mapping[str, Tensor],
) -> list[str]:
    steps, first = len(model.plan.steps), model.plan.steps[0].timestep
    notes = [
        f"{MODEL}: original layout, for ComfyUI and diffusers' from_single_file. Sample {steps} step(s) from timestep "
        f"{first}, prediction type {model.plan.prediction_type}, CFG 1."
    ]
    if first != 999:
        step = model.plan.steps[0]
        notes.append(
            f"warning: the samplers of ComfyUI and stable-diffusion.cpp begin at timestep 999, and this student at {first}: "
            f"give ComfyUI's SamplerCustom the sigmas {step.sigma / step.alpha:.4f}, 0; stable-diffusion.cpp cannot run it."
        )
    if model.plan.prediction_type != "epsilon":
        notes.append(
            "warning: programs that guess the prediction type from the blocks of the U-Net take a pruned one for epsilon; set "
            f"{model.plan.prediction_type} by hand (ComfyUI: ModelSamplingDiscrete)."
        )
    if gaps and first == 999:
        notes.append(
            f"{WITH_GAPS}: the same with the block numbers that stable-diffusion.cpp expects of pruned U-Nets; run it "
            f"with --cfg-scale 1 --steps {steps}."
        )
    if tiny:
        notes.append(
            f"{', '.join(f'{name}.safetensors' for name in tiny)}: the tiny autoencoder in TAESD's layout (ComfyUI: models/"
            "vae_approx; without the encoder beside it, it serves previews only). stable-diffusion.cpp takes the decoder in "
            "the model's folder vae/ as --taesd."
        )
    width = _prompt_width(others)
    taken, real = sd_cpp_version(config, width), sd_cpp_topology(config)
    if taken is not None and taken != real:
        notes.append(
            f"warning: stable-diffusion.cpp recognises models by the names of their tensors and takes this one for {taken}, "
            f"whose blocks differ ({_blocks(config)} here); it will not run there."
        )
    return notes


def _prompt_width(others: Mapping[str, Tensor]) -> int:
    return next(
        value.shape[1] for name, value in others.items() if name.endswith(("token_embedding.weight",))
    )


def sd_cpp_version(config: Mapping[str, Any], prompt_width: int) -> str | None:
    """What stable-diffusion.cpp takes an SD student for, by its published rule; None for SDXL students and complete U-Nets.

    Source: leejet/stable-diffusion.cpp, `ModelLoader::get_sd_version`: no tensor middle_block.1 is a pruned U-Net; of these, no
    output_blocks.7.1 is SDXS (for text encoders of width 768; of width 1024 all are SD-2's tiny U-Net).
    """
    if config["addition_embed_type"] is not None or config["mid_block_type"] == "UNetMidBlock2DCrossAttn":
        return None
    if prompt_width == 1024:
        return "SD-2.x with a tiny U-Net"
    kinds = config["up_block_types"]
    # output_blocks.7 is the second layer of the third up stage.
    attends = len(kinds) > 2 and "CrossAttn" in kinds[2]
    return "SD-1.x with a tiny U-Net" if attends else "SDXS-512"


def sd_cpp_topology(config: Mapping[str, Any]) -> str | None:
    """Which of its pruned models a U-Net is in fact: three stages of one layer, attention in all or not in the first."""
    if (
        config["layers_per_block"] != 1
        or len(config["block_out_channels"]) != 3
        or config["mid_block_type"] is not None
    ):
        return None
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    if attends == [False, True, True]:
        return "SDXS-512"
    if all(attends):
        version = 2 if config["cross_attention_dim"] == 1024 else 1
        return f"SD-{version}.x with a tiny U-Net"
    return None


def _blocks(config: Mapping[str, Any]) -> str:
    mid = config["mid_block_type"] or "no mid block"
    return f"{', '.join(config['down_block_types'])}; {mid}; {config['layers_per_block']} layer(s) a stage"
