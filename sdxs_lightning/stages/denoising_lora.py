"""A style LoRA of a base by ordinary denoising on a few images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.frozen import Dtype
from sdxs_lightning.core.noise_schedule import target_of
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.export import write_adapters
from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.ema import DenoiserEma
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.networks.network import (
    check_frozen_weights,
    frozen_fingerprint,
    load_denoiser,
    save_adapters_only,
)
from sdxs_lightning.objectives.denoising import denoising_loss
from sdxs_lightning.stages.data_sample import data_sample
from sdxs_lightning.training.averaged_training import AveragedTraining
from sdxs_lightning.training.plannable import PlannedNetwork, PlannedPhase
from sdxs_lightning.training.sharding import shard_unet, sharding_of


class DenoisingLoRA(AveragedTraining):
    """Trains adapters on a frozen U-Net by the denoising loss on images of a style (20 to 200 are usual).

    The result is a LoRA of the base, which stage `lora` (`StyleDistillation`) brings to a one-step student. On the weights of
    a one-step student itself this loss takes the one-step ability away; it is the baseline of that stage.

    Args:
        family: the base.
        optimizer: called with the adapters.
        lora: rank and layers of the adapters.
        lr_scheduler: stepped once per optimizer step; None keeps the rate constant.
        weights: U-Net or pipeline folder to adapt; None is the base's.
        timesteps: timesteps to train on.
        caption_dropout: probability of dropping a caption, so that guidance works with the style.
        ema_decay: decay per optimizer step of the averaged adapters, which are exported.
        gradient_checkpointing: recompute blocks in the backward pass: less memory, about a third more compute.
        compile_blocks: torch.compile each block; worthwhile on a GPU for runs longer than minutes.
        seed: seed of noise, timesteps and dropout, which are drawn per sample position.
        real_score_dtype: dtype of the text encoders, the frozen networks beside the adapted one; bfloat16 on GPUs.

    Raises:
        ValueError: unless caption_dropout is a share.

    Source: LoRA, arXiv:2106.09685, on the loss of DDPM, arXiv:2006.11239, eq. 14; in v for a v-prediction base.
    """

    log_prefix = "lora/"
    export_name = "lora"

    def __init__(
        self,
        family: Family,
        optimizer: OptimizerCallable,
        lora: LoRA = LoRA(),
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        timesteps: TimestepRange = TimestepRange(0, 999),
        caption_dropout: float = 0.1,
        ema_decay: float = 0.99,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        seed: int = 0,
        real_score_dtype: Dtype = "float32",
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout is a share in [0, 1], got {caption_dropout}.")
        self.family, self.lora, self.weights = family, lora, weights
        self.timesteps, self.caption_dropout, self.ema_decay = timesteps, caption_dropout, ema_decay
        self.seed = seed
        self._switches = gradient_checkpointing, compile_blocks
        self.real_score_dtype: torch.dtype = getattr(torch, real_score_dtype)
        self.ema: DenoiserEma | None = None  # built in configure_model, like all weights

    @property
    def learner(self) -> Denoiser:
        return self.denoiser

    def configure_model(self) -> None:
        """Loads the U-Net with adapters, and shards it if the strategy has a device mesh. Idempotent."""
        if self.ema is not None:
            return
        self.denoiser = load_denoiser(self.family, self.weights, self.lora, *self._switches)
        self.frozen_fingerprint = frozen_fingerprint(self.denoiser)
        save_adapters_only(self.denoiser)
        self.ema = DenoiserEma(self.denoiser, self.ema_decay)
        sharding = sharding_of(self)
        if sharding is not None:
            shard_unet(self.denoiser.unet, *sharding)
            self.ema.after_sharding()

    def on_fit_start(self) -> None:
        """Moves the frozen text encoder to the device."""
        self.family.to(self.device, self.real_score_dtype)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Denoising loss at uniformly drawn timesteps."""
        sample = data_sample(batch, self.family, self.seed, self.caption_dropout)
        schedule, kind = self.family.schedule, self.family.prediction_type
        noisy = sample.renoise(schedule, self.timesteps, Stream.TEACHER_TIMESTEP, Stream.TEACHER_NOISE)
        prediction = self.denoiser(noisy.latents, noisy.timesteps, sample.conditioning)
        target = target_of(kind, sample.latents, noisy.noise, noisy.timesteps, schedule)
        loss = denoising_loss(prediction.output, target)
        self.log("lora/loss", loss, prog_bar=True)
        return loss

    def average(self) -> None:
        assert self.ema is not None
        self.ema.follow(self.denoiser)

    def write_export(self, folder: Path, average: bool, dtype: torch.dtype) -> None:
        """Writes a folder for `pipe.load_lora_weights`."""
        assert self.ema is not None
        write_adapters(
            self.denoiser.unet, self.ema if average else None, folder, dtype, self.global_rank == 0
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds a fingerprint of the frozen weights, which checkpoints do not hold."""
        checkpoint["frozen_weights"] = {"lora": self.frozen_fingerprint}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError if the adapters were trained on other frozen weights than those loaded."""
        check_frozen_weights(
            checkpoint, {"lora": self.frozen_fingerprint}, {"lora": "model.init_args.weights"}
        )

    def plan_networks(self) -> list[PlannedNetwork]:
        assert self.ema is not None
        return [
            PlannedNetwork("denoiser", self.denoiser, "trained", self.optimizer),
            PlannedNetwork("ema", self.ema, "averaged"),
        ]

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        self.training_step(batch, 0).backward()
        yield PlannedPhase("training step", ("denoiser",))
