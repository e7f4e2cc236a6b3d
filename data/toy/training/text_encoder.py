"""Pretraining of the toy bases' text encoders, before the U-Net; frozen afterwards.

Stable Diffusion's text encoder comes from CLIP and stays frozen; these are trained to predict what the caption states: a linear
layer on each of the last four token states classifies the attributes of the scene, by place. A text encoder trained only
through the denoising loss did not bind attributes to objects (colours and shapes were swapped in half of the two-object
images).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from data.toy.attributes import CLASS_COUNTS, CLASSES, NOT_STATED, attribute_table
from data.toy.rendered import CaptionedImages
from data.toy.tokenizer import CAPTION_TOKENS, build_tokenizer
from data.toy.training.fitting import ToyTraining
from data.toy.training.sdxl_base import write_skeleton
from data.toy.world import parse_caption
from sdxs_lightning.families.weights import load_network

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


# What each of the last four token states has to predict; captions of up to 12 tokens leave them to padding.
PREDICTED_BY_STATE: tuple[tuple[str, ...], ...] = (
    ("layout", "size", "background"),
    ("first_colour", "first_shape"),
    ("second_colour", "second_shape"),
    tuple(CLASSES),
)


def attribute_losses(logits: Tensor, targets: Tensor, attributes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of each of the attributes that some caption of the batch states.

    Args:
        logits: (B, sum of CLASS_COUNTS).
        targets: (B, attributes), int64, from `attribute_table`.
        attributes: which of CLASSES these logits have to predict.
    """
    losses, accuracies = [], []
    for column, (attribute, scores) in enumerate(
        zip(CLASSES, logits.split(CLASS_COUNTS, dim=1), strict=True)
    ):
        stated = targets[:, column] != NOT_STATED
        if attribute in attributes and stated.any():
            predicted, target = scores[stated], targets[stated, column]
            losses.append(F.cross_entropy(predicted, target))
            accuracies.append((predicted.argmax(dim=1) == target).float().mean())
    return torch.stack(losses), torch.stack(accuracies)


class _CaptionTraining(ToyTraining):
    """Training by attribute prediction; a subclass creates `heads` (and `pooled_head`) and computes the states."""

    heads: nn.ModuleList
    pooled_head: nn.Linear

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable, output: str) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.output = Path(output)
        self.tokenizer = build_tokenizer()

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token states (B, tokens, d) and the pooled state (B, d), if there is one, of token ids (B, tokens)."""
        raise NotImplementedError

    def further_loss(self, ids: Tensor, states: Tensor) -> Tensor:
        """What else a subclass trains the token states to be, a scalar."""
        return states.new_zeros(())

    def training_step(self, batch: CaptionedImages, batch_idx: int) -> Tensor:
        """Mean cross-entropy over all predictions."""
        loss, accuracy = self._predict(batch.captions)
        self.log_dict({"loss": loss, "accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        loss, accuracy = self._predict(batch.captions)
        scores = {"val_loss": loss, "val_accuracy": accuracy}
        self.log_dict(scores, prog_bar=True, batch_size=len(batch.captions))

    def _predict(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        ids = tokens.input_ids.to(self.device)
        states, pooled = self.states(ids)
        targets = attribute_table([parse_caption(caption) for caption in captions]).to(self.device)
        results = [
            attribute_losses(head(states[:, place - len(self.heads)]), targets, attributes)
            for place, (head, attributes) in enumerate(zip(self.heads, PREDICTED_BY_STATE, strict=True))
        ]
        if pooled is not None:
            results.append(attribute_losses(self.pooled_head(pooled), targets, tuple(CLASSES)))
        losses, accuracies = (torch.cat(column) for column in zip(*results, strict=True))
        return losses.mean() + self.further_loss(ids, states), accuracies.mean()


class TextEncoderTraining(_CaptionTraining):
    """Trains the CLIPTextModel of the SD-kind base; writes text encoder and tokenizer.

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
        from transformers import CLIPTextModel

        super().__init__(optimizer, lr_scheduler, output)
        self.text_encoder = CLIPTextModel(_text_config(self.tokenizer, hidden_size, layers))
        self.heads = _heads(hidden_size)

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.text_encoder(ids).last_hidden_state, None

    def on_fit_end(self) -> None:
        """Writes `text_encoder/` (fp16) and `tokenizer/`."""
        if self.trainer.is_global_zero:
            self.text_encoder.half().save_pretrained(self.output / "text_encoder")
            self.tokenizer.save_pretrained(self.output / "tokenizer")


class TextEncoderPairTraining(_CaptionTraining):
    """Trains the CLIPTextModel and CLIPTextModelWithProjection of the SDXL-kind base together; writes a base folder that lacks
    only the U-Net's weights.

    Trained are the states that SDXL's U-Net reads: the penultimate states of both encoders, concatenated, and the second one's
    projected pooled state, which here has to predict all attributes. The former also learn to be another encoder's states, so
    that a U-Net which reads that one can begin to read these.

    Args:
        optimizer: from parameters to optimizer.
        lr_scheduler: from optimizer to a per-step schedule.
        output: base folder to write.
        vae: folder of the autoencoder, copied into the base.
        hidden_size: width of each encoder's states; the U-Net's cross-attention dimension is twice that.
        layers: transformer layers of each; the last one's output is not read.
        imitated: pipeline folder whose CLIPTextModel has twice the width, and whose tokenizer is taken; None learns attributes
            alone.

    Raises:
        ValueError: if the imitated encoder has another width.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        output: str,
        vae: str = "data/toy/base/vae",
        hidden_size: int = 64,
        layers: int = 3,
        imitated: str | None = None,
    ) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        super().__init__(optimizer, lr_scheduler, output)
        self.vae = Path(vae)
        self._imitated: list[CLIPTextModel] = []  # in a list: frozen, and no part of this module's weights
        if imitated is not None:
            encoder = load_network(CLIPTextModel, Path(imitated) / "text_encoder").eval()
            if encoder.config.hidden_size != 2 * hidden_size:
                raise ValueError(
                    f"imitated '{imitated}' has states of width {encoder.config.hidden_size}, and both encoders together "
                    f"{2 * hidden_size}: set hidden_size to half of the former."
                )
            self._imitated.append(encoder)
            self.tokenizer = CLIPTokenizer.from_pretrained(Path(imitated) / "tokenizer")
        config = _text_config(self.tokenizer, hidden_size, layers)
        self.text_encoder = CLIPTextModel(config)
        self.text_encoder_2 = CLIPTextModelWithProjection(config)
        self.heads = _heads(2 * hidden_size)
        self.pooled_head = nn.Linear(hidden_size, sum(CLASS_COUNTS))

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds

    def further_loss(self, ids: Tensor, states: Tensor) -> Tensor:
        """Share of the imitated states' variance, over captions and places, that is missed."""
        if not self._imitated:
            return states.new_zeros(())
        with torch.no_grad():
            expected = self._imitated[0].to(self.device)(ids).last_hidden_state
        missed: Tensor = (states - expected).square().mean() / expected.var(dim=(0, 1)).mean()
        self.log("missed_variance", missed, prog_bar=True, batch_size=len(ids))
        return missed

    def on_fit_end(self) -> None:
        """Writes the encoders (fp16), both tokenizers, the autoencoder, the configs of U-Net and scheduler."""
        if not self.trainer.is_global_zero:
            return
        self.text_encoder.half().save_pretrained(self.output / "text_encoder")
        self.text_encoder_2.half().save_pretrained(self.output / "text_encoder_2")
        for name in ("tokenizer", "tokenizer_2"):
            self.tokenizer.save_pretrained(self.output / name)
        shutil.copytree(self.vae, self.output / "vae", dirs_exist_ok=True)
        config = self.text_encoder.config
        write_skeleton(self.output, 2 * config.hidden_size, config.projection_dim)


def _heads(width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, sum(CLASS_COUNTS)) for _ in PREDICTED_BY_STATE)


def _text_config(tokenizer: CLIPTokenizer, hidden_size: int, layers: int) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=CAPTION_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=hidden_size,
    )
