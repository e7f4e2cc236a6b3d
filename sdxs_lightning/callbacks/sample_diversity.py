"""Diversity: how far samples of one prompt are apart. A student that collapses gives them all the same picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.families import Family
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.stages.distillation.matched_features import MatchedFeatures
from sdxs_lightning.stages.distillation.sample import DistillationContext


def pairwise_distance(features: Mapping[str, Tensor]) -> Tensor:
    """Mean distance of two samples' features, each scaled to length 1.

    0 for equal samples, sqrt(2) for features at right angles; a factor that all features share does not count. Features
    keep their places: the same object somewhere else is another sample.

    Args:
        features: (B, ...) of B samples of one prompt, by layer; layers count alike.

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
        # Not by way of a matrix product: 1 - cos of nearly equal features is rounding.
        distances.append(torch.pdist(unit).mean())
    return torch.stack(distances).mean()


class BottleneckFeatures:
    """The bottleneck of the real score, or of the fake score where there is no real one: no further network.

    The fake score learns, so distances by it drift a little while the run goes on.

    Args:
        timestep: what the U-Net is told of the latents, which are clean; 0 is the truth.
    """

    needs_real_score = False

    def __init__(self, timestep: int = 0) -> None:
        if timestep < 0:
            raise ValueError(f"features.init_args.timestep must be 0 or more, got {timestep}.")
        self.timestep = timestep

    def build(self, family: Family) -> None:
        """See `MatchedFeatures`."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """See `MatchedFeatures`."""

    def frozen_networks(self) -> dict[str, nn.Module]:
        """See `MatchedFeatures`."""
        return {}

    def __call__(
        self, latents: Tensor, conditioning: Conditioning, context: DistillationContext
    ) -> dict[str, Tensor]:
        """See `MatchedFeatures`."""
        judge = context.real_score if context.real_score is not None else context.fake_score
        assert judge is not None
        timesteps = torch.full((len(latents),), self.timestep, dtype=torch.int64, device=latents.device)
        return {"bottleneck": judge.features(latents, timesteps, conditioning)}


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
    """Mean over prompts of `pairwise_distance` among the student's samples of each, from fixed noise.

    Every rank measures the same, since a sharded network needs them all.

    Args:
        student: as it is now, not its average, which would show a collapse late.
        family: encodes the prompts.
        context: the networks that the features may ask.
        features: what samples are compared by; built and moved.
        captions: the prompts.
        samples_per_prompt: at least 2; so many are made at once.
        seed: of the noise.

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
