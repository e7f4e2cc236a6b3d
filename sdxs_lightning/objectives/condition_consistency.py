"""Condition consistency: the condition that a network reads off the student's image is the one that was asked for."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.families import Family
from sdxs_lightning.networks.condition_readers import ConditionReader, diffused
from sdxs_lightning.networks.decoded_image_features import PixelDecoder
from sdxs_lightning.networks.network import without_autocast
from sdxs_lightning.objectives.checks import check_same_shape, check_weight
from sdxs_lightning.objectives.term import DistillationContext, LatentSample, Phase, Scalars, StudentTerm

Distance = Literal["cross_entropy", "mse", "l1"]


def condition_distance(read: Tensor, wanted: Tensor, distance: Distance) -> Tensor:
    """Mean distance of condition images per sample.

    Args:
        read: (B, C, H, W), float, in [0, 1], read off the student's images, with their graph.
        wanted: same shape, what was asked for.
        distance: "cross_entropy" is -log p(wanted | read) of a Bernoulli variable for each pixel.

    Returns:
        (B,), float32.

    Raises:
        ValueError: unless the shapes agree.
    """
    check_same_shape(read=read, wanted=wanted)
    read, wanted = read.float(), wanted.detach().float()
    if distance == "cross_entropy":
        # A reader that is sure must not give an infinite loss for a pixel; beyond the clamp there is no gradient either, so it
        # is close to float32's resolution at 1: trained readers reach 1e-5.
        values = F.binary_cross_entropy(read.clamp(1e-6, 1 - 1e-6), wanted, reduction="none")
    else:
        values = (read - wanted).abs() if distance == "l1" else (read - wanted).square()
    return values.flatten(1).mean(dim=1)


class ConditionConsistency(StudentTerm):
    """The term -log p(condition | image) of joint distribution matching.

    The KL divergence of the joint distributions of image x and condition c falls apart into one of the images, whose real
    score is the plain base's and whose fake score sees c, and E[-log p(c | x)]: this term. So the base needs no ControlNet.
    Samples whose condition image is black (dropped, or empty) count as 0.

    Args:
        reader: the differentiable network that reads the condition.
        weight: weight of the loss.
        distance: for p(c | x) a Bernoulli, Gaussian or Laplace distribution of each pixel.
        noise: largest sigma of the noise with which images are diffused before they are read, as when the reader was trained;
            drawn uniformly for each sample. Without it the student finds small changes of pixels that fool the reader.
        decoder: folder of an AutoencoderTiny; None uses the base's VAE, which is slow and needs much memory with a graph.
        phase: phase in which it acts.

    Raises:
        ValueError: for a negative weight or noise, or an unknown distance.

    Source: joint distribution matching, arXiv:2503.06652, section 3.
    """

    def __init__(
        self,
        reader: ConditionReader,
        weight: float = 1.0,
        distance: Distance = "cross_entropy",
        noise: float = 0.0,
        decoder: str | None = None,
        phase: Phase = "always",
    ) -> None:
        check_weight("ConditionConsistency", weight=weight, noise=noise)
        self.noise = noise
        self.reader, self.weight, self.distance, self.phase = reader, weight, distance, phase
        self.decode = PixelDecoder(decoder, "ConditionConsistency.decoder")
        self._network: Frozen[nn.Module] | None = None

    def build(self, family: Family, context: DistillationContext) -> None:
        self.decode.build(family)
        if self._network is None:
            self._network = Frozen(self.reader.load())

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        # Float32, like the decoder: the gradient goes through both into single pixels.
        assert self._network is not None
        self._network.to(device)
        self.decode.to(device)

    def frozen_networks(self) -> dict[str, nn.Module]:
        """The reader, and the decoder unless it is the base's VAE."""
        assert self._network is not None
        networks = {"condition_reader": self._network.module, "condition_decoder": self.decode.module}
        return {
            name: one
            for name, one in networks.items()
            if one is not None and any(True for _ in one.parameters())
        }

    def read(self, sample: LatentSample) -> Tensor:
        """The condition images (B, C, H, W) in [0, 1] of a sample; differentiable in its latents."""
        assert self._network is not None
        with without_autocast(sample.latents.device):
            images = self.decode(sample.latents).clamp(-1.1, 1.1)
            images = diffused(images, self.noise, sample.seed, sample.positions)
            read: Tensor = self._network(images)
        return read

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        wanted = sample.conditioning.control_images
        if wanted is None:
            raise ValueError(
                "ConditionConsistency needs condition images, and the sample has none: use it in the stage controlnet "
                "(sdxs_lightning.stages.controlnet.distillation.ControlNetDistillation), or set it to null."
            )
        distances = condition_distance(self.read(sample), wanted, self.distance)
        given = wanted.flatten(1).amax(dim=1) > 0
        # Over all samples: a mean over those given would depend on how the batch is split over ranks.
        loss = (distances * given).mean()
        return self.weight * loss, {"condition_consistency": loss}
