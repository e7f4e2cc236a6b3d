"""A LoRA in the weights of a U-Net, at a scale that can change: W + scale * alpha / rank * up @ down.

Merged, it costs nothing per image, and a compiled or captured graph stays valid, since the weights change in place. The
weights without it are kept, so that scale 0 gives them back bit by bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.inference.inputs import finite

if TYPE_CHECKING:
    from sdxs_lightning.networks.lora_files import LowRank


class ScaledAdapter:
    """A LoRA on a network's weights; loaded by `load`.

    Args:
        updates: adapted layer and update of its weight.
        scale: factor at the start.
    """

    def __init__(self, updates: list[tuple[nn.Module, LowRank]], scale: float) -> None:
        self._updates = updates
        self._scale = scale
        self._plain: list[Tensor] = []

    @classmethod
    def load(cls, source: str | Path, unet: Any, scale: float = 1.0) -> ScaledAdapter:
        """Reads a LoRA for a U-Net.

        Args:
            source: .safetensors file in diffusers', PEFT's or kohya's naming, or a folder with one.
            unet: unchanged until `start`.
            scale: factor of the weight changes.

        Raises:
            UserError: for another file, a LoRA of another network, or one that also changes text encoders.
        """
        from sdxs_lightning.networks.lora_files import read_lora

        try:
            adapters, text_encoder_layers = read_lora(source, unet, "`lora`")
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        if text_encoder_layers:
            raise UserError(
                f"`lora` '{source}' also changes {text_encoder_layers} layers of text encoders, which prompts that are "
                "embedded once cannot follow; `python -m sdxs_lightning.lora convert` writes it without them, or run it in "
                "diffusers."
            )
        return cls([(unet.get_submodule(name), update) for name, update in adapters.items()], scale)

    def start(self) -> None:
        """Keeps the weights of the network, which is where it stays, and applies itself."""
        self._plain = [_weight(module).detach().clone() for module, _ in self._updates]
        device = self._plain[0].device
        self._updates = [
            (module, one._replace(down=one.down.to(device), up=one.up.to(device)))
            for module, one in self._updates
        ]
        self.apply(self._scale)

    @torch.no_grad()
    def apply(self, scale: float) -> None:
        """Sets the weights, computed in float32 and rounded once.

        Raises:
            UserError: for a scale that is not finite.
        """
        self._scale = finite(scale, "lora_scale")
        for (module, update), plain in zip(self._updates, self._plain, strict=True):
            weight = _weight(module)
            if scale == 0:
                weight.copy_(plain)
                continue
            product = (update.up.flatten(1) @ update.down.flatten(1)).view(plain.shape)
            weight.copy_(plain.float().add(product, alpha=scale * update.alpha / update.rank))


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight
