"""Other networks inside a U-Net with adapters: the base that it was, and the average of what it became.

Both use the one U-Net in memory, and leave it after each call as they found it. They own none of its weights, so nothing
that is done with them (freeze, move, save, count) reaches them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.lora import lora_parameters


class _View(Denoiser):
    """A denoiser over somebody else's U-Net."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.unet, denoiser.schedule, denoiser.prediction_type)
        # A plain attribute is reached by the same name, and by none of parameters(), state_dict(), to() and eval().
        self.__dict__["unet"] = self._modules.pop("unet")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the U-Net computes this denoiser's function."""
        yield

    def _call(
        self, unet: UNet2DConditionModel, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        with self.applied(), _evaluated(self.unet):
            return super()._call(unet, noisy_latents, timesteps, conditioning)


class BaseView(_View):
    """The base, on the weights of a network that learns by adapters: its adapters do not count.

    Gradients with respect to inputs flow, as through any frozen network.

    Args:
        denoiser: with adapters.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self._layers = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the adapters are off."""
        adapters = list(lora_parameters(self.unet).values())
        learning = [parameter.requires_grad for parameter in adapters]
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)
            # peft lets adapters learn when it switches them on, frozen ones included.
            for parameter, value in zip(adapters, learning, strict=True):
                parameter.requires_grad_(value)


class AveragedView(_View):
    """The base with averaged adapters, which are all that this module owns.

    Args:
        denoiser: with adapters; the average begins at them.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.averaged = nn.ParameterDict()
        self.restart()

    def restart(self) -> None:
        """Begins again at the adapters as they are now, and sharded as they are now."""
        for name, parameter in lora_parameters(self.unet).items():
            # A parameter's own name must have no dot.
            self.averaged[name.replace(".", "/")] = nn.Parameter(parameter.detach().clone(), False)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the adapters hold their averages."""
        adapters = list(lora_parameters(self.unet).values())
        kept = [parameter.detach().clone() for parameter in adapters]
        _write(adapters, list(self.averaged.values()))
        try:
            yield
        finally:
            _write(adapters, kept)


@torch.no_grad()
def _write(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    # Autocast keeps lower-precision copies of weights that learn, and would not notice other values in the same place.
    torch.clear_autocast_cache()


@contextmanager
def _evaluated(unet: UNet2DConditionModel) -> Iterator[None]:
    """Inside, the U-Net is in eval mode and recomputes nothing: a later recomputation would find it changed back."""
    training, recomputing = unet.training, unet.is_gradient_checkpointing
    unet.eval()
    if recomputing:
        unet.disable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.train(training)
        if recomputing:
            unet.enable_gradient_checkpointing()
