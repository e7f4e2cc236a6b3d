"""Diversity: mean feature distance between samples of one prompt. A collapsed student maps all noise to the same image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.families import Family
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.matched_features import MatchedFeatures
from sdxs_lightning.objectives.term import DistillationContext


def pairwise_distance(features: Mapping[str, Tensor]) -> Tensor:
    """Mean pairwise distance of samples' features, each normalised to length 1.

    0 for equal samples, sqrt(2) for orthogonal features; invariant to the features' scale. Features keep their spatial
    positions, so an object in another place counts as different.

    Args:
        features: (B, ...) by layer, of B samples of one prompt; all layers have equal weight.

    Returns:
        (), float32.

    Raises:
        ValueError: for fewer than two samples.
    """
    distances = []
    for layer in features.values():
        if len(layer) < 2:
            raise ValueError(f"a distance needs two samples, got {len(layer)}.")
        unit = normalize(layer.float().flatten(1), dim=1)
        # Not by a matrix product: 1 - cos of nearly equal features is rounding error.
        distances.append(torch.pdist(unit).mean())
    return torch.stack(distances).mean()


class BottleneckFeatures:
    """Bottleneck features of the real score, or of the fake score if there is no real score; needs no further network.

    The fake score is trained, so distances in its features drift slowly during the run.

    Args:
        timestep: passed to the U-Net with the clean latents; 0 is their true noise level.
    """

    needs_real_score = False

    def __init__(self, timestep: int = 0) -> None:
        if timestep < 0:
            raise ValueError(f"features.init_args.timestep must be 0 or more, got {timestep}.")
        self.timestep = timestep

    def build(self, family: Family) -> None:
        """Has nothing to load."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Has nothing to move."""

    def frozen_networks(self) -> dict[str, nn.Module]:
        return {}

    def __call__(
        self, latents: Tensor, conditioning: Conditioning, context: DistillationContext
    ) -> dict[str, Tensor]:
        network = context.real_score if context.real_score is not None else context.fake_score
        assert network is not None
        timesteps = torch.full((len(latents),), self.timestep, dtype=torch.int64, device=latents.device)
        return {"bottleneck": network.features(latents, timesteps, conditioning)}


@torch.no_grad()
def measure_diversity(
    student: StudentGenerator,
    family: Family,
    context: DistillationContext,
    features: MatchedFeatures,
    captions: Sequence[str],
    samples_per_prompt: int,
    seed: int = 0,
) -> Tensor:
    """Mean over prompts of the `pairwise_distance` of the student's samples, from fixed noise.

    All ranks compute the same, since a sharded network needs all ranks.

    Args:
        student: the current student; its average would show a collapse late.
        family: encodes the prompts.
        context: the networks that the features may use.
        features: features in which samples are compared; built and on the device.
        captions: the prompts.
        samples_per_prompt: at least 2; generated as one batch.
        seed: seed of the noise.

    Returns:
        (), float32, on the student's device.
    """
    device = family.schedule.alpha.device
    numbers = torch.arange(samples_per_prompt, device=device)
    noise = normal(seed, Stream.EVALUATION, numbers, family.latent_shape())
    distances = []
    for caption in captions:
        conditioning = family.encode_prompts([caption] * samples_per_prompt)
        latents = student(noise, conditioning)
        distances.append(pairwise_distance(features(latents, conditioning, context)))
    return torch.stack(distances).mean()
