"""Condition consistency: the condition that a network reads off the student's image is the one that was asked for."""

from typing import Any, Literal

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
        read: (B, C, H, W), float, read off the student's images, with their graph: in [0, 1], or logits for "cross_entropy".
        wanted: same shape, in [0, 1], what was asked for.
        distance: "cross_entropy" is -log p(wanted | read) of a Bernoulli variable for each pixel.

    Returns:
        (B,), float32.

    Raises:
        ValueError: unless the shapes agree.
    """
    check_same_shape(read=read, wanted=wanted)
    read, wanted = read.float(), wanted.detach().float()
    if distance == "cross_entropy":
        # Of logits: where a reader is sure and wrong, a probability has rounded to 0 or 1 and its logarithm has no gradient.
        values = F.binary_cross_entropy_with_logits(read, wanted, reduction="none")
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
        distance: for p(c | x) a Bernoulli, Gaussian or Laplace distribution of each pixel; "cross_entropy" needs a reader of
            probabilities, whose network has `logits` (`LearnedReader`). None is "cross_entropy" for these, "mse" for others.
        noise: largest sigma of the noise with which images are diffused before they are read, as when the reader was trained;
            drawn uniformly for each sample. Without it the student finds small changes of pixels that fool the reader.
        decoder: folder of an AutoencoderTiny; None uses the base's VAE, which is slow and needs much memory with a graph.
        phase: phase in which it acts.

    Raises:
        ValueError: for a negative weight, or a noise outside [0, 1); in `build`, for "cross_entropy" with a reader that has no
            logits.

    Source: joint distribution matching, arXiv:2503.06652, section 3.
    """

    def __init__(
        self,
        reader: ConditionReader,
        weight: float = 1.0,
        distance: Distance | None = None,
        noise: float = 0.0,
        decoder: str | None = None,
        phase: Phase = "always",
    ) -> None:
        check_weight("ConditionConsistency", weight=weight)
        if not 0 <= noise < 1:
            raise ValueError(
                f"ConditionConsistency.noise is a sigma in [0, 1), got {noise}; give it the reader's own."
            )
        self.noise = noise
        self.reader, self.weight, self.distance, self.phase = reader, weight, distance, phase
        self.decode = PixelDecoder(decoder, "ConditionConsistency.decoder")
        self._network: Frozen[nn.Module] | None = None

    def build(self, family: Family, context: DistillationContext) -> None:
        self.decode.build(family)
        if self._network is not None:
            return
        self._network = Frozen(self.reader.load())
        reads_probabilities = hasattr(self._network.module, "logits")
        if self.distance == "cross_entropy" and not reads_probabilities:
            raise ValueError(
                f"ConditionConsistency.distance is cross_entropy, which needs the logits of a reader, and "
                f"{type(self.reader).__name__} has none; set distance to mse or l1, or to null for mse."
            )
        self.distance = self.distance or ("cross_entropy" if reads_probabilities else "mse")

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
        """The condition images (B, C, H, W) of a sample, as `condition_distance` takes them; differentiable in its latents."""
        assert self._network is not None
        network: Any = self._network.module
        reader = network.logits if self.distance == "cross_entropy" else network
        with without_autocast(sample.latents.device):
            images = self.decode(sample.latents).clamp(-1.1, 1.1)
            images = diffused(images, self.noise, sample.seed, sample.positions)
            read: Tensor = reader(images)
        return read

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        wanted = sample.conditioning.control_images
        if wanted is None:
            raise ValueError(
                "ConditionConsistency needs condition images, and the sample has none: use it in the stage controlnet "
                "(sdxs_lightning.stages.controlnet.distillation.ControlNetDistillation), or set it to null."
            )
        assert self.distance is not None  # since build
        distances = condition_distance(self.read(sample), wanted, self.distance)
        given = wanted.flatten(1).amax(dim=1) > 0
        # Over all samples: a mean over those given would depend on how the batch is split over ranks.
        loss = (distances * given).mean()
        return self.weight * loss, {"condition_consistency": loss}
