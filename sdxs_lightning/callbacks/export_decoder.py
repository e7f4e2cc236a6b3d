"""Writes the tiny decoder as an AutoencoderTiny folder when the training ends."""

from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import torch
from diffusers import AutoencoderTiny
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.core.errors import CheckpointNotWritten
from sdxs_lightning.export import new_folder
from sdxs_lightning.stages.decoder import DecoderDistillation


class ExportDecoder(Checkpoint):
    """Exports the decoder at the end of the training, after the last checkpoint.

    The folder is what `AutoencoderTiny.from_pretrained` reads and what `ExportPipeline.vae` and a diffusers pipeline's `vae`
    take. List it behind `Checkpointing`, so that a full disk costs the export only.

    Args:
        folder: where it goes; None is `decoder` in the run's folder (`trainer.default_root_dir`).
        average: the averaged decoder, or the current one.
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
        """Rank 0 writes; the decoder is whole on every rank.

        Raises:
            CheckpointNotWritten: on all ranks, if the disk refused.
        """
        assert isinstance(pl_module, DecoderDistillation) and pl_module.average is not None
        folder = Path(self.folder or Path(trainer.default_root_dir) / "decoder")
        source = pl_module.average.decoder if self.average else pl_module.decoder.decoder
        problem = None
        if self.ranks.first:
            problem = self._write(pl_module, source, folder)
        problem = self.ranks.first_message(problem)
        if problem:
            raise CheckpointNotWritten(
                f"the decoder could not be written to '{folder}' ({problem}); the last checkpoint is complete. Make room or "
                "set another folder of ExportDecoder, and run again with --ckpt_path last."
            )
        rank_zero_info(f"Decoder of update {pl_module.student_updates}: {folder}")

    def _write(self, module: DecoderDistillation, source: nn.Module, folder: Path) -> str | None:
        weights: dict[str, Tensor] = {
            # The files hold plain layouts; channels_last is how the decoder trains.
            name: tensor.detach().to("cpu", memory_format=torch.contiguous_format)
            for name, tensor in source.state_dict().items()
        }
        try:
            autoencoder: AutoencoderTiny = module.decoder.autoencoder(weights)
            with new_folder(folder) as written:
                autoencoder.to(dtype=self.dtype).save_pretrained(written, safe_serialization=True)
        except Exception as error:
            problem = write_failure(error)
            if problem is None:
                raise
            return problem
        return None
