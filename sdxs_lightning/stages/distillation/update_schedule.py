"""Which networks are updated on which iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sdxs_lightning.core.batch import TrainingBatch


class Updates(NamedTuple):
    """The networks that one iteration updates."""

    student: bool
    """Whether the student is updated; it comes first."""
    fake_score: bool
    """Whether fake score and discriminator are updated."""
    warmup: bool
    """Whether the student uses the warm-up's loss terms."""


@dataclass(frozen=True)
class UpdateSchedule:
    """Warm-up; then fake score and discriminator only; then these on every iteration, and the student on every r-th.

    An iteration is `accumulate_grad_batches` micro-batches. With `fake_score_updates_per_sample` k it updates fake score and
    discriminator k times, and the student on every r/k-th.
    """

    max_student_updates: int
    """Number of student updates, including the warm-up's, after which the run ends."""
    fake_score_updates_per_student_update: int = 5
    """The ratio r: 10 for SD-1.5 and 5 for SDXL in DMD2."""
    fake_score_updates_per_sample: int = 1
    """Updates of fake score and discriminator on one batch of the student's samples, each with its own noise and timesteps;
    divides the ratio. The student does not change between them, so its pass, and the prompts', are saved."""
    fake_score_every_nth_sample: int = 1
    """Fake score and discriminator learn from every n-th sample of a batch, which n divides: their batch is smaller than the
    student's, and between student updates only these samples are made."""
    warmup_updates: int = 0
    """Student updates on the warm-up's terms, usually on the target sampler's pairs; no other network has a loss then, unless
    `adversarial.phase` says so, and `fake_score.alignment` acts already. The student's optimizer begins anew after them, as
    in a stage of its own."""
    fake_score_only_iterations: int = 0
    """Iterations after the warm-up without a student update: an untrained discriminator, and a fake score that has not seen the
    student's samples, would mislead the student."""

    def __post_init__(self) -> None:
        for name in ("warmup_updates", "fake_score_only_iterations"):
            if getattr(self, name) < 0:
                raise ValueError(f"update_schedule.{name} must be 0 or more, got {getattr(self, name)}.")
        if self.fake_score_updates_per_student_update < 1:
            raise ValueError(
                f"update_schedule.fake_score_updates_per_student_update must be 1 or more, got "
                f"{self.fake_score_updates_per_student_update}."
            )
        uses = self.fake_score_updates_per_sample
        if uses < 1 or self.fake_score_updates_per_student_update % uses:
            raise ValueError(
                f"update_schedule.fake_score_updates_per_sample must divide fake_score_updates_per_student_update "
                f"({self.fake_score_updates_per_student_update}), got {uses}."
            )
        if self.fake_score_every_nth_sample < 1:
            raise ValueError(
                f"update_schedule.fake_score_every_nth_sample must be 1 or more, got {self.fake_score_every_nth_sample}."
            )
        if self.max_student_updates < max(1, self.warmup_updates):
            raise ValueError(
                f"update_schedule.max_student_updates counts the warm-up too, so it must be at least 1 and at least "
                f"warmup_updates ({self.warmup_updates}), got {self.max_student_updates}."
            )

    @property
    def distils(self) -> bool:
        """Whether the run goes on after the warm-up."""
        return self.max_student_updates > self.warmup_updates

    @property
    def student_every(self) -> int:
        """Every so many iterations after the warm-up and the fake score's head start one updates the student."""
        return self.fake_score_updates_per_student_update // self.fake_score_updates_per_sample

    def for_fake_score(self, batch: TrainingBatch) -> TrainingBatch:
        """The part of a batch that fake score and discriminator learn from.

        Raises:
            ValueError: if `fake_score_every_nth_sample` does not divide its size; ranks would have parts of different sizes.
        """
        nth = self.fake_score_every_nth_sample
        return batch.every(nth, "update_schedule.fake_score_every_nth_sample")

    def progress(self, student_updates: int) -> float:
        """Completed share of the student updates after the warm-up: 0 at the first of them, 1 at the last."""
        first, last = self.warmup_updates, self.max_student_updates - 1
        return min(max((student_updates - first) / max(last - first, 1), 0.0), 1.0)

    def updates_at(self, index: int) -> Updates:
        """The networks that the iteration of this index, counted from 0, updates."""
        index -= self.warmup_updates
        if index < 0:
            return Updates(student=True, fake_score=False, warmup=True)
        index -= self.fake_score_only_iterations
        if index < 0:
            return Updates(student=False, fake_score=True, warmup=False)
        return Updates(student=index % self.student_every == 0, fake_score=True, warmup=False)
