"""Writes the miniaturised student as a U-Net folder when the training ends."""

from pathlib import Path
from typing import Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.core.errors import CheckpointNotWritten
from sdxs_lightning.export import new_folder, plain_unet
from sdxs_lightning.stages.prune_distill import PrunedUNetDistillation


class ExportUNet(Checkpoint):
    """Exports the student's U-Net at the end of the training, after the last checkpoint.

    The folder is what `UNet2DConditionModel.from_pretrained` reads, and `weights` of a `StudentGenerator` or of a next
    `PrunedUNetDistillation`. It appears whole or not at all; one that is there already is replaced. List it behind
    `Checkpointing`, so that a full disk costs the export only. A finished run that is resumed takes no step and exports
    nothing; with one step more it does.

    Args:
        folder: where it goes; None is `unet` in the run's folder (`trainer.default_root_dir`).
        average: the averaged student, or the current one.
        dtype: of the file's weights.
    """

    def __init__(
        self,
        folder: str | None = None,
        average: bool = True,
        dtype: Literal["float16", "float32"] = "float16",
    ) -> None:
        self.folder = folder
        self.average = average
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.ranks = Ranks()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers the student on rank 0, which writes it.

        Raises:
            CheckpointNotWritten: on all ranks, if the disk refused.
        """
        assert isinstance(pl_module, PrunedUNetDistillation) and pl_module.ema is not None
        source = pl_module.ema.denoiser.unet if self.average else pl_module.student.unet
        folder = Path(self.folder or Path(trainer.default_root_dir) / "unet")
        weights = get_model_state_dict(
            source, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        problem = None
        if self.ranks.first:
            problem = self._write(source, cast(dict[str, Tensor], weights), folder)
        problem = self.ranks.first_message(problem)
        if problem:
            raise CheckpointNotWritten(
                f"the U-Net could not be written to '{folder}' ({problem}); the last checkpoint is complete. Make room or "
                "set another folder of ExportUNet, and run again with --ckpt_path last --trainer.max_steps "
                f"{trainer.global_step + 1}."
            )
        rank_zero_info(f"U-Net after {trainer.global_step} steps: {folder}")

    def _write(self, source: nn.Module, weights: dict[str, Tensor], folder: Path) -> str | None:
        try:
            unet = plain_unet(source, weights)
            nn.Module.to(unet, dtype=self.dtype)  # the override of diffusers warns about every cast
            with new_folder(folder) as written:
                unet.save_pretrained(written, safe_serialization=True)
        except Exception as error:
            problem = write_failure(error)
            if problem is None:
                raise
            return problem
        return None
