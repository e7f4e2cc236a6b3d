"""The U-Net of a network that learns: the base's or a folder's, with adapters where asked for."""

from __future__ import annotations

from sdxs_lightning.families import Family
from sdxs_lightning.modules.lora import LoRA, add_lora
from sdxs_lightning.modules.network import prepare_unet
from sdxs_lightning.teacher.denoiser import Denoiser


def load_denoiser(
    family: Family,
    weights: str | None,
    lora: LoRA | None,
    gradient_checkpointing: bool,
    compile_blocks: bool,
) -> Denoiser:
    """A denoiser in training mode.

    Args:
        family: the base.
        weights: U-Net or pipeline folder; None is the base's own U-Net.
        lora: freezes the weights and adds adapters; None leaves every weight trainable.
        gradient_checkpointing: recompute blocks in the backward pass.
        compile_blocks: torch.compile of each block.
    """
    unet = family.load_unet(weights)
    if lora is not None:
        add_lora(unet, lora)
    prepared = prepare_unet(unet, gradient_checkpointing, compile_blocks)
    return Denoiser(prepared, family.schedule, family.prediction_type)
