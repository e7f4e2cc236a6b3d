"""Knowledge distillation of a smaller network: output distillation, feature distillation, and the task loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sdxs_lightning.objectives.checks import check_same_shape, check_weight
from sdxs_lightning.objectives.denoising import denoising_loss


def output_distillation_loss(output: Tensor, teacher_output: Tensor) -> Tensor:
    """Mean square of output - teacher_output.

    Args:
        output: (B, 4, h, w), float, the student's raw output at x_t: epsilon or v.
        teacher_output: same shape, the teacher's at the same x_t; gets no gradient.

    Returns:
        (), float32.

    Raises:
        ValueError: unless the shapes agree.

    Source: L_OKD of BK-SDM, arXiv:2305.15798, section 3.2, and of SDXS, arXiv:2403.16627, section 3.1; both write a norm; the
        mean is BK-SDM's implementation.
    """
    check_same_shape(output=output, teacher_output=teacher_output)
    return (output.float() - teacher_output.detach().float()).square().mean()


def feature_distillation_losses(
    features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean square of the difference at each tap.

    Args:
        features: the student's, by tap, any shape, float.
        teacher_features: the teacher's at the same taps, same shapes; get no gradient.

    Returns:
        A loss (), float32, by tap.

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
    """Settings of output distillation."""

    weight: float = 1.0
    """Weight of the loss. BK-SDM: 1."""

    def __post_init__(self) -> None:
        check_weight("OutputDistillation", weight=self.weight)

    def loss(self, output: Tensor, teacher_output: Tensor) -> Tensor:
        """Weighted `output_distillation_loss`: (), float32."""
        return self.weight * output_distillation_loss(output, teacher_output)


@dataclass(frozen=True)
class FeatureDistillation:
    """Settings of feature distillation."""

    weight: float = 1.0
    """Weight of the sum over taps. BK-SDM: 1."""
    taps: dict[str, str] | None = None
    """Maps blocks of the student to blocks of the teacher, by module name; null pairs the stages that the topology keeps."""
    tap_weights: dict[str, float | None] | None = None
    """Weights of taps by block of the student, 1 if missing; a null weight removes the tap."""

    def __post_init__(self) -> None:
        check_weight("FeatureDistillation", weight=self.weight)
        for tap, weight in (self.tap_weights or {}).items():
            if weight is not None:
                check_weight("FeatureDistillation", **{f"tap_weights.{tap}": weight})

    def pairs(self, default: Mapping[str, str]) -> dict[str, str]:
        """Returns the active taps: blocks of the student to blocks of the teacher.

        Args:
            default: used if `taps` is None.

        Raises:
            ValueError: for a weight without a tap, or if no tap is left.
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
    """Settings of the student's denoising loss on data, used by BK-SDM but not by SDXS."""

    weight: float = 1.0
    """Weight of the loss. BK-SDM: 1."""

    def __post_init__(self) -> None:
        check_weight("TaskLoss", weight=self.weight)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Weighted `denoising_loss`: (), float32."""
        return self.weight * denoising_loss(output, target)
