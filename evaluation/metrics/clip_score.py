"""CLIP score and preference scores: cosine similarity of images and captions in CLIP features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evaluation.metrics.sampled import PerImageMetric
from evaluation.networks.aesthetic import AestheticPredictor
from evaluation.networks.frozen_clip import FrozenClip


class ClipScore(PerImageMetric):
    """Mean of 100 * cos(image, caption), not clamped at zero.

    Args:
        clip: the model; its weights are not part of the state dict.
        scale: factor of the cosine.
        name: name of the score.

    Source: Hessel et al., arXiv:2104.08718, without its factor 2.5; the scale of the SDXS, BK-SDM and DMD2 tables.
    """

    higher_is_better = True

    def __init__(self, clip: FrozenClip, scale: float = 100.0, name: str = "clip_score") -> None:
        super().__init__()
        self.clip, self.scale, self.names = clip, scale, (name,)
        self.bounds = (-scale, scale)

    @property
    def title(self) -> str:
        return "CLIP score" if self.names[0] == "clip_score" else self.names[0]

    def measure(self, images_uint8: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Scaled cosines (B, 1).

        Raises:
            ValueError: without captions.
        """
        if captions is None:
            raise ValueError(f"{self.title} needs the captions of the images")
        return self.scale * self.clip.cosine(images_uint8, captions).double().unsqueeze(1)


class PreferenceScore(ClipScore):
    """Score of a CLIP trained on human preferences between images of one prompt: PickScore, HPSv2.

    Args:
        clip: the preference model.
        scale: factor of the cosine; None uses the checkpoint's exp(logit_scale) (about 100), as PickScore's authors do.
            HPSv2's authors use 1.
        name: name of the score.

    Source: Kirstain et al., arXiv:2305.01569; Wu et al., arXiv:2306.09341.
    """

    def __init__(self, clip: FrozenClip, scale: float | None = None, name: str = "pickscore") -> None:
        if scale is None:
            scale = float(clip.model.get_parameter("logit_scale").exp())
        super().__init__(clip, scale, name)


class AestheticScore(PerImageMetric):
    """Mean predicted rating of the images, 1 to 10; it reads no captions.

    Args:
        predictor: CLIP with LAION's head.
    """

    names = ("aesthetic",)
    higher_is_better = True

    def __init__(self, predictor: AestheticPredictor) -> None:
        super().__init__()
        self.predictor = predictor

    def measure(self, images_uint8: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Ratings (B, 1)."""
        return self.predictor(images_uint8).double().unsqueeze(1)
