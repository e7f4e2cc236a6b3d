"""Base class of trained networks, and helpers: loading a U-Net, disabling gradients or autocast, frozen weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from sdxs_lightning.core.frozen import fingerprint_of, is_comparable
from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.lora import LoRA, add_lora

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


GRAPHS_PER_CLASS = 1024
"""Compiled graphs of one class of blocks: its shapes, times batch sizes, times kinds of gradients."""


class Network(LightningModule):
    """A trainable network with its own optimizer and lr scheduler.

    The stage calls `configure_optimizers` and steps the optimizer; Lightning calls no hooks of nested modules.

    Args:
        optimizer: called with the parameters that require gradients.
        lr_scheduler: stepped once per update of this network; None keeps the rate constant.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None = None) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler

    @property
    def optimizer(self) -> OptimizerCallable:
        """Factory that maps parameters to the configured optimizer."""
        return self._optimizer

    def groups(self, trainable: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        """What the optimizer is called with: the trainable parameters, or groups of them with settings of their own."""
        return trainable

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns the optimizer, and its lr scheduler if any.

        Raises:
            RuntimeError: if the network is not built yet.
        """
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trainable:
            raise RuntimeError(f"{type(self).__name__}: nothing to optimise; call build(...) first.")
        optimizer = self._optimizer(self.groups(trainable))
        if self._lr_scheduler is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": self._lr_scheduler(optimizer)}


def save_adapters_only(network: nn.Module) -> None:
    """Excludes a network's frozen weights from its `state_dict()`, and so from checkpoints.

    Args:
        network: built, with adapters.
    """
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    save_without(network, frozen)


def save_without(network: nn.Module, names: Collection[str]) -> None:
    """Excludes parameters from a network's `state_dict()`, and so from checkpoints.

    Loading a checkpoint leaves them unchanged and is strict about everything else.

    Args:
        network: two hooks are registered on it.
        names: of the parameters.
    """
    if not names:
        return

    def drop(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
        for name in names:
            state.pop(prefix + name, None)

    def keep(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        own = dict(module.named_parameters())
        state.update({prefix + name: own[name].detach() for name in names})

    network.register_state_dict_post_hook(drop)
    network.register_load_state_dict_pre_hook(keep)


@contextmanager
def no_param_grad(*networks: nn.Module | None) -> Iterator[None]:
    """Context in which the networks pass gradients on to their inputs but accumulate none.

    Cheaper than discarding gradients, and needed for correctness under autocast: a weight that requires gradients
    and is used under no_grad leaves its graph-less cast in autocast's cache, where a later pass with graph finds it.
    """
    parameters = [
        p for network in networks if network is not None for p in network.parameters() if p.requires_grad
    ]
    _require_grad(parameters, False)
    try:
        yield
    finally:
        _require_grad(parameters, True)


def prepare_unet(
    unet: UNet2DConditionModel,
    gradient_checkpointing: bool,
    compile_blocks: bool,
    taps: Collection[str] = (),
) -> UNet2DConditionModel:
    """Puts a U-Net into training mode, with optional gradient checkpointing and compilation.

    Compiles each residual and transformer block separately: they repeat, so few graphs cover the network, and they carry no
    hooks (those of FSDP2 and most feature taps are on the stages around them). Blocks that contain one of `taps` are not
    compiled, since a compiled graph ignores hooks that are added later. Compiling raises torch's limits for the process.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    unet.train()
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if compile_blocks:
        _raise_graph_limits()
        for name, block in unet.named_modules():
            tapped = any(f"{tap}.".startswith(f"{name}.") for tap in taps)
            if isinstance(block, ResnetBlock2D | Transformer2DModel) and not tapped:
                block.compile(
                    dynamic=False
                )  # a run has few batch sizes, and fixed shapes make faster kernels
    return unet


def _raise_graph_limits() -> None:
    """Lets torch keep a graph for each shape of a block; beyond its limit it goes on uncompiled, with a warning only.

    All blocks of a class count together, and SD-1.5 has 22 shapes of them, each with and without gradients: torch's 8 would
    leave two thirds of them uncompiled.
    """
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_CLASS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * GRAPHS_PER_CLASS)


def load_denoiser(
    family: Family,
    weights: str | None,
    lora: LoRA | None,
    gradient_checkpointing: bool,
    compile_blocks: bool,
    option: str = "weights",
) -> Denoiser:
    """Loads a denoiser in training mode.

    Args:
        family: the base.
        weights: U-Net or pipeline folder; None loads the base's U-Net.
        lora: freezes the weights and adds adapters; None trains all weights.
        gradient_checkpointing: recompute blocks in the backward pass.
        compile_blocks: torch.compile each block.
        option: the setting that names the weights, for messages.
    """
    unet = family.load_unet(weights, option)
    if lora is not None:
        add_lora(unet, lora)
    prepared = prepare_unet(unet, gradient_checkpointing, compile_blocks)
    return Denoiser(prepared, family.schedule, family.prediction_type)


def frozen_fingerprint(network: nn.Module) -> str | None:
    """Fingerprint of the frozen weights, which checkpoints do not hold; None without any, or on the meta device.

    Call it before casting or sharding.
    """
    return fingerprint_of({name: p for name, p in network.named_parameters() if not p.requires_grad})


def check_frozen_weights(
    checkpoint: Mapping[str, Any], now: Mapping[str, str | None], options: Mapping[str, str]
) -> None:
    """Checks that adapters, or a ControlNet, go on with the frozen weights that they were trained on.

    Args:
        checkpoint: may hold fingerprints by role under "frozen_weights".
        now: fingerprints of the loaded weights by role.
        options: the option that names a role's weights; the others are the base's.

    Raises:
        ValueError: if they differ.
    """
    for role, found in now.items():
        before = checkpoint.get("frozen_weights", {}).get(role, found)
        if before is not None and not is_comparable(before):
            rank_zero_warn(
                f"the frozen weights of {role} were not compared with those that the run began with: its checkpoint is of an "
                "older version."
            )
        elif before != found:
            option = options.get(role, "family.init_args.base")
            raise ValueError(
                f"the checkpoint's {role} was trained on frozen weights with fingerprint {before}, and this run loaded weights "
                f"with {found}; set {option} (or the base) to what the run began with, or start a new run."
            )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context that disables autocast on a device, for computations that need float32."""
    # torch has no autocast for the meta device; the memory plan replaces torch.autocast.
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def _require_grad(parameters: Sequence[nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)
