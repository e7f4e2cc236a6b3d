"""Knowledge distillation of a smaller network: the teacher's output, its features, and the data itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sdxs_lightning.objectives.checks import check_same_shape, check_weight
from sdxs_lightning.objectives.denoising import denoising_loss


def output_distillation_loss(output: Tensor, teacher_output: Tensor) -> Tensor:
    """Mean square of output - teacher_output.

    Args:
        output: (B, 4, h, w), float, what the student returned at x_t: epsilon or v.
        teacher_output: same shape, the teacher's at the same x_t; gets no gradient.

    Returns:
        (), float32.

    Raises:
        ValueError: unless the shapes agree.

    Source: L_OKD of BK-SDM, arXiv:2305.15798, section 3.2, and of SDXS, arXiv:2403.16627, section 3.1; both write a norm, the
        mean is BK-SDM's implementation.
    """
    check_same_shape(output=output, teacher_output=teacher_output)
    return (output.float() - teacher_output.detach().float()).square().mean()


def feature_distillation_losses(
    features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean square of the difference at each tap, over batch, channels and places.

    Args:
        features: the student's, by name of the tap; of any shape, float.
        teacher_features: the teacher's at the same taps, of the same shapes; get no gradient.

    Returns:
        (), float32, for each tap.

    Raises:
        ValueError: unless names and shapes agree.

    Source: L_FKD of BK-SDM, arXiv:2305.15798, and of SDXS, arXiv:2403.16627: the sum of these over the remaining stages.
    """
    if features.keys() != teacher_features.keys():
        raise ValueError(
            f"student and teacher need the same taps, got {sorted(features)} and {sorted(teacher_features)}."
        )
    losses = {}
    for tap, own in features.items():
        wanted = teacher_features[tap]
        if own.shape != wanted.shape:
            raise ValueError(
                f"the features at tap {tap} have shape {tuple(own.shape)} in the student and {tuple(wanted.shape)} in the "
                "teacher; pair it with another block in feature_distillation.taps, or leave it out by tap_weights."
            )
        losses[tap] = (own.float() - wanted.detach().float()).square().mean()
    return losses


@dataclass(frozen=True)
class OutputDistillation:
    """Settings of the distance between the two networks' outputs."""

    weight: float = 1.0
    """Factor of the loss. BK-SDM: 1."""

    def __post_init__(self) -> None:
        check_weight("OutputDistillation", weight=self.weight)

    def loss(self, output: Tensor, teacher_output: Tensor) -> Tensor:
        """Weighted `output_distillation_loss`: (), float32."""
        return self.weight * output_distillation_loss(output, teacher_output)


@dataclass(frozen=True)
class FeatureDistillation:
    """Settings of the distances between the two networks' features."""

    weight: float = 1.0
    """Factor of the sum over taps. BK-SDM: 1."""
    taps: dict[str, str] | None = None
    """Block of the student -> block of the teacher, by module name; null pairs the stages that the topology kept."""
    tap_weights: dict[str, float | None] | None = None
    """Factor of a tap, by block of the student, where it is not 1; null there leaves the tap out."""

    def __post_init__(self) -> None:
        check_weight("FeatureDistillation", weight=self.weight)
        for tap, weight in (self.tap_weights or {}).items():
            if weight is not None:
                check_weight("FeatureDistillation", **{f"tap_weights.{tap}": weight})

    def pairs(self, default: Mapping[str, str]) -> dict[str, str]:
        """The taps in use: block of the student -> block of the teacher.

        Args:
            default: the pairs where none are given.

        Raises:
            ValueError: for a weight without tap, or if no tap is left.
        """
        pairs, weights = dict(default if self.taps is None else self.taps), self.tap_weights or {}
        unknown = sorted(set(weights) - set(pairs))
        if unknown:
            raise ValueError(
                f"feature_distillation.tap_weights names {', '.join(unknown)}, but the taps are {', '.join(pairs)}."
            )
        kept = {own: wanted for own, wanted in pairs.items() if weights.get(own, 1.0) is not None}
        if not kept:
            raise ValueError("feature_distillation has no tap left; to do without features, set it to null.")
        return kept

    def losses(
        self, features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Weighted `feature_distillation_losses` by tap; their sum is the loss."""
        weights = self.tap_weights or {}
        unweighted = feature_distillation_losses(features, teacher_features)
        return {tap: self.weight * (weights.get(tap) or 1.0) * loss for tap, loss in unweighted.items()}


@dataclass(frozen=True)
class TaskLoss:
    """Settings of the student's own denoising loss on data, which BK-SDM has and SDXS leaves out."""

    weight: float = 1.0
    """Factor of the loss. BK-SDM: 1."""

    def __post_init__(self) -> None:
        check_weight("TaskLoss", weight=self.weight)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Weighted `denoising_loss`: (), float32."""
        return self.weight * denoising_loss(output, target)
