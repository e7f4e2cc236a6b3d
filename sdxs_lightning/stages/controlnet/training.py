"""Trains a ControlNet of a many-step U-Net: by denoising, or by distilling a bigger U-Net's ControlNet into it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.frozen import Dtype, Frozen
from sdxs_lightning.core.noise_schedule import target_of
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.export import write_controlnet
from sdxs_lightning.families import Family
from sdxs_lightning.networks.controlled import ControlledDenoiser, ControlNetSource
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.ema import DenoiserEma
from sdxs_lightning.networks.feature_taps import FeatureTap
from sdxs_lightning.networks.network import (
    check_frozen_weights,
    frozen_fingerprint,
    prepare_unet,
    save_adapters_only,
)
from sdxs_lightning.objectives.knowledge_distillation import (
    FeatureDistillation,
    OutputDistillation,
    TaskLoss,
)
from sdxs_lightning.objectives.term import LatentSample, NoisyLatents
from sdxs_lightning.stages.controlnet.control_images import (
    check_dropout,
    control_images_of,
    with_some_dropped,
)
from sdxs_lightning.stages.data_sample import data_sample
from sdxs_lightning.training.averaged_training import AveragedTraining
from sdxs_lightning.training.plannable import PlannedNetwork, PlannedPhase
from sdxs_lightning.training.sharding import shard_unet, sharding_of


class ControlNetTraining(AveragedTraining):
    """Trains the ControlNet of a frozen many-step U-Net on images with conditions.

    With `task` alone this is ordinary ControlNet training (way `denoising`): for the base, when there is no pretrained
    ControlNet for a condition. With `output_distillation` and `feature_distillation` it fits the ControlNet of a pruned U-Net
    to the base with its ControlNet, which starts the way `pretrained`.

    Args:
        family: the base.
        optimizer: called with the trainable parameters of the ControlNet.
        lr_scheduler: stepped once per optimizer step; None keeps the rate constant.
        weights: U-Net or pipeline folder that the ControlNet is for, a many-step one; None is the base.
        controlnet: the ControlNet.
        task: denoising loss on the data; None disables it.
        base_controlnet: folder or hub id of the base's ControlNet, for the two losses below.
        output_distillation: distance between the outputs of both; None disables it.
        feature_distillation: distances between the features of both; by default of the up stages, outermost with outermost.
            None disables it.
        timesteps: timesteps at which it is trained.
        ema_decay: decay per optimizer step of the averaged ControlNet, which is exported.
        caption_dropout: probability of dropping a caption, so that the ControlNet works without a prompt too.
        condition_dropout: share of the samples whose condition image is black.
        gradient_checkpointing: recompute blocks in the backward pass: less memory, about a third more compute.
        compile_blocks: torch.compile the blocks of the U-Nets; worthwhile on a GPU for runs longer than minutes.
        seed: seed of noise, timesteps and dropout, which are drawn per sample position.
        real_score_dtype: dtype of the frozen networks, U-Nets and text encoders; bfloat16 on GPUs.

    Raises:
        ValueError: if the arguments are inconsistent.

    Source: ControlNet, arXiv:2302.05543, eq. 5, as diffusers' examples/controlnet trains it; for the distillation SDXS,
        arXiv:2403.16627, section 3.4: L_OKD, and L_FKD on the up stages.
    """

    log_prefix = "controlnet/"
    export_name = "controlnet"

    def __init__(
        self,
        family: Family,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        controlnet: ControlNetSource = ControlNetSource(),
        task: TaskLoss | None = TaskLoss(),
        base_controlnet: str | None = None,
        output_distillation: OutputDistillation | None = None,
        feature_distillation: FeatureDistillation | None = None,
        timesteps: TimestepRange = TimestepRange(0, 999),
        ema_decay: float = 0.999,
        caption_dropout: float = 0.0,
        condition_dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        seed: int = 0,
        real_score_dtype: Dtype = "float32",
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.family, self.weights, self.controlnet_source = family, weights, controlnet
        self.task, self.base_controlnet = task, base_controlnet
        self.output_distillation, self.feature_distillation = output_distillation, feature_distillation
        self.timesteps, self.ema_decay, self.seed = timesteps, ema_decay, seed
        self.caption_dropout, self.condition_dropout = caption_dropout, condition_dropout
        self.gradient_checkpointing, self.compile_blocks = gradient_checkpointing, compile_blocks
        self.real_score_dtype: torch.dtype = getattr(torch, real_score_dtype)
        self.ema: DenoiserEma | None = None  # built in configure_model, like all weights
        self.teacher: Frozen[ControlledDenoiser] | None = None
        self.taps: dict[str, str] = {}
        """Block of the trained U-Net -> block of the base."""
        self._check_parts()

    # ------------------------------------------------------------------------------------------------ the training step

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        terms = self._terms(batch)
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict(
            {f"controlnet/{name}": value.detach() for name, value in (terms | {"loss": loss}).items()}
        )
        return loss

    def _terms(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The weighted loss terms."""
        sample = self._sample(batch)
        schedule = self.family.schedule
        noisy = sample.renoise(schedule, self.timesteps, Stream.TEACHER_TIMESTEP, Stream.TEACHER_NOISE)
        output, features = self._predict(self.controlled, list(self.taps), noisy, sample)
        terms: dict[str, Tensor] = {}
        if self.task is not None:
            kind = self.family.prediction_type
            target = target_of(kind, sample.latents, noisy.noise, noisy.timesteps, schedule)
            terms["task"] = self.task.loss(output, target)
        if self.teacher is None:
            return terms
        with torch.no_grad():
            wanted, seen = self._predict(self.teacher.module, list(self.taps.values()), noisy, sample)
        if self.output_distillation is not None:
            terms["output"] = self.output_distillation.loss(output, wanted)
        if self.feature_distillation is not None:
            paired = {own: seen[block] for own, block in self.taps.items()}
            losses = self.feature_distillation.losses(features, paired)
            terms["features"] = torch.stack(list(losses.values())).sum()
        return terms

    def _sample(self, batch: TrainingBatch) -> LatentSample:
        sample = data_sample(batch, self.family, self.seed, self.caption_dropout)
        channels = self.controlled.controlnet.config["conditioning_channels"]
        controls = control_images_of(batch, self.family, channels)
        controls = with_some_dropped(controls, self.condition_dropout, self.seed, batch.positions)
        return replace(sample, conditioning=replace(sample.conditioning, control_images=controls))

    @staticmethod
    def _predict(
        denoiser: Denoiser, blocks: list[str], noisy: NoisyLatents, sample: LatentSample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the network's raw output (epsilon or v), and its features by block."""
        if not blocks:
            return denoiser(noisy.latents, noisy.timesteps, sample.conditioning).output, {}
        with FeatureTap(denoiser.unet, *blocks) as tap:
            prediction = denoiser(noisy.latents, noisy.timesteps, sample.conditioning)
        return prediction.output, {block: tap[block] for block in blocks}

    # -------------------------------------------------------------------------------------------------- building, saving

    def configure_model(self) -> None:
        """Loads the networks, and shards each if the strategy has a device mesh. Idempotent."""
        if self.ema is not None:
            return
        unet = self.family.load_unet(self.weights)
        controlnet = self.controlnet_source.make(unet, self.family, "controlnet")
        if self.gradient_checkpointing:
            controlnet.enable_gradient_checkpointing()
        unet.requires_grad_(False)
        self.frozen_fingerprint = frozen_fingerprint(nn.ModuleList([unet, controlnet]))
        scale = self.controlnet_source.conditioning_scale
        self.controlled = ControlledDenoiser(self._denoiser(unet), controlnet, scale, "unet")
        self.ema = DenoiserEma(self.controlled, self.ema_decay)
        if self.controlnet_source.lora is not None:
            save_adapters_only(self.controlled)
        if self.base_controlnet is not None:
            self.teacher = self._load_teacher()
        self.taps = self._pair_blocks()
        # nn.Module's own to(): that of diffusers warns about every cast.
        nn.Module.to(unet, dtype=self.real_score_dtype)
        sharding = sharding_of(self)
        if sharding is not None:
            frozen = [] if self.teacher is None else self.teacher.module.networks
            for network in (*self.controlled.networks, self.ema.denoiser.networks[1], *frozen):
                shard_unet(network, *sharding)

    def _denoiser(self, unet: object) -> Denoiser:
        prepared = prepare_unet(unet, self.gradient_checkpointing, self.compile_blocks)
        return Denoiser(prepared, self.family.schedule, self.family.prediction_type)

    def _load_teacher(self) -> Frozen[ControlledDenoiser]:
        source = ControlNetSource(self.base_controlnet, train=False)
        base = self._denoiser(self.family.load_unet())
        controlnet = source.make(base.unet, self.family, "base_controlnet")
        return Frozen(ControlledDenoiser(base, controlnet)).to(dtype=self.real_score_dtype)

    def _pair_blocks(self) -> dict[str, str]:
        objective = self.feature_distillation
        if objective is None or self.teacher is None:
            return {}
        own, base = (len(one.up_blocks) for one in (self.controlled.unet, self.teacher.module.unet))
        return objective.pairs({f"up_blocks.{own - i}": f"up_blocks.{base - i}" for i in range(1, own + 1)})

    @property
    def learner(self) -> ControlledDenoiser:
        return self.controlled

    def average(self) -> None:
        """Moves the averaged ControlNet towards the ControlNet."""
        assert self.ema is not None
        self.ema.follow(self.controlled)

    def write_export(self, folder: Path, average: bool, dtype: torch.dtype) -> None:
        """Writes a ControlNet folder in diffusers' layout."""
        assert self.ema is not None
        source = self.ema.denoiser if average else self.controlled
        assert isinstance(source, ControlledDenoiser)
        write_controlnet(source.controlnet, folder, dtype, first_rank=self.global_rank == 0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds a fingerprint of the frozen weights, which checkpoints do not hold."""
        checkpoint["frozen_weights"] = {"controlnet": self.frozen_fingerprint}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError if the ControlNet was trained on another frozen U-Net than the one loaded."""
        check_frozen_weights(
            checkpoint, {"controlnet": self.frozen_fingerprint}, {"controlnet": "model.init_args.weights"}
        )

    def on_fit_start(self) -> None:
        """Moves the frozen networks, which Lightning does not know about."""
        self.family.to(self.device, self.real_score_dtype)
        if self.teacher is not None:
            self.teacher.to(self.device)

    def plan_networks(self) -> list[PlannedNetwork]:
        assert self.ema is not None
        networks = [
            PlannedNetwork("controlnet", self.controlled, "trained", self.optimizer),
            PlannedNetwork("ema", self.ema, "averaged"),
            PlannedNetwork("unet", self.controlled.unet, "frozen"),
        ]
        if self.teacher is not None:
            networks.append(PlannedNetwork("teacher", self.teacher.module, "frozen"))
        return networks

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        torch.stack(list(self._terms(batch).values())).sum().backward()
        yield PlannedPhase("training step", ("controlnet",))

    def _check_parts(self) -> None:
        distils = self.output_distillation is not None or self.feature_distillation is not None
        if self.task is None and not distils:
            raise ValueError("the ControlNet has no objective: set task, or output_distillation, or both.")
        if distils != (self.base_controlnet is not None):
            raise ValueError(
                "base_controlnet goes together with output_distillation or feature_distillation, got base_controlnet "
                f"{self.base_controlnet}: set it to the base's ControlNet, or both losses to null."
            )
        if not self.controlnet_source.train:
            raise ValueError("controlnet.train is false, and this ControlNet is what is trained.")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is a share in [0, 1], got {self.caption_dropout}.")
        check_dropout("condition_dropout", self.condition_dropout)
