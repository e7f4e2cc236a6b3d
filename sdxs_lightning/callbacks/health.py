"""Monitors a distillation and warns, with the likely cause, when it is about to collapse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sdxs_lightning.callbacks.diagnosis import Diagnosis, Thresholds
from sdxs_lightning.callbacks.sample_diversity import BottleneckFeatures, measure_diversity
from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.objectives.matched_features import MatchedFeatures
from sdxs_lightning.stages.distillation.step import OneStepDistillation

WATCHED = ("student/fake_score_lag", "student/saturation", "student/cosine_", "discriminator/accuracy")
"""Prefixes of the logged names that are averaged between readings."""


class Health(Callback):
    """Measures diversity, averages the stage's logged statistics, and warns; every n student updates.

    The stage's logged statistics (score gap and lag, saturation, gradient norms and cosines, the discriminator's accuracy) are
    summed on the device at each student update and copied to the host only for a reading, which avoids other
    synchronisation. The readings are rank 0's.

    Args:
        every_n_student_updates: interval between readings.
        thresholds: limits, and for how many readings a symptom must last.
        prompts: prompts for diversity; None takes the first captions of the run's first batch.
        diversity_prompts: number of prompts used; 0 disables diversity.
        samples_per_prompt: number of samples compared per prompt.
        features: features in which samples are compared; None is `BottleneckFeatures`.

    Raises:
        ValueError: for counts below their minimum.
    """

    def __init__(
        self,
        every_n_student_updates: int = 50,
        thresholds: Thresholds = Thresholds(),
        prompts: list[str] | None = None,
        diversity_prompts: int = 4,
        samples_per_prompt: int = 8,
        features: MatchedFeatures | None = None,
    ) -> None:
        counts = {
            "every_n_student_updates": (every_n_student_updates, 1),
            "diversity_prompts": (diversity_prompts, 0),
            "samples_per_prompt": (samples_per_prompt, 2),
        }
        for name, (value, least) in counts.items():
            if value < least:
                raise ValueError(f"Health.{name} must be {least} or more, got {value}.")
        self.every_n_student_updates = every_n_student_updates
        self.prompts = prompts
        self.diversity_prompts = diversity_prompts
        self.samples_per_prompt = samples_per_prompt
        self.features: MatchedFeatures = BottleneckFeatures() if features is None else features
        self.diagnosis = Diagnosis(thresholds)
        self.warnings: list[str] = []
        """All warnings of this process."""
        self._sums: dict[str, Tensor] = {}
        self._counted: dict[str, int] = {}
        self._seen_updates = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the stage.

        Raises:
            UserError: for a stage other than OneStepDistillation.
        """
        if not isinstance(pl_module, OneStepDistillation):
            raise UserError(
                f"Health follows a OneStepDistillation, not a {type(pl_module).__name__}; take it out of trainer.callbacks."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the feature network; the counters of a resumed run are restored by now.

        Raises:
            ValueError: if the features need a network that the stage does not have.
        """
        assert isinstance(pl_module, OneStepDistillation)
        self._seen_updates = pl_module.student_updates
        if self.diversity_prompts:
            self._check_features(pl_module)
            self.features.build(pl_module.family)
            self.features.to(pl_module.device, pl_module.real_score_dtype)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainingBatch,
        batch_idx: int,
    ) -> None:
        """Accumulates on the student's iterations; reads every n student updates."""
        assert isinstance(pl_module, OneStepDistillation)
        if self.prompts is None:
            self.prompts = list(batch.captions)
        updates, seen = pl_module.student_updates, self._seen_updates
        if updates == seen:
            return
        self._seen_updates = updates
        self._sum(trainer.callback_metrics)
        if updates // self.every_n_student_updates > seen // self.every_n_student_updates:
            self.read(trainer, pl_module)

    def read(self, trainer: pl.Trainer, module: OneStepDistillation) -> None:
        """Measures and logs diversity, and warns about symptoms. All ranks must call it; synchronises with the device."""
        stats = self._means()
        if self.diversity_prompts:
            stats["student/diversity"] = float(self._diversity(trainer, module))
            self._log(trainer, "student/diversity", stats["student/diversity"])
        for warning in self.diagnosis.read(stats):
            self.warnings.append(warning)
            rank_zero_warn(f"Student update {module.student_updates}: {warning}")

    def state_dict(self) -> dict[str, Any]:
        """The prompts, and the history that a resumed run continues."""
        return {"prompts": self.prompts, "diagnosis": self.diagnosis.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.prompts = state_dict["prompts"]
        self.diagnosis.load_state_dict(state_dict["diagnosis"])

    def _check_features(self, module: OneStepDistillation) -> None:
        available = module.real_score is not None
        if isinstance(self.features, BottleneckFeatures):
            available = available or module.fake_score is not None
        elif not self.features.needs_real_score:
            available = True
        if not available:
            raise ValueError(
                f"Health compares samples by {type(self.features).__name__}, and this stage has no network that computes them; "
                "give features of an image network as Health.features, or set diversity_prompts to 0."
            )

    def _sum(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            if name.startswith(WATCHED):
                before = self._sums.get(name)
                self._sums[name] = value.detach().clone() if before is None else before + value.detach()
                self._counted[name] = self._counted.get(name, 0) + 1

    def _means(self) -> dict[str, float]:
        if not self._sums:
            return {}
        sums = torch.stack([value.reshape(()).float() for value in self._sums.values()]).tolist()
        means = {name: value / self._counted[name] for name, value in zip(self._sums, sums, strict=True)}
        self._sums, self._counted = {}, {}
        return means

    def _diversity(self, trainer: pl.Trainer, module: OneStepDistillation) -> Tensor:
        assert self.prompts is not None
        captions = self.prompts[: self.diversity_prompts]
        with trainer.precision_plugin.forward_context():
            return measure_diversity(
                module.student,
                module.family,
                module.context,
                self.features,
                captions,
                self.samples_per_prompt,
            )

    @staticmethod
    def _log(trainer: pl.Trainer, name: str, value: float) -> None:
        """Logs directly: `log` would drop values between two multiples of `log_every_n_steps`."""
        for logger in trainer.loggers:
            logger.log_metrics({name: value}, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics[name] = torch.tensor(value)
