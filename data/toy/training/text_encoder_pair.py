"""Pretraining of the two text encoders of the SDXL-kind toy base, and the rest of its folder.

As `text_encoder.py`, but for what SDXL's U-Net reads: the penultimate states of both encoders side by side, and the second
one's projected pooled state, which here has to name the whole picture.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from data.toy.attributes import CLASS_COUNTS, CLASSES, attribute_table
from data.toy.rendered import CaptionedImages
from data.toy.tokenizer import CAPTION_TOKENS, build_tokenizer
from data.toy.training.fitting import ToyTraining
from data.toy.training.sdxl_base import write_skeleton
from data.toy.training.text_encoder import NAMED_BY_STATE, named_by
from data.toy.world import parse_caption


class TextEncoderPairTraining(ToyTraining):
    """Trains a CLIPTextModel and a CLIPTextModelWithProjection together; writes a base folder that lacks U-Net weights only.

    Args:
        optimizer: from parameters to optimizer.
        lr_scheduler: from optimizer to a per-step schedule.
        output: base folder to write.
        vae: folder of the autoencoder that the base takes over.
        hidden_size: width of each encoder's states; the U-Net's cross-attention dimension is twice that.
        layers: transformer layers of each; the last one's output is not read.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        output: str,
        vae: str = "data/toy/base/vae",
        hidden_size: int = 64,
        layers: int = 3,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.output, self.vae = Path(output), Path(vae)
        self.tokenizer = build_tokenizer()
        config = _text_config(self.tokenizer, hidden_size, layers)
        self.text_encoder = CLIPTextModel(config)
        self.text_encoder_2 = CLIPTextModelWithProjection(config)
        self.heads = nn.ModuleList(nn.Linear(2 * hidden_size, sum(CLASS_COUNTS)) for _ in NAMED_BY_STATE)
        self.pooled_head = nn.Linear(hidden_size, sum(CLASS_COUNTS))

    def training_step(self, batch: CaptionedImages, batch_idx: int) -> Tensor:
        """Mean cross-entropy over what each state, and the pooled one, has to name."""
        loss, accuracy = self._read(batch.captions)
        self.log_dict({"loss": loss, "accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        """The same on unseen scenes."""
        loss, accuracy = self._read(batch.captions)
        scores = {"val_loss": loss, "val_accuracy": accuracy}
        self.log_dict(scores, prog_bar=True, batch_size=len(batch.captions))

    def _read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        ids = tokens.input_ids.to(self.device)
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        targets = attribute_table([parse_caption(caption) for caption in captions]).to(self.device)
        named = [
            named_by(head(states[:, place - len(self.heads)]), targets, attributes)
            for place, (head, attributes) in enumerate(zip(self.heads, NAMED_BY_STATE, strict=True))
        ]
        named.append(named_by(self.pooled_head(second.text_embeds), targets, tuple(CLASSES)))
        losses, right = (torch.cat(parts) for parts in zip(*named, strict=True))
        return losses.mean(), right.mean()

    def on_fit_end(self) -> None:
        """Write the encoders (fp16), both tokenizers, the autoencoder, the configs of U-Net and scheduler."""
        if not self.trainer.is_global_zero:
            return
        self.text_encoder.half().save_pretrained(self.output / "text_encoder")
        self.text_encoder_2.half().save_pretrained(self.output / "text_encoder_2")
        for name in ("tokenizer", "tokenizer_2"):
            self.tokenizer.save_pretrained(self.output / name)
        shutil.copytree(self.vae, self.output / "vae", dirs_exist_ok=True)
        config = self.text_encoder.config
        write_skeleton(self.output, 2 * config.hidden_size, config.projection_dim)


def _text_config(tokenizer: CLIPTokenizer, hidden_size: int, layers: int) -> CLIPTextConfig:
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
