"""Regression of the student's latents to the target sampler's from the same noise."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import huber_loss

from sdxs_lightning.objectives.checks import check_same_shape, check_weight
from sdxs_lightning.objectives.term import DistillationContext, LatentSample, Phase, Scalars, StudentTerm


def regression_loss(pred_x0: Tensor, target: Tensor, huber_delta: float | None = None) -> Tensor:
    """Mean square of pred_x0 - target, or its Huber form on the same scale.

    Args:
        pred_x0: (B, 4, h, w), float, the student's latents.
        target: same shape, the target sampler's latents from the same noise; gets no gradient.
        huber_delta: None for the mean square; else errors beyond delta are linear: delta (2 |e| - delta).

    Returns:
        (), float32.

    Raises:
        ValueError: unless the shapes agree.

    Source: DMD's regression term, arXiv:2311.18828, eq. 9, in latents instead of LPIPS, which needs no VAE in the step.
    """
    check_same_shape(pred_x0=pred_x0, target=target)
    pred_x0, target = pred_x0.float(), target.detach().float()
    if huber_delta is None:
        return (pred_x0 - target).square().mean()
    # Twice torch's Huber, which is e^2 / 2 near 0, so that weights and learning rates carry over.
    return 2.0 * huber_loss(pred_x0, target, delta=huber_delta)


@dataclass(frozen=True)
class Regression(StudentTerm):
    """Regression on (noise, latents) pairs: the warm-up before DMD2, or the regularizer of plain DMD."""

    weight: float = 1.0
    """Weight of the loss."""
    huber_delta: float | None = None
    """Error, in scaled latents, beyond which the loss is linear; null is the plain mean square."""
    phase: Phase = "warmup"
    """Phase in which it acts. "distillation" is plain DMD, arXiv:2311.18828: next to the score difference, on samples from the
    pairs' noise and prompts, or on every n-th of the batch (`pairs.every_nth_sample`)."""

    needs_pairs = True

    def __post_init__(self) -> None:
        check_weight("Regression", weight=self.weight)
        if self.huber_delta is not None and not self.huber_delta > 0:
            raise ValueError(f"huber_delta of Regression must be positive or null, got {self.huber_delta}.")

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        assert sample.target is not None
        loss = self.loss(sample.latents, sample.target)
        return loss, {"regression": loss}

    def loss(self, pred_x0: Tensor, target: Tensor) -> Tensor:
        """Weighted `regression_loss`: (), float32."""
        return self.weight * regression_loss(pred_x0, target, self.huber_delta)
