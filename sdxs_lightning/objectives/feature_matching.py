"""Feature matching: compares feature statistics of the student's and the target sampler's latents from the same noise.

Notation: x and y are feature maps of the same layer, (B, C, h, w); their mean, variance and covariance are taken over the
entire map, one number per sample and channel, as in DISTS and, according to its authors (issue 14), in SDXS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdxs_lightning.families import Family
from sdxs_lightning.objectives.checks import check_same_shape, check_weight
from sdxs_lightning.objectives.matched_features import MatchedFeatures
from sdxs_lightning.objectives.term import (
    DistillationContext,
    LatentSample,
    ObjectiveSettings,
    Phase,
    Scalars,
    StudentTerm,
)

STABILITY = 1e-6
"""The constants C1 and C2 of SSIM."""


def global_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of two feature maps, without a sliding window.

    (2 mean_x mean_y + C1) (2 cov_xy + C2) / ((mean_x^2 + mean_y^2 + C1) (var_x + var_y + C2)), in [-1, 1].

    Args:
        x: (B, C, h, w), float.
        y: same shape.

    Returns:
        (B, C), float32; 1 where the maps are equal.

    Raises:
        ValueError: unless the shapes agree.

    Source: SDXS, arXiv:2403.16627, eq. 10; SSIM's formula with the entire map as window, as in DISTS, arXiv:2004.07728, eq. 6.
    """
    check_same_shape(x=x, y=y)
    x, y = x.float(), y.float()
    mean_x, mean_y = x.mean(dim=(2, 3)), y.mean(dim=(2, 3))
    # Centred first: E[x^2] - E[x]^2 cancels catastrophically for nearly constant channels.
    dx, dy = x - mean_x[..., None, None], y - mean_y[..., None, None]
    var_x, var_y, cov = dx.square().mean(dim=(2, 3)), dy.square().mean(dim=(2, 3)), (dx * dy).mean(dim=(2, 3))
    luminance = (2 * mean_x * mean_y + STABILITY) / (mean_x.square() + mean_y.square() + STABILITY)
    structure = (2 * cov + STABILITY) / (var_x + var_y + STABILITY)
    return luminance * structure


def feature_matching_loss(
    features: Mapping[str, Tensor], targets: Mapping[str, Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """sum_l w_l mean_{b,c}(1 - SSIM(x_l, y_l)), with weights that sum to 1.

    Args:
        features: the student's feature maps by layer, (B, C_l, h_l, w_l), with their graph.
        targets: the target sampler's, of the same layers; get no gradient.
        weights: one per layer in the order of `features`, any scale; None weights all equally.

    Returns:
        (), float32, in [0, 2].

    Raises:
        ValueError: unless layers, shapes and number of weights agree.

    Source: SDXS, arXiv:2403.16627, eq. 10, which prints the similarity where the distance is meant.
    """
    if list(features) != list(targets):
        raise ValueError(f"features of {list(features)} cannot be matched with those of {list(targets)}.")
    weights = [1.0] * len(features) if weights is None else weights
    if len(weights) != len(features):
        raise ValueError(
            f"feature_matching.layer_weights has {len(weights)} numbers for {len(features)} layers ({', '.join(features)})."
        )
    losses = [1 - global_ssim(features[name], targets[name].detach()).mean() for name in features]
    total = sum(weights)
    return torch.stack([loss * (weight / total) for loss, weight in zip(losses, weights, strict=True)]).sum()


@dataclass(frozen=True)
class FeatureMatching(ObjectiveSettings):
    """Settings of feature matching; the stage's `features` defines the features."""

    weight: float = 1.0
    """Weight of the loss."""
    layer_weights: tuple[float, ...] | None = None
    """One weight per layer of the features; null weights all equally."""
    phase: Phase = "warmup"
    """Phase in which it acts with this weight. The segmented mode adds it after the warm-up, with a balanced norm."""

    def __post_init__(self) -> None:
        check_weight("FeatureMatching", weight=self.weight)
        if self.layer_weights is not None:
            check_weight(
                "FeatureMatching", **{f"layer_weights[{i}]": w for i, w in enumerate(self.layer_weights)}
            )

    def loss(self, features: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """Weighted `feature_matching_loss`: (), float32."""
        return self.weight * feature_matching_loss(features, targets, self.layer_weights)


class FeatureMatchingTerm(StudentTerm):
    """Feature matching with the target sampler's latents for the same noise and prompts.

    Args:
        objective: the loss.
        features: the features to compare.
    """

    needs_pairs = True

    def __init__(self, objective: FeatureMatching, features: MatchedFeatures) -> None:
        self.objective, self.features = objective, features
        self.phase = objective.phase
        self.needs_real_score = features.needs_real_score

    def build(self, family: Family, context: DistillationContext) -> None:
        self.features.build(family)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.features.to(device, dtype)

    def frozen_networks(self) -> dict[str, nn.Module]:
        return self.features.frozen_networks()

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        assert sample.target is not None
        with torch.no_grad():
            targets = self.features(sample.target, sample.conditioning, context)
        features = self.features(sample.latents, sample.conditioning, context)
        loss = self.objective.loss(features, targets)
        return loss, {"feature_matching": loss}
