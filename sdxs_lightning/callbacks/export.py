"""Exports the result of a stage at the end of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError


@runtime_checkable
class Exportable(Protocol):
    """A stage whose result can be exported."""

    export_name: str
    """What is exported, and the default folder in the run: "pipeline", "unet" or "decoder"."""

    def write_export(self, folder: Path, average: bool, dtype: torch.dtype, **options: Any) -> None:
        """Writes the folder atomically on rank 0; all ranks must call it, since weights are gathered."""


@runtime_checkable
class FakeScoreExportable(Protocol):
    """A stage with a fake score that a later one can go on from."""

    def write_fake_score(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes a U-Net folder on rank 0; all ranks must call it."""


class Export(Checkpoint):
    """Exports the result of a stage at the end of the training, after the last checkpoint.

    Distillation stages write a diffusers pipeline, `PrunedUNetDistillation` a U-Net folder (`weights` of a
    `StudentGenerator`), `DecoderDistillation` an AutoencoderTiny folder (`vae` of this class), the stages of ControlNets and
    style LoRAs a folder of these. An existing folder is replaced. The class derives from Lightning's `Checkpoint` to run after
    other callbacks; list it after `Checkpointing`, so that a full disk affects the export only.

    Args:
        folder: output folder; None is the stage's (`pipeline`, `unet`, `decoder`, `lora`, ...) in the run's folder
            (`trainer.default_root_dir`).
        average: whether to export the averaged weights instead of the current ones.
        dtype: dtype of the exported weights.
        fake_score: whether a distillation also writes its fake score, a U-Net folder `fake_score` beside the student's, from
            which a later stage can go on (`weights` of a `FakeScore`); with a ControlNet of its own this is in
            `fake_score_controlnet`.
        vae: for a pipeline, folder of a tiny autoencoder to decode with instead of the base's VAE; see `export_pipeline`.
    """

    def __init__(
        self,
        folder: str | None = None,
        average: bool = True,
        dtype: Literal["float16", "float32"] = "float16",
        vae: str | None = None,
        fake_score: bool = False,
    ) -> None:
        self.folder = folder
        self.average = average
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.vae = vae
        self.fake_score = fake_score
        self.ranks = Ranks()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that the stage can be exported.

        Raises:
            UserError: for a stage without an export, `vae` with a stage that exports no pipeline, or `fake_score` without one.
        """
        name = type(pl_module).__name__
        if not isinstance(pl_module, Exportable):
            raise UserError(f"{name} has no write_export; remove the callback Export.")
        if self.vae is not None and pl_module.export_name != "pipeline":
            raise UserError(
                f"vae of the callback Export is '{self.vae}', but {name} exports a {pl_module.export_name}, which has no VAE; "
                "set vae to null."
            )
        if self.fake_score and getattr(pl_module, "fake_score", None) is None:
            raise UserError(
                f"fake_score of the callback Export is true, and {name} has no fake score; set it to false."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the export on rank 0.

        Raises:
            CheckpointNotWritten: on all ranks, if writing failed.
        """
        assert isinstance(pl_module, Exportable)
        folder = Path(self.folder or Path(trainer.default_root_dir) / pl_module.export_name)
        options = {} if self.vae is None else {"vae": self.vae}
        problem = None
        try:
            pl_module.write_export(folder, average=self.average, dtype=self.dtype, **options)
            if self.fake_score:
                assert isinstance(pl_module, FakeScoreExportable)
                pl_module.write_fake_score(folder.parent / "fake_score", self.dtype)
        except UserError as error:  # weights that the dtype cannot hold; the other ranks wait below
            problem = str(error).rstrip(".")
        except Exception as error:
            problem = write_failure(error)
            if problem is None:
                raise
        problem = self.ranks.first_message(problem)
        if problem:
            # A resumed run that has reached its max_steps takes no step and exports nothing.
            more = f" --trainer.max_steps {trainer.global_step + 1}" if trainer.max_steps > 0 else ""
            raise CheckpointNotWritten(
                f"the {pl_module.export_name} could not be written to '{folder}' ({problem}); the last checkpoint is complete. "
                f"Make room or set another folder or dtype of the callback Export, and run again with --ckpt_path last{more}."
            )
        updates = getattr(pl_module, "student_updates", trainer.global_step)
        rank_zero_info(f"Exported the {pl_module.export_name} after {updates} updates: {folder}")
