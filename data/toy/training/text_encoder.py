"""Pretraining of the toy base's text encoder (a stock CLIPTextModel), before the U-Net sees it; frozen afterwards.

Stable Diffusion's text encoder comes out of CLIP and stays frozen; this one comes out of reading its captions: from each of
the last four token states a linear layer has to name what the picture will show, by place. A text encoder trained only through
the denoising loss left pairs unbound (colours and shapes landed on the wrong object in half of the pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from data.toy.attributes import CLASS_COUNTS, CLASSES, NOT_STATED, attribute_table
from data.toy.rendered import CaptionedImages
from data.toy.tokenizer import CAPTION_TOKENS, build_tokenizer
from data.toy.training.fitting import ToyTraining
from data.toy.world import parse_caption

# What each of the last four token states has to name; captions of up to 12 tokens leave them to padding.
NAMED_BY_STATE: tuple[tuple[str, ...], ...] = (
    ("layout", "size", "background"),
    ("first_colour", "first_shape"),
    ("second_colour", "second_shape"),
    tuple(CLASSES),
)


def named_by(logits: Tensor, targets: Tensor, attributes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Cross-entropy and share of right answers for each of the attributes that some caption of the batch states.

    Args:
        logits: (B, sum of CLASS_COUNTS).
        targets: (B, attributes), int64, as `attribute_table` makes them.
        attributes: which of CLASSES these logits have to name.
    """
    losses, right = [], []
    for column, (attribute, scores) in enumerate(
        zip(CLASSES, logits.split(CLASS_COUNTS, dim=1), strict=True)
    ):
        stated = targets[:, column] != NOT_STATED
        if attribute in attributes and stated.any():
            chosen, wanted = scores[stated], targets[stated, column]
            losses.append(F.cross_entropy(chosen, wanted))
            right.append((chosen.argmax(dim=1) == wanted).float().mean())
    return torch.stack(losses), torch.stack(right)


class TextEncoderTraining(ToyTraining):
    """Trains a CLIPTextModel to state a caption's content by place; exports text encoder and tokenizer.

    Args:
        optimizer: from parameters to optimizer.
        lr_scheduler: from optimizer to a per-step schedule.
        output: base folder; `text_encoder/` and `tokenizer/` are written below it.
        hidden_size: width of the token states, the U-Net's cross-attention dimension.
        layers: transformer layers.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        output: str,
        hidden_size: int = 128,
        layers: int = 2,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.output = output
        self.tokenizer = build_tokenizer()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=hidden_size,
                intermediate_size=4 * hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=hidden_size // 32,
                max_position_embeddings=CAPTION_TOKENS,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                projection_dim=hidden_size,
            )
        )
        self.heads = nn.ModuleList(nn.Linear(hidden_size, sum(CLASS_COUNTS)) for _ in NAMED_BY_STATE)

    def training_step(self, batch: CaptionedImages, batch_idx: int) -> Tensor:
        """Mean cross-entropy over what each state has to name."""
        loss, accuracy = self._read(batch.captions)
        self.log_dict({"loss": loss, "accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        """The same on unseen scenes."""
        loss, accuracy = self._read(batch.captions)
        self.log_dict(
            {"val_loss": loss, "val_accuracy": accuracy}, prog_bar=True, batch_size=len(batch.captions)
        )

    def _read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        states = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state
        targets = attribute_table([parse_caption(caption) for caption in captions]).to(self.device)
        named = [
            named_by(head(states[:, place - len(self.heads)]), targets, attributes)
            for place, (head, attributes) in enumerate(zip(self.heads, NAMED_BY_STATE, strict=True))
        ]
        losses, right = (torch.cat(parts) for parts in zip(*named, strict=True))
        return losses.mean(), right.mean()

    def on_fit_end(self) -> None:
        """Write `text_encoder/` (fp16) and `tokenizer/`."""
        if self.trainer.is_global_zero:
            self.text_encoder.half().save_pretrained(Path(self.output) / "text_encoder")
            self.tokenizer.save_pretrained(Path(self.output) / "tokenizer")
