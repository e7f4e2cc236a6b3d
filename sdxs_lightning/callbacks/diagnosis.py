"""Detects from logged statistics that a distillation is about to collapse, and suggests what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Thresholds:
    """Values beyond which a statistic is a symptom; null switches that warning off."""

    fake_score_lag: float | None = 1.05
    """Squared error of the fake score relative to the real score's on the student's samples; at most 1 if it keeps up.
    Measured on the toy base with guidance 1.5: 0.84 to 0.91 in a good run, 1.05 to 1.09 with a frozen fake score."""
    discriminator_accuracy: float | None = 0.95
    """Share of samples and data that the discriminator classifies correctly, over all noise levels."""
    saturation: float | None = 0.02
    """Share of the student's latents beyond four standard deviations of the data; 0.001 in the toy base's good run and in its
    data, 0.03 after 48 updates with a frozen fake score."""
    diversity: float | None = 0.5
    """Diversity relative to the highest value of the run."""
    cosine: float | None = -0.8
    """Cosine between the gradients of two objectives of the student."""
    readings: int = 3
    """Consecutive readings, each a mean since the previous one, that a symptom must last before it is reported."""

    def __post_init__(self) -> None:
        if self.readings < 1:
            raise ValueError(f"thresholds.readings of Health must be 1 or more, got {self.readings}.")
        ranges = {
            "fake_score_lag": (1.0, float("inf")),
            "discriminator_accuracy": (0.5, 1.0),
            "saturation": (0.0, 1.0),
            "diversity": (0.0, 1.0),
            "cosine": (-1.0, 0.0),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(
                    f"thresholds.{name} of Health must be in [{low:g}, {high:g}] or null, got {value}."
                )


class Symptom(NamedTuple):
    """A statistic beyond its threshold."""

    cause: str
    """Short name, the same for each report."""
    sentence: str
    """Explanation with the value, and what to change."""


class Diagnosis:
    """Turns readings into warnings: one per persistent symptom, repeated only after it has disappeared.

    Args:
        thresholds: limits of each statistic.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.highest_diversity = 0.0
        self._lasting: dict[str, int] = {}

    def read(self, stats: Mapping[str, float]) -> list[str]:
        """Returns the new warnings of this reading.

        Args:
            stats: means since the last reading, by their names in the log; missing ones are not checked.
        """
        self.highest_diversity = max(self.highest_diversity, stats.get("student/diversity", 0.0))
        symptoms = {symptom.cause: symptom.sentence for symptom in self._symptoms(stats)}
        self._lasting = {cause: self._lasting.get(cause, 0) + 1 for cause in symptoms}
        return [
            f"{cause}: {sentence}"
            for cause, sentence in symptoms.items()
            if self._lasting[cause] == self.thresholds.readings
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"highest_diversity": self.highest_diversity, "lasting": dict(self._lasting)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.highest_diversity = state_dict["highest_diversity"]
        self._lasting = dict(state_dict["lasting"])

    def _symptoms(self, stats: Mapping[str, float]) -> Iterator[Symptom]:
        limits = self.thresholds
        lag, accuracy = stats.get("student/fake_score_lag"), stats.get("discriminator/accuracy")
        saturation, diversity = stats.get("student/saturation"), stats.get("student/diversity")
        if _over(lag, limits.fake_score_lag):
            yield Symptom(
                "the fake score lags behind the student",
                f"on the student's samples its squared error is {lag:.2f} times the real score's (threshold "
                f"{limits.fake_score_lag:g}; at most 1 if it kept up). Raise "
                "update_schedule.fake_score_updates_per_student_update, lower the student's learning rate, or change that of "
                "fake_score: raise it, or lower it if fake_score/loss jumps about.",
            )
        if _over(accuracy, limits.discriminator_accuracy):
            yield Symptom(
                "the discriminator wins",
                f"it tells {accuracy:.1%} of samples and data apart (threshold {limits.discriminator_accuracy:.1%}), so it "
                "has little left to teach. Lower the discriminator's learning rate or raise adversarial.student_weight; "
                "give a student that is far from the data a warm-up first.",
            )
        if _over(saturation, limits.saturation):
            yield Symptom(
                "the student's latents saturate",
                f"{saturation:.1%} lie beyond four standard deviations of the data (threshold {limits.saturation:.1%}), and "
                "guidance is the usual cause. Lower distribution_matching.guidance_scale, or the student's learning rate.",
            )
        if diversity is not None and _over(-diversity, _scaled(limits.diversity, -self.highest_diversity)):
            yield Symptom(
                "the student loses diversity",
                f"samples of one prompt are {diversity:.3f} apart, and were {self.highest_diversity:.3f} (threshold "
                f"{limits.diversity:.0%} of that). Score distillation seeks modes: lower "
                "distribution_matching.guidance_scale or the student's learning rate, or give feature matching or the "
                "discriminator more weight.",
            )
        yield from self._opposed(stats)

    def _opposed(self, stats: Mapping[str, float]) -> Iterator[Symptom]:
        limit = self.thresholds.cosine
        for name, cosine in stats.items():
            prefix, _, pair = name.partition("cosine_")
            if prefix == "student/" and limit is not None and cosine <= limit:
                yield Symptom(
                    f"two objectives of the student oppose each other ({pair})",
                    f"the cosine of their gradients is {cosine:.2f} (threshold {limit:g}), so they mostly cancel. Lower the "
                    "weight of one.",
                )


def _over(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit


def _scaled(limit: float | None, factor: float) -> float | None:
    return None if limit is None else limit * factor
