"""A base of full architecture with random weights, made on the device: speed and memory do not depend on the values."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from evaluation.benchmarks.full_size import save_configs
from sdxs_lightning.core.batch import Conditioning, TrainingBatch
from sdxs_lightning.families import Family
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.memory_plan.weightless import WeightlessFamily

Kind = Literal["sd15", "sdxl"]
TINY_TEXT = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "projection_dim": 32,
    "vocab_size": 64,
}
TINY_UNET = {
    "block_out_channels": [32, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "transformer_layers_per_block": 1,
    "sample_size": 16,
}
TINY_WIDTHS: dict[Kind, dict[str, int]] = {
    "sd15": {"cross_attention_dim": 32},
    # Both encoders beside each other; the pooled embeddings and six numbers of 256 features.
    "sdxl": {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 32 + 6 * 256},
}
TINY: dict[Kind, dict[str, dict[str, Any]]] = {
    kind: {
        "unet": TINY_UNET | widths,
        "vae": {
            "sample_size": 64,
            "block_out_channels": [8, 8, 8, 8],
            "norm_num_groups": 4,
            "layers_per_block": 1,
        },
        "text_encoder": TINY_TEXT,
        "text_encoder_2": TINY_TEXT,
    }
    for kind, widths in TINY_WIDTHS.items()
}
"""Overrides of the full configs."""


class RandomBase(WeightlessFamily):
    """Stands in for a family: its constants and shapes are the base's, its weights are random.

    Args:
        family: of which only the JSON files are read.
        device: where networks are made.
    """

    def __init__(self, family: Family, device: torch.device) -> None:
        super().__init__(family)
        self.device = device

    @classmethod
    def of(cls, kind: Kind, folder: Path, device: torch.device, tiny: bool = False) -> RandomBase:
        """SD-1.5 or SDXL; its JSON files are written to `folder`."""
        return cls(detect_family(str(config_folder(kind, folder, tiny))), device)

    def load_unet(self, folder: str | None = None, option: str = "weights") -> UNet2DConditionModel:
        """A new float32 U-Net."""
        config = self.unet_config if folder is None else read_json(Path(folder) / "config.json")
        with self.device:
            return UNet2DConditionModel.from_config(config)

    def load_vae(self) -> AutoencoderKL:
        """The base's KL VAE, float32."""
        with self.device:
            return AutoencoderKL.from_config(read_json(self.folder / "vae" / "config.json"))

    @cached_property
    def vae(self) -> AutoencoderKL:
        """What `encode` and `decode` use."""
        return self.load_vae().eval().requires_grad_(False)

    @torch.no_grad()
    def encode_prompts(
        self, captions: list[str], original_sizes: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditioning:
        """Embeddings of random tokens, by text encoders of the base's size."""
        encoders = list(self.text_encoders.values())
        vocabulary = read_json(self.folder / "text_encoder" / "config.json")["vocab_size"]
        tokens = torch.randint(0, vocabulary - 1, (len(captions), 77), device=self.device)
        if len(encoders) == 1:
            embeds = encoders[0](tokens)[0]
            return Conditioning(prompt_embeds=embeds, negative_prompt_embeds=embeds[:1].expand_as(embeds))
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        return Conditioning(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            add_time_ids=torch.full((len(captions), 6), 1024.0, device=self.device),
            negative_prompt_embeds=torch.zeros_like(embeds),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled),
        )

    @cached_property
    def text_encoders(self) -> dict[str, nn.Module]:
        """By the name of their folder."""
        folders = [self.folder / name for name in ("text_encoder", "text_encoder_2")]
        return {
            one.name: self._text_encoder(read_json(one / "config.json")) for one in folders if one.is_dir()
        }

    def _text_encoder(self, config: dict[str, Any]) -> nn.Module:
        with self.device:
            network = getattr(transformers, config["architectures"][0])
            encoder: nn.Module = network(transformers.CLIPTextConfig.from_dict(config))
        return encoder.eval().requires_grad_(False)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Takes the text encoders' type; the schedule's tables follow the latents."""
        for encoder in self.text_encoders.values():
            nn.Module.to(encoder, dtype=dtype)
        self.schedule.to(self.device)
        return self

    def batch(self, size: int) -> TrainingBatch:
        """Ready latents and captions."""
        return TrainingBatch(
            captions=["a photo"] * size,
            positions=torch.arange(size, device=self.device),
            sample_ids=[str(i) for i in range(size)],
            latents=torch.randn(size, *self.latent_shape(), device=self.device),
        )

    def host_batch(self, size: int) -> TrainingBatch:
        """The same on the host, as a loader gives it: in page-locked memory if there is a GPU."""
        batch = self.batch(size).to("cpu")
        return batch.pin_memory() if self.device.type == "cuda" else batch


def config_folder(kind: Kind, folder: Path, tiny: bool) -> Path:
    """The base's JSON files; with `tiny`, of a base of the same kind and small networks."""
    base = save_configs(kind, folder)
    if tiny:
        for name, changes in TINY[kind].items():
            file = base / name / "config.json"
            if file.is_file():
                file.write_text(json.dumps(read_json(file) | changes))
    return base
