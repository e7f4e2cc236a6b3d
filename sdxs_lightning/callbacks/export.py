"""Writes the student as a pipeline when the training ends."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, cast

import lightning.pytorch as pl
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.core.errors import CheckpointNotWritten
from sdxs_lightning.export import export_pipeline, plain_unet
from sdxs_lightning.networks.ema import StudentEma
from sdxs_lightning.stages.distillation.step import OneStepDistillation


class ExportPipeline(Checkpoint):
    """Exports the one-step pipeline at the end of the training, after the last checkpoint.

    It derives from Lightning's `Checkpoint` to run after the measuring callbacks; list it behind `Checkpointing`, so that a
    full disk costs the export only.

    Args:
        folder: where the pipeline goes; None is `pipeline` in the run's folder (`trainer.default_root_dir`).
        average: the averaged student, or the current one.
        dtype: of the files' weights.
        vae: folder of a tiny autoencoder to decode with instead of the base's VAE; see `export_pipeline`.
    """

    def __init__(
        self,
        folder: str | None = None,
        average: bool = True,
        dtype: Literal["float16", "float32"] = "float16",
        vae: str | None = None,
    ) -> None:
        self.folder = folder
        self.vae = vae
        self.average = average
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.ranks = Ranks()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers the student on rank 0, which writes it.

        Raises:
            CheckpointNotWritten: on all ranks, if the disk refused.
        """
        assert isinstance(pl_module, OneStepDistillation) and pl_module.ema is not None
        source = pl_module.ema if self.average else pl_module.student
        folder = Path(self.folder or Path(trainer.default_root_dir) / "pipeline")
        with source.applied() if isinstance(source, StudentEma) else nullcontext():
            weights = get_model_state_dict(
                source.denoiser.unet, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            # Inside, because these are the U-Net's own tensors where nothing has to be gathered or moved.
            unet = (
                plain_unet(source.denoiser.unet, cast(dict[str, Tensor], weights))
                if self.ranks.first
                else None
            )
        problem = None
        if unet is not None:
            problem = self._write(pl_module, unet, folder, source.timesteps)
        problem = self.ranks.first_message(problem)
        if problem:
            raise CheckpointNotWritten(
                f"the pipeline could not be written to '{folder}' ({problem}); the last checkpoint is complete. Make room or "
                "set another folder of ExportPipeline, and run again with --ckpt_path last."
            )
        rank_zero_info(f"Pipeline of student update {pl_module.student_updates}: {folder}")

    def _write(
        self, module: OneStepDistillation, unet: UNet2DConditionModel, folder: Path, timesteps: Sequence[int]
    ) -> str | None:
        try:
            export_pipeline(unet, module.family, folder, dtype=self.dtype, vae=self.vae, timesteps=timesteps)
        except Exception as error:
            problem = write_failure(error)
            if problem is None:
                raise
            return problem
        return None
