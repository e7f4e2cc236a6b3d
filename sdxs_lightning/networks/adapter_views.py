"""Views of a U-Net with adapters: the base without them, and the base with averaged adapters.

Both run the one U-Net in memory and restore it after each call. They do not own its weights, so freezing, moving, saving or
counting a view's parameters does not touch them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.lora import lora_parameters

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class _View(Denoiser):
    """A denoiser on a U-Net that it does not own."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.unet, denoiser.schedule, denoiser.prediction_type)
        # A plain attribute has the same name but is invisible to parameters(), state_dict(), to() and eval().
        self.__dict__["unet"] = self._modules.pop("unet")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the U-Net computes this view's function."""
        yield

    def _call(
        self,
        unet: UNet2DConditionModel,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        residuals: Mapping[str, Any] | None = None,
    ) -> Tensor:
        with self.applied(), _evaluated(self.unet):
            return super()._call(unet, noisy_latents, timesteps, conditioning, residuals)


class BaseView(_View):
    """The base inside a network with adapters: runs it with the adapters disabled.

    Passes gradients on to its inputs, like any frozen network.

    Args:
        denoiser: a denoiser with adapters.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        super().__init__(denoiser)
        self._layers = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the adapters are disabled."""
        adapters = list(lora_parameters(self.unet).values())
        learning = [parameter.requires_grad for parameter in adapters]
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)
            # enable_adapters(True) of peft sets requires_grad on all adapters, frozen ones included.
            for parameter, value in zip(adapters, learning, strict=True):
                parameter.requires_grad_(value)


class AveragedView(_View):
    """The base with averaged adapters; the averages are this module's only parameters.

    Args:
        denoiser: a denoiser with adapters, which initialise the average.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.averaged = nn.ParameterDict()
        self.restart()

    def restart(self) -> None:
        """Resets the average to the current adapters, with their current sharding."""
        for name, parameter in lora_parameters(self.unet).items():
            # Parameter names must not contain dots.
            self.averaged[name.replace(".", "/")] = nn.Parameter(parameter.detach().clone(), False)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the adapters hold their averages."""
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
    # Autocast caches lower-precision copies of trainable weights and does not notice in-place changes.
    torch.clear_autocast_cache()


@contextmanager
def _evaluated(unet: UNet2DConditionModel) -> Iterator[None]:
    """Context with eval mode and without gradient checkpointing, whose recomputation would run after the view is undone."""
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
