"""U-Nets with a ControlNet attached: the student, the scores, and the base."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.families import Family
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.families.network_types import ControlNetModel, UNet2DConditionModel
from sdxs_lightning.families.sources import resolve_unet
from sdxs_lightning.networks.adapter_views import BaseView
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.lora import LoRA, add_lora
from sdxs_lightning.networks.network import frozen_fingerprint, save_adapters_only
from sdxs_lightning.networks.student_generator import StudentGenerator

FrozenPart = Literal["unet", "controlnet"]

NEW_PARTS = ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")
"""The parts that a ControlNet does not copy from the U-Net: with LoRA they are trained whole."""


@dataclass(frozen=True)
class ControlNetSource:
    """Where a ControlNet comes from, and how it is attached.

    Raises:
        ValueError: for inconsistent settings.
    """

    weights: str | None = None
    """Folder or hub id of a ControlNet to start from; null makes one from the U-Net, which changes nothing at first."""
    train: bool = True
    """False keeps `weights` frozen, and out of the checkpoints."""
    conditioning_scale: float = 1.0
    """Factor of the residuals, diffusers' controlnet_conditioning_scale; SDXS's demo of the sketch ControlNet has 0.8."""
    conditioning_channels: int = 3
    """Channels of the condition images."""
    stem_widths: tuple[int, ...] | None = None
    """Widths of a new ControlNet's convolutions that bring the condition image to the latents' size, a factor of 2 between two
    of them; null takes the first of diffusers' [16, 32, 96, 256], as many as the base's VAE needs."""
    mid_block: Literal["as_unet", "added"] = "as_unet"
    """"added" gives the new ControlNet of a U-Net without mid block one all the same, as the released sketch ControlNet has."""
    stem_init: Literal["zero", "he"] = "zero"
    """How the stem of a new ControlNet starts. "zero" is diffusers' own: the condition reaches the encoder only once the
    residuals' convolutions have moved. "he" (arXiv:1502.01852) shows it from the first update. Residuals start at zero with
    either."""
    lora: LoRA | None = None
    """Trains adapters on the copied encoder, and the new parts whole; null trains all weights."""
    seed: int = 0
    """Seed of the stem's random weights."""

    def __post_init__(self) -> None:
        if not self.train and self.weights is None:
            raise ValueError(
                "controlnet.train is false and controlnet.weights null: a new ControlNet that is not trained does nothing; "
                "name a folder as controlnet.weights."
            )
        if not self.train and self.lora is not None:
            raise ValueError(
                "controlnet.lora trains adapters and controlnet.train is false; set one of them back."
            )
        if not (math.isfinite(self.conditioning_scale) and self.conditioning_scale >= 0):
            raise ValueError(
                f"controlnet.conditioning_scale must be 0 or more, got {self.conditioning_scale}."
            )
        if self.train and self.conditioning_scale == 0:
            raise ValueError(
                "controlnet.conditioning_scale is 0, which multiplies the residuals and their gradients: nothing would be "
                "trained; give a scale above 0."
            )
        if self.conditioning_channels < 1:
            raise ValueError(
                f"controlnet.conditioning_channels must be 1 or more, got {self.conditioning_channels}."
            )
        if self.stem_widths is not None and not (self.stem_widths and min(self.stem_widths) >= 1):
            raise ValueError(
                f"controlnet.stem_widths must be widths of 1 or more, got {list(self.stem_widths)}; null takes the usual ones."
            )

    def make(self, unet: UNet2DConditionModel, family: Family, option: str) -> ControlNetModel:
        """Loads or makes the ControlNet of a U-Net, in training mode, float32.

        Args:
            unet: the U-Net that gets the residuals.
            family: says how many pixels a latent has.
            option: name of these settings, for messages.

        Raises:
            FileNotFoundError: if there is nothing in `weights`.
            ValueError: for a ControlNet that does not fit the U-Net, or the size of the latents.
        """
        from sdxs_lightning.networks.controlnet import (
            STEM_WIDTHS,
            check_fits,
            check_stem,
            controlnet_from_unet,
            load_controlnet,
        )

        factor = family.resolution // family.latent_shape()[1]
        if self.weights is not None:
            controlnet = load_controlnet(self.weights)
            channels = controlnet.config["conditioning_channels"]
            if channels != self.conditioning_channels:
                raise ValueError(
                    f"{option}.conditioning_channels is {self.conditioning_channels}, and {option}.weights '{self.weights}' "
                    f"has {channels}; set it to that."
                )
        else:
            widths = self.stem_widths or STEM_WIDTHS[: factor.bit_length()]
            channels = self.conditioning_channels
            controlnet = controlnet_from_unet(
                unet, widths, channels, self.mid_block, self.stem_init, self.seed
            )
        check_fits(controlnet, unet, f"{option}.weights '{self.weights}'")
        check_stem(controlnet, factor, option, f"the latents of '{family.base}'")
        if self.lora is not None:
            add_lora(controlnet, self.lora)
            for name in NEW_PARTS:
                controlnet.get_submodule(name).requires_grad_(True)
        elif self.train:
            controlnet.requires_grad_(True)
        return controlnet.train()


class _WithControlNet(Denoiser):
    """Adds the residuals of `controlnet` where the conditioning has control images."""

    controlnet: ControlNetModel
    conditioning_scale: float

    @property
    def networks(self) -> list[nn.Module]:
        return [self.unet, self.controlnet]

    def encoder_features(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, blocks: Sequence[str]
    ) -> dict[str, Tensor]:
        # Residuals are added after the encoder, so its blocks do not depend on the condition.
        plain = replace(conditioning, control_images=None)
        return super().encoder_features(noisy_latents, timesteps, plain, blocks)

    def _residuals(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        if conditioning.control_images is None:
            return {}
        own, unets = (next(one.parameters()).dtype for one in (self.controlnet, self.unet))
        given = conditioning.to(dtype=own)
        down, mid = self.controlnet(
            noisy_latents.to(own),
            timesteps,
            controlnet_cond=given.control_images,
            conditioning_scale=self.conditioning_scale,
            return_dict=False,
            **given.unet_kwargs(),
        )
        return {
            "down_block_additional_residuals": [residual.to(unets) for residual in down],
            "mid_block_additional_residual": mid.to(unets),
        }

    def _hide(self, name: str) -> None:
        """Makes a module a plain attribute of the same name, which parameters() and state_dict() do not see."""
        self.__dict__[name] = self._modules.pop(name)


class ControlledDenoiser(_WithControlNet):
    """A U-Net with a ControlNet, which acts where the conditioning has control images.

    A frozen part is not among the parameters, and so not in checkpoints, optimizers and averages; it moves with the module.

    Args:
        denoiser: the U-Net with its schedule and prediction type.
        controlnet: with a residual for each skip connection of the U-Net.
        conditioning_scale: factor of the residuals.
        frozen: the part that is not trained; None trains both.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        controlnet: ControlNetModel,
        conditioning_scale: float = 1.0,
        frozen: FrozenPart | None = None,
    ) -> None:
        super().__init__(denoiser.unet, denoiser.schedule, denoiser.prediction_type)
        self.controlnet = controlnet
        self.conditioning_scale = conditioning_scale
        self._hidden: tuple[FrozenPart, ...] = () if frozen is None else (frozen,)
        for name in self._hidden:
            getattr(self, name).requires_grad_(False)
            self._hide(name)

    def copy_for_average(self) -> Self:
        """A copy with the same frozen part, and the same frozen weights under adapters."""
        frozen: list[Any] = [self.__dict__[name] for name in self._hidden]
        frozen += [one for one in self.parameters() if not one.requires_grad]
        return copy.deepcopy(self, {id(one): one for one in frozen})

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name in self._hidden:
            self.__dict__[name]._apply(fn, recurse)
        return self


class ControlledBaseView(_WithControlNet, BaseView):
    """The base inside a network with adapters, with the base's ControlNet: a real score that shares the fake score's U-Net.

    It owns neither: freezing, moving or counting its parameters touches no adapter.

    Args:
        denoiser: a denoiser with adapters.
        controlnet: frozen.
        conditioning_scale: factor of the residuals.
    """

    def __init__(self, denoiser: Denoiser, controlnet: ControlNetModel, conditioning_scale: float) -> None:
        super().__init__(denoiser)
        self.controlnet = controlnet.requires_grad_(False)
        self.conditioning_scale = conditioning_scale
        self._hide("controlnet")

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # It may be nobody else's.
        self.controlnet._apply(fn, recurse)
        return self


class ControlledStudent(StudentGenerator):
    """A frozen student with a ControlNet that is trained.

    Args:
        optimizer: called with the trainable parameters of the ControlNet.
        lr_scheduler: stepped once per student update; None keeps the rate constant.
        weights: U-Net or pipeline folder of the student.
        conditioning_timestep: timestep of a one-step student; None takes the family's. As in the student's own training.
        timesteps: timesteps of a few-step student; None is one step.
        controlnet: the ControlNet.
        gradient_checkpointing: recompute blocks in the backward pass: less memory, about a third more compute.
        compile_blocks: torch.compile each block; worthwhile on a GPU for runs longer than minutes.

    Raises:
        ValueError: for a ControlNet that is not trained, or both conditioning_timestep and timesteps; in `build` for other
            timesteps than the exported student's, or one that takes a guidance scale.
    """

    denoiser: ControlledDenoiser
    without_guidance: ClassVar[str] = (
        "a ControlNet of such a student cannot be trained; give one of a single scale as student.init_args.weights"
    )

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        conditioning_timestep: int | None = None,
        timesteps: list[int] | None = None,
        controlnet: ControlNetSource = ControlNetSource(),
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(
            optimizer,
            lr_scheduler,
            weights,
            conditioning_timestep,
            timesteps,
            gradient_checkpointing=gradient_checkpointing,
            compile_blocks=compile_blocks,
        )
        if not controlnet.train:
            raise ValueError(
                "student.controlnet.train is false, and the student's ControlNet is what is trained."
            )
        self.controlnet_source = controlnet

    def build(self, family: Family) -> None:
        """Loads the networks. Idempotent."""
        if hasattr(self, "denoiser"):
            return
        super().build(family)
        self._check_timesteps()
        source, unet = self.controlnet_source, self.denoiser.unet
        controlnet = source.make(unet, family, "student.controlnet")
        if self._switches[0]:
            controlnet.enable_gradient_checkpointing()
        unet.requires_grad_(False)
        self.frozen_fingerprint = frozen_fingerprint(nn.ModuleList([unet, controlnet]))
        self.denoiser = ControlledDenoiser(self.denoiser, controlnet, source.conditioning_scale, "unet")
        if source.lora is not None:
            save_adapters_only(self)

    def _check_timesteps(self) -> None:
        """Refuses a student that was exported at other timesteps: its ControlNet would be used at those."""
        exported = None if self._weights is None else exported_timesteps(resolve_unet(self._weights))
        if exported is not None and exported != list(self.timesteps):
            raise ValueError(
                f"student.init_args.weights '{self._weights}' is a student of the timesteps {exported} by its scheduler, and "
                f"its ControlNet would be trained at {list(self.timesteps)}; set student.init_args.conditioning_timestep "
                "(timesteps, for several) to the student's."
            )


def exported_timesteps(unet: Path) -> list[int] | None:
    """The timesteps of a student by the scheduler beside its U-Net; None for weights that are no exported student.

    Args:
        unet: its U-Net folder.
    """
    scheduler_config = unet.parent / "scheduler" / "scheduler_config.json"
    if unet.name != "unet" or not scheduler_config.is_file():
        return None
    config = read_json(scheduler_config)
    kind, steps = config.get("_class_name"), config.get("original_inference_steps")
    if kind == "DDIMScheduler" and config.get("timestep_spacing") == "trailing":
        return [config.get("num_train_timesteps", 1000) - 1]  # diffusers' default
    if kind == "LCMScheduler" and isinstance(steps, int):
        from diffusers import LCMScheduler

        scheduler = LCMScheduler.from_config(config)
        scheduler.set_timesteps(steps)
        found: list[int] = scheduler.timesteps.tolist()
        return found
    return None


class ControlledFakeScore(FakeScore):
    """A fake score that sees the condition: a trained copy of the base with a ControlNet.

    Args:
        optimizer: called with the trainable parameters.
        lr_scheduler: stepped once per update of the fake score; None keeps the rate constant.
        weights: U-Net or pipeline folder to start from; None starts from the base.
        lora: trains adapters on the base's U-Net; None trains all weights of a copy.
        controlnet: the base's pretrained one, frozen (`train: false`), as in SDXS; or one that is trained, for bases without.
        controlnet_lr: learning rate of a ControlNet that is trained, in place of the optimizer's: a new one has farther to go
            than the base's U-Net, which a large rate would spoil. None is the optimizer's.
        gradient_checkpointing: recompute blocks in the backward pass: less memory, about a third more compute.
        compile_blocks: torch.compile each block; worthwhile on a GPU for runs longer than minutes.

    Raises:
        ValueError: if both weights and lora are set, or a rate for a frozen ControlNet, or one that is not above 0.
    """

    denoiser: ControlledDenoiser

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        lora: LoRA | None = None,
        controlnet: ControlNetSource = ControlNetSource(),
        controlnet_lr: float | None = None,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, weights, lora, gradient_checkpointing, compile_blocks)
        if controlnet_lr is not None and not controlnet.train:
            raise ValueError(
                f"fake_score.controlnet_lr is {controlnet_lr} and fake_score.controlnet.train false; set one of them back."
            )
        # torch checks the optimizer's own rate alone.
        if controlnet_lr is not None and not 0 < controlnet_lr < math.inf:
            raise ValueError(
                f"fake_score.controlnet_lr must be above 0, got {controlnet_lr}; null is the optimizer's own."
            )
        self.controlnet_source, self.controlnet_lr = controlnet, controlnet_lr

    def groups(self, trainable: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        """The ControlNet in a group of its own, if it has its own learning rate."""
        if self.controlnet_lr is None:
            return trainable
        own = {id(parameter) for parameter in self.denoiser.controlnet.parameters()}
        unet = [parameter for parameter in trainable if id(parameter) not in own]
        controlnet = [parameter for parameter in trainable if id(parameter) in own]
        of_controlnet: dict[str, Any] = {"params": controlnet, "lr": self.controlnet_lr}
        return [{"params": unet}, of_controlnet]

    def build(self, family: Family) -> None:
        """Loads the networks. Idempotent."""
        if hasattr(self, "denoiser"):
            return
        super().build(family)
        source, unet = self.controlnet_source, self.denoiser.unet
        controlnet = source.make(unet, family, "fake_score.controlnet")
        if self._switches[0] and source.train:
            controlnet.enable_gradient_checkpointing()
        if not source.train:
            controlnet.eval().requires_grad_(False)
        self.frozen_fingerprint = frozen_fingerprint(nn.ModuleList([unet, controlnet]))
        self.denoiser = ControlledDenoiser(
            self.denoiser, controlnet, source.conditioning_scale, None if source.train else "controlnet"
        )
        if source.lora is not None:
            save_adapters_only(self)
