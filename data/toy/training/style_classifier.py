"""The style classifier: in which style of the toy world an image is drawn, for style accuracy."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from data.toy.rendered import CaptionedImages
from data.toy.training.classifier import degrade
from data.toy.training.fitting import ToyTraining
from data.toy.training.shipped_classifier import ShippedClassifier
from data.toy.world import Style

STYLES: tuple[Style | None, ...] = (None, "textured", "outlined")
"""The classes in order; None is the plain drawing."""


class StyleClassifier(ShippedClassifier):
    """A small convolutional network; textures are local, so its features are averaged over the image."""

    weights_file = "style_classifier.safetensors"
    config = "configs/toy/style_classifier.yaml"

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.GroupNorm(8, 32),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.GroupNorm(8, 48),
            nn.SiLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.SiLU(),
        )
        self.head = nn.Linear(2 * 48, len(STYLES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, styles) of images (B, 3, 32, 32), float in [-1, 1]."""
        features = self.features(images)
        logits: Tensor = self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1))
        return logits

    @torch.no_grad()
    def predict(self, images_uint8: Tensor) -> Tensor:
        """Index into `STYLES` of each image: (B,) int64, from (B, 3, 32, 32) uint8."""
        styles: Tensor = self(images_uint8.float() / 127.5 - 1).argmax(dim=1)
        return styles


class StyleClassifierTraining(ToyTraining):
    """Trains the style classifier on images drawn in turn in each style, some of them blurred or noisy.

    Args:
        optimizer: from parameters to optimizer.
        lr_scheduler: from optimizer to a per-step schedule.
        output: folder to write.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable, output: str) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.output = output
        self.classifier = StyleClassifier()

    def setup(self, stage: str) -> None:
        """Raises ValueError unless the data has the classes of the classifier."""
        found = tuple(self.trainer.datamodule.styles)  # type: ignore[attr-defined]
        if found != STYLES:
            raise ValueError(f"data.init_args.styles must be {list(STYLES)}, got {list(found)}.")

    def training_step(self, batch: CaptionedImages, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        loss = F.cross_entropy(
            self.classifier(degrade(self.to_network_range(batch.images_uint8))), batch.styles
        )
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        """Share of images whose style is found."""
        right = self.classifier.predict(batch.images_uint8) == batch.styles
        self.log("right", right.float().mean(), prog_bar=True, batch_size=len(right))

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            self.classifier.save_pretrained(self.output)
