"""The toy world's CLIP: a tiny open_clip model for metrics (FID features, CLIP score), never used in a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from data.toy.rendered import CaptionedImages
from data.toy.tokenizer import CAPTION_TOKENS, build_tokenizer
from data.toy.training.fitting import ToyTraining
from data.toy.world import IMAGE_PX

_THUMBNAIL_PX = 8


def clip_config(vocabulary_size: int) -> dict[str, Any]:
    """The `open_clip_config.json` of the toy CLIP; the tokenizer is in the same folder."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": IMAGE_PX,
                "layers": 3,
                "width": 96,
                "head_width": 24,
                "patch_size": 4,
            },
            "text_cfg": {
                "context_length": CAPTION_TOKENS,
                "vocab_size": vocabulary_size,
                "hf_tokenizer_name": "this folder",
                "width": 64,
                "heads": 4,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
    }


class ClipTraining(ToyTraining):
    """Contrastive training of the toy CLIP; images with the same caption are each other's positives.

    The captions do not state place, light and texture, so a purely contrastive embedding discards them and FID would not
    measure them. Therefore a linear layer also has to reconstruct an 8x8 thumbnail from the image embedding.

    Args:
        optimizer: from parameters to optimizer.
        lr_scheduler: from optimizer to a per-step schedule.
        output: folder to write, in open_clip's local layout.
        thumbnail_weight: weight of the thumbnail's mean square error.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        output: str,
        thumbnail_weight: float = 5.0,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.output, self.thumbnail_weight = output, thumbnail_weight
        self.tokenizer = build_tokenizer()
        self.config = clip_config(len(self.tokenizer))
        model_config = self.config["model_cfg"]
        text_config = {k: v for k, v in model_config["text_cfg"].items() if k != "hf_tokenizer_name"}
        self.clip = open_clip.CLIP(model_config["embed_dim"], model_config["vision_cfg"], text_config)
        self.paint = nn.Linear(model_config["embed_dim"], 3 * _THUMBNAIL_PX**2)

    def training_step(self, batch: CaptionedImages, batch_idx: int) -> Tensor:
        """Symmetric cross-entropy over the batch, plus the thumbnail."""
        images = self.to_network_range(batch.images_uint8)
        features = self.clip.encode_image(images)
        contrast, _ = self._contrast(features, batch.captions)
        target = F.avg_pool2d(images, IMAGE_PX // _THUMBNAIL_PX).flatten(1)
        thumbnail = F.mse_loss(self.paint(features), target)
        self.log_dict({"contrast": contrast, "thumbnail": thumbnail}, prog_bar=True)
        return contrast + self.thumbnail_weight * thumbnail

    def validation_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        """Fraction of images whose own caption is the nearest of the batch."""
        features = self.clip.encode_image(self.to_network_range(batch.images_uint8))
        _, accuracy = self._contrast(features, batch.captions)
        self.log("retrieval", accuracy, prog_bar=True, batch_size=len(features))

    def _contrast(self, image_features: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        text = F.normalize(self.clip.encode_text(tokens.input_ids.to(self.device)), dim=1)
        logits = self.clip.logit_scale.exp() * F.normalize(image_features, dim=1) @ text.T
        numbers = {caption: number for number, caption in enumerate(captions)}
        number = torch.tensor([numbers[caption] for caption in captions], device=self.device)
        same = (number[:, None] == number[None, :]).float()
        targets = same / same.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        nearest_is_own = same.gather(1, logits.argmax(dim=1, keepdim=True)).mean()
        return loss, nearest_is_own

    def on_fit_end(self) -> None:
        """Writes config, fp16 weights and tokenizer."""
        if not self.trainer.is_global_zero:
            return
        folder = Path(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "open_clip_config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        weights = {name: tensor.half().contiguous() for name, tensor in self.clip.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        self.tokenizer.save_pretrained(folder)
