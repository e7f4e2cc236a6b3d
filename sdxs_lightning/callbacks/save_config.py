"""The lock of a run's folder, and what is saved there of what runs: configuration, code, machines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.callbacks.run_folder import RunLock, machine, write_start
from sdxs_lightning.core.errors import UserError


class SaveConfig(SaveConfigCallback):
    """Locks the run's folder; saves the resolved configuration (config.yaml), the code's version, and what runs where."""

    lock: RunLock | None = None
    """Held by rank 0."""

    def take_lock(self, trainer: pl.Trainer) -> None:
        """Locks the run's folder. A collective, before anything in the folder changes.

        Raises:
            UserError: on all ranks, if another run has it, or it cannot be written.
        """
        self._on_first_rank(trainer, self._locked)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Saves nothing yet, unlike Lightning's: a start that is refused would leave its configuration to the earlier run."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves all of it at the first batch, when all checks have passed.

        Raises:
            UserError: on all ranks, if they cannot be written.
        """
        if not self.already_saved:
            machines = Ranks().gathered(machine(pl_module.device))
            self._on_first_rank(trainer, lambda folder: self._written(folder, machines, trainer.ckpt_path))
            self.already_saved = True

    def _locked(self, folder: Path) -> str | None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(folder)
        return self.lock.acquire()

    def _written(self, folder: Path, machines: list[dict[str, str]], resumed_from: Any) -> None:
        path = folder / self.config_filename
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)
        write_start(folder, machines, None if resumed_from is None else str(resumed_from))

    @staticmethod
    def _on_first_rank(trainer: pl.Trainer, action: Callable[[Path], str | None]) -> None:
        ranks, folder, problem = Ranks(), Path(trainer.default_root_dir), None
        if ranks.first:
            try:
                problem = action(folder)
            except OSError as error:
                problem = (
                    f"the run's folder '{folder}' cannot be written ({write_failure(error)}); give another one as "
                    "--trainer.default_root_dir, or change its permissions."
                )
        problem = ranks.first_message(problem)
        if problem:
            raise UserError(problem)
