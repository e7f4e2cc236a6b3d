"""The attribute classifier: predicts the attributes of a toy image, for caption accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from data.toy.attributes import CLASS_COUNTS, NOT_STATED, attribute_table
from data.toy.rendered import CaptionedImages
from data.toy.training.fitting import ToyTraining
from data.toy.training.shipped_classifier import ShippedClassifier
from data.toy.world import parse_caption


class AttributeClassifier(ShippedClassifier):
    """A small convolutional network with one softmax head per attribute."""

    weights_file = "attribute_classifier.safetensors"
    config = "configs/toy/classifier.yaml"

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _stage(3, 32, stride=2),
            _stage(32, 64, stride=1),
            _stage(64, 64, stride=2),
            _stage(64, 96, stride=1),
            _stage(96, 96, stride=2),
            nn.Flatten(),
            nn.Linear(96 * 16, 96),
            nn.SiLU(),
        )
        self.heads = nn.Linear(96, sum(CLASS_COUNTS))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits per attribute.

        Args:
            images: (B, 3, 32, 32) float in [-1, 1].

        Returns:
            one (B, classes) tensor for each entry of `attributes.CLASSES`.
        """
        logits: tuple[Tensor, ...] = self.heads(self.features(images)).split(CLASS_COUNTS, dim=1)
        return logits

    @torch.no_grad()
    def right(self, images_uint8: Tensor, captions: Sequence[str]) -> Tensor:
        """Which stated attributes an image shows.

        Args:
            images_uint8: (B, 3, 32, 32) uint8.
            captions: B captions of the toy world.

        Returns:
            (B, 7) bool in the order of `attributes.CLASSES`; True where the caption states nothing. All True means that every
            stated attribute is right and bound to the right object.
        """
        targets = attribute_table([parse_caption(caption) for caption in captions]).to(images_uint8.device)
        logits = self(images_uint8.float() / 127.5 - 1)
        predicted = torch.stack([head.argmax(dim=1) for head in logits], dim=1)
        return (predicted == targets) | (targets == NOT_STATED)


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(8, channels_out), nn.SiLU())


def degrade(images: Tensor) -> Tensor:
    """Blurs a third of a batch and adds noise to another: artefacts of generated images must not mislead the classifier."""
    third = len(images) // 3
    blurred = gaussian_blur(images[:third], [5, 5], [0.8, 0.8])
    noisy = images[third : 2 * third] + 0.08 * torch.randn_like(images[third : 2 * third])
    return torch.cat([blurred, noisy.clamp(-1, 1), images[2 * third :]])


class ClassifierTraining(ToyTraining):
    """Trains the attribute classifier on rendered images, some of them degraded.

    Args:
        optimizer: from parameters to optimizer.
        lr_scheduler: from optimizer to a per-step schedule.
        output: folder to write.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable, output: str) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.output = output
        self.classifier = AttributeClassifier()

    def training_step(self, batch: CaptionedImages, batch_idx: int) -> Tensor:
        """Sum of the cross-entropies of the stated attributes."""
        logits = self.classifier(degrade(self.to_network_range(batch.images_uint8)))
        targets = attribute_table([parse_caption(caption) for caption in batch.captions]).to(self.device)
        losses = [
            F.cross_entropy(head, targets[:, i], ignore_index=NOT_STATED) for i, head in enumerate(logits)
        ]
        loss = torch.stack(losses).sum()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        """Fraction of images with every stated attribute right."""
        right = self.classifier.right(batch.images_uint8, batch.captions)
        self.log("all_right", right.all(dim=1).float().mean(), prog_bar=True, batch_size=len(right))

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            self.classifier.save_pretrained(self.output)
