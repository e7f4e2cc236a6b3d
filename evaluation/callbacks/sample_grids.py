"""Toy scores and sample grids of the averaged student during distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from evaluation.callbacks.progress import ProgressBar, Throughput
from evaluation.callbacks.score_curve import ScoreCurve
from evaluation.callbacks.student_updates import (
    StudentUpdateCallback,
    averaged_student,
    check_counts,
    vae_on_device,
)
from evaluation.images.prompt_files import read_prompts
from evaluation.protocols.protocols import get_protocol
from evaluation.reports.grids import sheet
from evaluation.runner.scores import ProtocolNetworks, score_images
from sdxs_lightning.stages.distillation.step import OneStepDistillation

__all__ = ["DistillationMetrics", "ProgressBar", "SampleGrids", "Throughput", "averaged_student"]


class DistillationMetrics(ScoreCurve):
    """FID, CLIP score and caption accuracy of the averaged student under a toy protocol.

    Args:
        every_n_student_updates: measuring interval.
        protocol: a toy protocol; tune settings on `toy-val`, not on `toy`.
        samples: number of images, None for the protocol's; FID depends on it.
        batch_size: images per call on each device.
        at_start: also before the first update.
        clip: open_clip folder, None for the protocol's.
        classifier: attribute classifier's folder, None for the protocol's.
        reference: npz of the reference's statistics, None for the protocol's.
    """

    def __init__(
        self,
        every_n_student_updates: int = 50,
        protocol: str = "toy-val",
        samples: int | None = None,
        batch_size: int = 100,
        at_start: bool = True,
        clip: str | None = None,
        classifier: str | None = None,
        reference: str | None = None,
    ) -> None:
        super().__init__(every_n_student_updates, at_start)
        check_counts(type(self).__name__, samples=samples, batch_size=batch_size)
        changes = {"samples": samples, "clip": clip, "classifier": classifier, "reference": reference}
        self.protocol = get_protocol(protocol, **changes)
        self.batch_size = batch_size
        self._networks: ProtocolNetworks | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Loads the metric networks, so that a missing one is reported before training starts."""
        self._networks = self._networks or ProtocolNetworks.load(self.protocol)

    def scores_of(self, trainer: pl.Trainer, module: OneStepDistillation) -> dict[str, float]:
        assert self._networks is not None
        ranks = trainer.global_rank, trainer.world_size
        maker = averaged_student(trainer, module, self.protocol.seed)
        prompts = self.protocol.captions()
        return score_images(maker, prompts, self._networks, module.device, self.batch_size, *ranks).as_dict()

    def protocol_id(self) -> dict[str, Any]:
        return {"protocol": self.protocol.name, "hash": self.protocol.fingerprint()}

    def networks(self) -> list[Any]:
        return [] if self._networks is None else [self._networks.clip, self._networks.classifier]


class SampleGrids(StudentUpdateCallback):
    """Images of the averaged student for fixed prompts and noise, as PNG files and in TensorBoard or Weights & Biases.

    Args:
        every_n_student_updates: interval.
        prompts: captions or a file of captions, of which the first `images` are taken; None takes the protocol's.
        images: number of images.
        protocol: a toy protocol, for prompts and seed.
        folder: for the PNG files; None means `samples` in the trainer's default_root_dir.
        at_start: also before the first update.
    """

    decodes_images = True
    """Tells the memory plan that the VAE is on the device."""

    def __init__(
        self,
        every_n_student_updates: int = 50,
        prompts: list[str] | str | None = None,
        images: int = 10,
        protocol: str = "toy-val",
        folder: str | None = None,
        at_start: bool = True,
    ) -> None:
        super().__init__(every_n_student_updates, at_start)
        check_counts(type(self).__name__, images=images)
        chosen = get_protocol(protocol, samples=images)
        if isinstance(prompts, str):
            prompts = list(read_prompts(prompts).captions[:images])
        self.prompts = prompts if prompts is not None else chosen.captions()
        self.seed, self.folder = chosen.seed, folder

    def at_student_update(self, trainer: pl.Trainer, module: OneStepDistillation) -> None:
        """Generates on all ranks, as sharded networks require; writes on the first."""
        with vae_on_device(module):
            maker = averaged_student(trainer, module, self.seed)
            images_uint8 = maker(self.prompts, torch.arange(len(self.prompts))).cpu()
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder) if self.folder is not None else Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        page = sheet({f"update\n{module.student_updates}": images_uint8}, self.prompts)
        page.save(folder / f"update_{module.student_updates:08d}.png")
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", np.asarray(page), step, dataformats="HWC")
            elif hasattr(logger, "log_image"):  # WandbLogger, which needs the extra `wandb`
                logger.log_image("samples", [page], step=step)
