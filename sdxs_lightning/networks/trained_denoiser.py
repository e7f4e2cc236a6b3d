"""The U-Net of a network that learns: the base's or a folder's, with adapters where asked for."""

from __future__ import annotations

import hashlib

from torch import nn

from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.lora import LoRA, add_lora
from sdxs_lightning.networks.network import prepare_unet


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


def frozen_fingerprint(network: nn.Module) -> str | None:
    """What the weights are recognised by that do not learn, and so are in no checkpoint; None without such, or on meta.

    Reads the first values of each tensor: two checkpoints of one architecture differ there, and 2.6 billion weights are not
    read whole. To be called before weights are cast or sharded.
    """
    frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
    if not frozen or any(parameter.is_meta for parameter in frozen.values()):
        return None
    digest = hashlib.sha256()
    for name, parameter in frozen.items():
        digest.update(name.encode())
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
