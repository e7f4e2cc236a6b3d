"""The attribute classifier's convolutions as a feature network for the toy decoder's discriminator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from data.toy.training.classifier import AttributeClassifier
from sdxs_lightning.networks.image_features import FeatureNetwork


class ClassifierFeatures:
    """Outputs of some of the classifier's five convolutional stages.

    The toy CLIP measures a decoder's feature distance and FID, so it should not train the decoder as well.

    Args:
        folder: of the attribute classifier.
        stages: which outputs, counted from 0: 32x16x16, 64x16x16, 64x8x8, 96x8x8, 96x4x4.

    Raises:
        FileNotFoundError: in `load`, without a classifier.
    """

    def __init__(self, folder: str = "data/toy/classifier", stages: tuple[int, ...] = (0, 1, 3)) -> None:
        self.folder, self.stages = folder, stages

    def load(self) -> FeatureNetwork:
        classifier = AttributeClassifier.from_pretrained(self.folder)
        # The classifier takes images in [-1, 1]; this normalisation of [0, 1] gives them.
        halves = (0.5, 0.5, 0.5)
        return FeatureNetwork(_Stages(classifier, self.stages), halves, halves, size_px=None)


class _Stages(nn.Module):
    def __init__(self, classifier: AttributeClassifier, stages: Sequence[int]) -> None:
        super().__init__()
        self.layers = classifier.features[: max(stages) + 1]
        self.stages = set(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        features, hidden = [], images
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if i in self.stages:
                features.append(hidden)
        return features
