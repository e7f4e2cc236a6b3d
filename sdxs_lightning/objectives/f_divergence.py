"""Divergences other than the reverse KL: weights each sample's distribution matching gradient by h(r).

Let p be the density of noised data, q that of noised samples of the student, r = p / q, and

    D_f(p || q) = integral of q f(p / q) dx,   f convex, f(1) = 0.

Its derivative with respect to q at x is f(r) - r f'(r). A sample at x descends the gradient of that in x,

    grad_x (f(r) - r f'(r)) = -r f''(r) grad_x r = r^2 f''(r) (grad_x log q - grad_x log p),

since grad_x r = r grad_x log r. So each divergence has the reverse KL's direction, fake minus real score, with the
factor h(r) = r^2 f''(r):

    divergence          f(r)                                  h(r)
    reverse_kl          -log r                                1
    jensen_shannon      r log r - (r + 1) log((r + 1) / 2)    r / (r + 1)
    hellinger           1 - sqrt(r)                           sqrt(r) / 4
    forward_kl          r log r                               r
    jeffreys            (r - 1) log r                         r + 1

An h that grows with r weights samples by the data's density, which drops fewer modes but has more variance. A diffusion GAN
provides the ratio: the optimal logit of the discriminator's loss is log p - log q.

Source: f-distill, arXiv:2502.15681, theorem 1 and table 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["reverse_kl", "jensen_shannon", "hellinger", "forward_kl", "jeffreys"]

_WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "jensen_shannon": lambda ratio: ratio / (ratio + 1),
    "hellinger": lambda ratio: ratio.sqrt() / 4,
    "forward_kl": lambda ratio: ratio,
    "jeffreys": lambda ratio: ratio + 1,
}


def divergence_weight(ratio: Tensor, divergence: Divergence) -> Tensor:
    """h(r) = r^2 f''(r) of a divergence.

    Args:
        ratio: any shape, float, positive: density of noised data over that of noised samples.
        divergence: name of the divergence.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: for an unknown divergence.

    Source: f-distill, arXiv:2502.15681, table 1; derived at the top of this module.
    """
    if divergence not in _WEIGHTS:
        raise ValueError(
            f"divergence {divergence!r} is not known; accepted are {', '.join(_WEIGHTS)}; change "
            "distribution_matching.f_divergence.divergence."
        )
    return _WEIGHTS[divergence](ratio)


@dataclass(frozen=True)
class FDivergence:
    """Settings of the divergence of distribution matching; needs a diffusion GAN for the density ratio."""

    divergence: Divergence = "jensen_shannon"
    """Jensen-Shannon is best in f-distill; reverse_kl is plain distribution matching."""
    min_ratio: float = 0.1
    """Lower bound that ratios are clipped to; f-distill's."""
    max_ratio: float = 20.0
    """Upper bound that ratios are clipped to, so that no single sample dominates; f-distill's."""

    def __post_init__(self) -> None:
        if self.divergence not in _WEIGHTS:
            divergence_weight(torch.ones(()), self.divergence)  # raises
        if not (0 < self.min_ratio < self.max_ratio and math.isfinite(self.max_ratio)):
            raise ValueError(
                f"f_divergence needs 0 < min_ratio < max_ratio, got {self.min_ratio} and {self.max_ratio}; change "
                "distribution_matching.f_divergence."
            )

    def weights(self, fake_logits: Tensor) -> Tensor:
        """h(r) of each sample over its mean in the micro-batch, detached.

        The weights are relative and do not change the step size. A departure: f-distill normalises in two stages, here only
        h is normalised, since a good discriminator's r already has mean 1 over the student's samples. The mean is over this
        rank's micro-batch.

        Args:
            fake_logits: (B,), float, the discriminator's logits at the scores' noisy samples; positive means real.

        Returns:
            (B, 1, 1, 1), float32, with mean 1.

        Raises:
            ValueError: for a single sample, whose weight would always be 1, or logits of another shape.
        """
        if fake_logits.ndim != 1 or len(fake_logits) < 2:
            raise ValueError(
                "f_divergence weighs the samples of a micro-batch against one another, so it needs logits (B,) of at least 2, "
                f"got shape {tuple(fake_logits.shape)}; raise data.init_args.batch_size, or set "
                "distribution_matching.f_divergence to null."
            )
        with torch.no_grad():
            # Clipped before exp: a logit of 100 overflows float32.
            logits = fake_logits.float().clamp(math.log(self.min_ratio), math.log(self.max_ratio))
            weights = divergence_weight(logits.exp(), self.divergence)
            return (weights / weights.mean()).view(-1, 1, 1, 1)
