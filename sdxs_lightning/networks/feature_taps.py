"""Intermediate features of a stock `UNet2DConditionModel`, by forward hooks."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def bottleneck_of(unet: UNet2DConditionModel) -> str:
    """Name of the innermost block: `mid_block`, or the last down block of a U-Net without one."""
    return "mid_block" if unet.mid_block is not None else f"down_blocks.{len(unet.down_blocks) - 1}"


def bottleneck_shape(unet: UNet2DConditionModel, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Channels, height and width of the bottleneck's output for latents of `latent_shape` (C, h, w)."""
    _, height, width = latent_shape
    # A diffusers down block halves by a stride-2 convolution with padding 1, which rounds odd sizes up;
    # the last one does not halve.
    for _ in range(len(unet.down_blocks) - 1):
        height, width = (height + 1) // 2, (width + 1) // 2
    return int(unet.config.block_out_channels[-1]), height, width


def encoder_of(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A view of the U-Net that ends after the bottleneck; its `.sample` is the bottleneck's output.

    The view shares all parameters, buffers and hooks with the original and has no up blocks. Leaving the forward by an
    exception instead would interrupt the hooks of FSDP2 and the compiler. Creating a view costs microseconds.
    """
    # Not copy.copy: FSDP2's subclass creates new objects through the constructor, which would initialise a full U-Net.
    view: UNet2DConditionModel = object.__new__(type(unet))
    view.__dict__.update(unet.__dict__)
    modules: dict[str, nn.Module | None] = dict(unet._modules)
    modules |= {"up_blocks": nn.ModuleList(), "conv_norm_out": None, "conv_out": nn.Identity()}
    view.__dict__["_modules"] = modules
    return view


class FeatureTap:
    """Context manager that collects the outputs of named blocks.

    with FeatureTap(unet) as tap:
        unet(...)
    tap["mid_block"]

    Args:
        unet: a stock diffusers U-Net; may be sharded, or compiled inside its blocks.
        blocks: module names such as "mid_block" or "down_blocks.1"; none means the bottleneck.

    Raises:
        ValueError: if the U-Net has no block of that name.
    """

    def __init__(self, unet: UNet2DConditionModel, *blocks: str) -> None:
        self._modules: dict[str, nn.Module] = {}
        for name in blocks or (bottleneck_of(unet),):
            try:
                self._modules[name] = unet.get_submodule(name)
            except AttributeError:
                known = [n for n, _ in unet.named_modules() if n.count(".") <= 1 and "block" in n]
                raise ValueError(
                    f"FeatureTap: this U-Net has no block '{name}'; it has {', '.join(known)}."
                ) from None
        self._features: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._features = {}
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._store(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getitem__(self, block: str) -> Tensor:
        """The last output of `block`, (B, C, h, w), not detached."""
        return self._features[block]

    @property
    def features(self) -> Tensor:
        """The output of the only tapped block."""
        (features,) = self._features.values()
        return features

    def _store(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            # Down blocks return (hidden_states, residuals); mid and up blocks the hidden states.
            self._features[name] = cast(Tensor, output[0] if isinstance(output, tuple) else output)

        return hook
