"""The student as a folder that stock diffusers runs in one step, or in the student's few."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.file_modes import apply_umask
from sdxs_lightning.families import Family
from sdxs_lightning.families.folders import pipeline_variant, read_json
from sdxs_lightning.networks.backward_simulation import original_inference_steps
from sdxs_lightning.networks.ema import DenoiserEma
from sdxs_lightning.networks.guidance_input import LEARNT
from sdxs_lightning.networks.lora import ADAPTER, merged_weights
from sdxs_lightning.networks.lora_files import live_adapters, write_lora
from sdxs_lightning.networks.tiny_decoder import load_tiny, tiny_factor

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        ControlNetModel,
        DDIMScheduler,
        DiffusionPipeline,
        LCMScheduler,
        UNet2DConditionModel,
    )

COMPLETE, REPLACED = "complete", "replaced"
"""What the temporary folder of a folder that is written holds."""
LEFTOVER_SECONDS = 86_400
"""Age of a temporary folder that a killed process left."""


def export_pipeline(
    unet: UNet2DConditionModel,
    family: Family,
    folder: str | Path,
    conditioning_timestep: int | None = None,
    dtype: torch.dtype = torch.float16,
    vae: str | None = None,
    timesteps: Sequence[int] | None = None,
) -> Path:
    """Writes a diffusers pipeline, to be run with guidance_scale=0 and num_inference_steps=1 (or the student's number).

    Text encoders and tokenizers are the base's. The folder is written completely or not at all; an existing one is replaced.

    Args:
        unet: the student's network, or its average, unsharded; it is not changed.
        family: the base that the student came from.
        folder: where to write.
        conditioning_timestep: of the student's training; None takes the family's.
        dtype: of all weights in the files; float32 keeps the student's output up to rounding.
        vae: folder of a tiny autoencoder (stage `decoder`, or TAESD) to decode with; the base's VAE then goes to `vae_large`,
            which pipelines do not read, as in the released SDXS folders. None exports the base's VAE.
        timesteps: of a student of several steps, instead of conditioning_timestep; None is one step.

    Returns:
        folder, as a Path.

    Raises:
        FileNotFoundError: without a tiny autoencoder in `vae`.
        ValueError: for a tiny autoencoder that does not fit the base's latents.
    """
    import diffusers
    from diffusers import AutoencoderKL

    folder = Path(folder)
    timestep = family.conditioning_timestep if conditioning_timestep is None else conditioning_timestep
    steps = list(timesteps or [timestep])
    copy = plain_unet(unet, unet.state_dict())
    pipeline_class: type[DiffusionPipeline] = getattr(diffusers, family.pipeline_class)
    scheduler = (
        one_step_scheduler(family, steps[0]) if len(steps) == 1 else several_step_scheduler(family, steps)
    )
    parts: dict[str, Any] = {"unet": copy, "scheduler": scheduler, **family.pipeline_options}
    if vae is not None:
        parts["vae"] = fitting_tiny_vae(vae, family)
    pipeline = pipeline_class.from_pretrained(
        family.folder, use_safetensors=True, variant=pipeline_variant(family.folder), **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    base_vae = pipeline.vae if vae is None else family.load_vae()
    if isinstance(base_vae, AutoencoderKL):
        absorb_shift(base_vae)
    cast_finite(copy, dtype)
    for network in (*pipeline.components.values(), base_vae):
        if isinstance(network, nn.Module):
            nn.Module.to(network, dtype=dtype)  # the override of diffusers warns about every cast
    with new_folder(folder) as written:
        pipeline.save_pretrained(written, safe_serialization=True)
        for tokenizer in written.glob("tokenizer*"):
            add_vocabulary(tokenizer)
        for encoder in written.glob("text_encoder*/model.safetensors"):
            _name_as_published(encoder)
        if vae is not None:
            base_vae.save_pretrained(written / "vae_large", safe_serialization=True)
        _load_in_float32(written)
    return folder


def add_vocabulary(tokenizer: Path) -> None:
    """Writes vocab.json and merges.txt of a tokenizer folder's tokenizer.json, unless they are there.

    transformers from version 5 on writes tokenizer.json alone, and earlier versions, which other programs pin, need these two
    for a CLIPTokenizer.
    """
    if (tokenizer / "vocab.json").exists() or not (tokenizer / "tokenizer.json").is_file():
        return
    model = read_json(tokenizer / "tokenizer.json")["model"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _name_as_published(encoder: Path) -> None:
    """Gives the tensors of a CLIP text encoder the names of the published bases.

    transformers from version 5 on leaves `text_model.` out and reads both; earlier versions would start such an encoder from
    random weights, with a warning alone.
    """
    from safetensors.torch import load_file, save_file

    weights = load_file(encoder)
    named = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": value
        for name, value in weights.items()
    }
    if named.keys() != weights.keys():
        renamed = encoder.with_suffix(".renamed")  # the tensors may still be read from the file itself
        save_file(named, renamed, metadata={"format": "pt"})
        os.replace(renamed, encoder)


def absorb_shift(vae: AutoencoderKL) -> None:
    """Moves `shift_factor` into the convolutions around the latents: diffusers' SD and SDXL pipelines do not read it.

    Raises:
        ValueError: for a VAE without these convolutions.
    """
    shift = vae.config.shift_factor
    if not shift:
        return
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise ValueError(
            f"the base's VAE has shift_factor {shift}, which diffusers' pipelines for this base ignore, and no quant_conv and "
            "post_quant_conv to absorb it; export with a tiny autoencoder as vae."
        )
    encoding, decoding = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        encoding.bias[: vae.config.latent_channels] -= shift  # the means; the other half are log variances
        decoding.bias += shift * decoding.weight.sum(dim=(1, 2, 3))
    vae.register_to_config(shift_factor=None)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error; an existing folder is replaced.

    Of two that are written at once the one that ends later stays. What a killed process left is removed a day later.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        written = Path(temporary) / COMPLETE
        yield written
        apply_umask(written)
        _put_in_place(written, folder, Path(temporary) / REPLACED)


def _put_in_place(written: Path, folder: Path, aside: Path) -> None:
    """Moves `written` to `folder`; what is there goes into `aside`, since a kill in mid-removal would leave half of it."""
    aside.mkdir()
    for attempt in range(100):
        earlier = aside / str(attempt)
        with suppress(FileNotFoundError):
            os.replace(folder, earlier)
        try:
            os.replace(written, folder)
            return
        except OSError as error:
            # Another process has put its own there in between.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                if earlier.exists():
                    os.replace(earlier, folder)
                raise
    raise OSError(errno.EBUSY, f"other processes keep writing '{folder}'")


def _remove_leftovers(folder: Path) -> None:
    """Removes the temporary folders of killed processes: those that nothing has been added to for a day."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}-????????"):
        with suppress(OSError):
            inside = {one.name for one in leftover.iterdir()}
            if inside <= {COMPLETE, REPLACED} and time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(leftover)


def fitting_tiny_vae(folder: str, family: Family) -> AutoencoderTiny:
    """The AutoencoderTiny of a folder, if it decodes the base's latents.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for other latent channels, or another factor between pixels and latents.
    """
    autoencoder = load_tiny(folder, "vae")
    channels, side, _ = family.latent_shape()
    needed = channels, family.resolution // side
    found = autoencoder.config.latent_channels, tiny_factor(autoencoder.config)
    if found != needed:
        raise ValueError(
            f"the tiny autoencoder in '{folder}' has {found[0]} latent channels and factor {found[1]}, and the base "
            f"'{family.base}' has {needed[0]} and {needed[1]}; give one that was trained for this base as vae."
        )
    return autoencoder


def gathered_unet(unet: UNet2DConditionModel, first_rank: bool) -> UNet2DConditionModel | None:
    """A copy on the CPU, unsharded and with adapters merged. A collective: every rank calls it.

    Args:
        unet: may be sharded by FSDP2.
        first_rank: whether this is rank 0, which alone gets the copy; the others get None.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(dict[str, Tensor], get_model_state_dict(unet, options=options))
    return plain_unet(unet, weights) if first_rank else None


def write_controlnet(controlnet: ControlNetModel, folder: Path, dtype: torch.dtype, first_rank: bool) -> None:
    """Writes a ControlNet in diffusers' layout. A collective: every rank calls it.

    Args:
        controlnet: may be sharded by FSDP2, and have adapters, which are merged.
        folder: written completely or not at all; an existing one is replaced.
        dtype: of the weights.
        first_rank: whether this rank writes.
    """
    from sdxs_lightning.networks.controlnet import plain_controlnet, save_controlnet

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(dict[str, Tensor], get_model_state_dict(controlnet, options=options))
    if first_rank:
        with new_folder(folder) as written:
            plain = plain_controlnet(controlnet, weights)
            cast_finite(plain, dtype)
            save_controlnet(plain, written, dtype)


def write_adapters(
    unet: UNet2DConditionModel,
    ema: DenoiserEma | None,
    folder: Path,
    dtype: torch.dtype,
    first_rank: bool,
) -> None:
    """Writes the adapters of a U-Net for `pipe.load_lora_weights(folder)`. A collective: every rank calls it.

    Args:
        unet: with adapters; may be sharded by FSDP2.
        ema: writes its averages instead of the current adapters.
        folder: written completely or not at all; an existing one is replaced.
        dtype: of the matrices.
        first_rank: whether this is rank 0, which alone writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with ema.applied() if ema is not None else nullcontext():
        weights = cast(dict[str, Tensor], get_model_state_dict(unet, options=options))
        adapters = live_adapters(weights, unet.peft_config[ADAPTER].lora_alpha, ADAPTER)
    if first_rank:
        with new_folder(folder) as written:
            written.mkdir()
            write_lora(written, adapters, dtype=dtype)


def write_unet(unet: UNet2DConditionModel, folder: Path, dtype: torch.dtype) -> None:
    """Writes a U-Net folder, completely or not at all; an existing one is replaced. The U-Net is cast to `dtype`.

    Raises:
        UserError: for weights that `dtype` cannot hold, and NaN.
    """
    cast_finite(unet, dtype)
    with new_folder(folder) as written:
        unet.save_pretrained(written, safe_serialization=True)


def cast_finite(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts a network in place.

    Raises:
        UserError: if a weight is not finite then.
    """
    nn.Module.to(network, dtype=dtype)  # the override of diffusers warns about every cast
    for name, weight in network.named_parameters():
        if not weight.isfinite().all():
            raise UserError(
                f"the {type(network).__name__}'s {name} has NaN, or values that {str(dtype).removeprefix('torch.')} cannot "
                "hold; write float32 if it is not that already, or find where the weights are from."
            )


def plain_unet(unet: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """A new network of the same config with the given weights: no hooks, no shards, adapters merged.

    Args:
        unet: where the config comes from.
        weights: unsharded.
    """
    from diffusers import UNet2DConditionModel

    # Not from_config(): it resets what a config names in _use_default_values, even where that was changed since.
    settings = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    copy = UNet2DConditionModel(**settings)
    if LEARNT in unet.config:
        copy.register_to_config(**{LEARNT: unet.config[LEARNT]})
    copy.load_state_dict(merged_weights(unet, weights))
    return copy


def _load_in_float32(folder: Path) -> None:
    """Makes `from_pretrained(folder)` without a dtype load float32 throughout.

    diffusers does so for its own models whatever the files hold, while transformers 5 obeys the `dtype` in a text encoder's
    config: half-precision files would give a pipeline that fails at the U-Net's first product of Half and Float.
    """
    for path in folder.glob("text_encoder*/config.json"):
        config = read_json(path) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def one_step_scheduler(family: Family, conditioning_timestep: int) -> DDIMScheduler:
    """A scheduler whose single step calls the network at the conditioning timestep and returns pred_x0.

    It has only the betas up to that timestep, so "trailing" spacing begins there, and the step to alpha = 1 is the x_0
    estimate. A pipeline's noise is not scaled (init_noise_sigma 1), as in training.
    """
    from diffusers import DDIMScheduler

    settings = _schedule_up_to(family, conditioning_timestep)
    return DDIMScheduler(**settings, timestep_spacing="trailing")


def several_step_scheduler(family: Family, timesteps: Sequence[int]) -> LCMScheduler:
    """A scheduler with one step for each of these timesteps, fresh noise between them, that returns pred_x0.

    The fresh noise is drawn from the pipeline's `generator`; in training the student derives it from the first noise.

    Raises:
        ValueError: for timesteps that it cannot visit.
    """
    from diffusers import LCMScheduler

    return LCMScheduler(
        **_schedule_up_to(family, timesteps[0]),
        original_inference_steps=original_inference_steps(timesteps),
        # LCMScheduler adds the network's input to pred_x0 with weight 1 / (4 (scale t)^2), which is 0 at this scale.
        timestep_scaling=1e4,
    )


def _schedule_up_to(family: Family, last_timestep: int) -> dict[str, Any]:
    """Settings that both schedulers share: the base's betas up to a timestep, and its prediction type."""
    config = read_json(family.folder / "scheduler" / "scheduler_config.json")
    total = last_timestep + 1
    settings: dict[str, Any] = {
        "num_train_timesteps": total,
        "prediction_type": family.prediction_type,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 1,  # unused by the spacings here; the pipeline warns about any other value
    }
    if total == family.schedule.num_train_timesteps:
        kept = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
        settings |= {name: config[name] for name in kept if name in config}
    else:
        abar = family.schedule.alphas_cumprod[:total].double().cpu()
        settings["trained_betas"] = (1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])).tolist()
    return settings
