"""Trains a condition reader from (image, condition) pairs: what makes the way `joint` work for any paired folder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.frozen import Dtype
from sdxs_lightning.export import cast_finite, new_folder
from sdxs_lightning.families import Family
from sdxs_lightning.networks.condition_readers import ReaderNetwork, diffused
from sdxs_lightning.networks.ema import check_decay
from sdxs_lightning.stages.controlnet.control_images import control_images_of
from sdxs_lightning.training.averaged_training import AveragedTraining
from sdxs_lightning.training.plannable import PlannedNetwork, PlannedPhase


class ConditionReaderTraining(AveragedTraining):
    """Trains a `ReaderNetwork` to predict the condition image from the image, by cross-entropy per pixel.

    The images are what the base's VAE makes of the data's latents, since the reader will judge decoded samples, diffused to a
    random level, so that small changes of pixels cannot fool it.

    Args:
        family: the base, whose VAE decodes the latents.
        optimizer: called with the reader's parameters.
        lr_scheduler: stepped once per optimizer step; None keeps the rate constant.
        channels: channels of the condition images.
        widths: as in `ReaderNetwork`.
        noise: largest sigma of the noise with which images are diffused, drawn uniformly; give ConditionConsistency the same.
        ema_decay: decay per optimizer step of the averaged reader, which is exported.
        seed: seed of weights and noise.
        real_score_dtype: dtype of the family's frozen networks but the VAE, which stays float32; the hardware overlays set it.
    """

    log_prefix = "reader/"
    export_name = "condition_reader"

    def __init__(
        self,
        family: Family,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        channels: int = 3,
        widths: tuple[int, ...] = (16, 32, 64, 96),
        noise: float = 0.95,
        ema_decay: float = 0.99,
        seed: int = 0,
        real_score_dtype: Dtype = "float32",
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if not 0 <= noise < 1:
            raise ValueError(
                f"noise is a sigma in [0, 1), got {noise}; images become sqrt(1 - sigma^2) x + sigma n."
            )
        check_decay(ema_decay)
        self.family, self.noise, self.seed = family, noise, seed
        self.real_score_dtype: torch.dtype = getattr(torch, real_score_dtype)
        self.reader = ReaderNetwork(channels, tuple(widths), seed)
        self.ema = AveragedModel(self.reader, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)).requires_grad_(
            False
        )

    @property
    def learner(self) -> ReaderNetwork:
        return self.reader

    def average(self) -> None:
        self.ema.update_parameters(self.reader)

    def on_fit_start(self) -> None:
        """Moves the frozen VAE to the device."""
        self.family.to(self.device, self.real_score_dtype)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        wanted = control_images_of(batch, self.family, self.reader.channels)
        logits = self.reader.logits(self._images(batch))
        loss = F.binary_cross_entropy_with_logits(logits.float(), wanted)
        self.log_dict({"reader/loss": loss, "reader/error": (logits.sigmoid() - wanted).abs().mean()})
        return loss

    def _images(self, batch: TrainingBatch) -> Tensor:
        """Decoded latents, or the batch's images without latents, with noise: (B, 3, H, W), about [-1, 1]."""
        if batch.latents is not None:
            images = self.family.decode(self.family.scale_latents(batch.latents))
        elif batch.images is not None:
            images = batch.images
        else:
            raise ValueError(
                "this stage needs latents or images in every batch, and got neither; let data.contents name one of them."
            )
        return diffused(images, self.noise, self.seed, batch.positions)

    def write_export(self, folder: Path, average: bool, dtype: torch.dtype) -> None:
        """Writes the reader's folder, for `LearnedReader`.

        Raises:
            UserError: for weights that `dtype` cannot hold, and NaN.
        """
        if self.global_rank == 0:
            source = copy.deepcopy(cast(ReaderNetwork, self.ema.module) if average else self.reader)
            cast_finite(source, dtype)
            with new_folder(folder) as written:
                source.save_pretrained(written)

    def plan_networks(self) -> list[PlannedNetwork]:
        return [
            PlannedNetwork("condition_reader", self.reader, "trained", self.optimizer, sharded=False),
            PlannedNetwork("ema", self.ema, "averaged", sharded=False),
        ]

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        wanted = control_images_of(batch, self.family, self.reader.channels)
        F.binary_cross_entropy_with_logits(self.reader.logits(self._images(batch)), wanted).backward()
        yield PlannedPhase("training step", ("condition_reader",))
