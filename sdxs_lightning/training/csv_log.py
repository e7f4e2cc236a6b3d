"""The scalars of a run in one CSV file, however often it is interrupted and resumed."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from sdxs_lightning.training.run_logs import RunLog, renamed_aside


class RunCSVLogger(RunLog, CSVLogger):
    """Writes SAVE_DIR/NAME/metrics.csv; a resumed run continues the file, where Lightning's begins `version_1`.

    A resumed run replaces the rows from its first logged step on, which it computes again. A new run renames the file of
    an earlier one to metrics-1.csv, metrics-2.csv, ...

    Args:
        save_dir: the run's folder.
        name: folder in it.
        flush_logs_every_n_steps: batches between two writes of the file.
    """

    def __init__(self, save_dir: str, name: str = "logs", flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir, name=name, version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The file."""
        if self._experiment is None:
            self._experiment = _ContinuedFile(self.log_dir, self.resumed)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment


class _ContinuedFile(ExperimentWriter):
    def __init__(self, log_dir: str, resumed: bool) -> None:
        self._earlier = resumed and Path(log_dir, self.NAME_METRICS_FILE).is_file()
        super().__init__(log_dir)

    def save(self) -> None:
        """Appends what was logged since the last time."""
        if self._earlier and self.metrics:
            self._drop_rows_from(min(int(row["step"]) for row in self.metrics))
            self._earlier = False
        super().save()

    def _check_log_dir_exists(self) -> None:
        """Keeps the file of an earlier run; Lightning's deletes it."""
        if not self._earlier:
            renamed_aside(Path(self.metrics_file_path))

    def _drop_rows_from(self, step: int) -> None:
        with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if row["step"] and int(row["step"]) < step]
            self.metrics_keys = list(reader.fieldnames or ())
        with open(self.metrics_file_path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
