"""Base class of the families: everything except prompt encoding."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.core.latents import scale, unscale
from sdxs_lightning.core.noise_schedule import PREDICTION_TYPES, NoiseSchedule, PredictionType
from sdxs_lightning.families.folders import (
    Layout,
    check_unet,
    kl_folder,
    latent_scale,
    read_json,
    read_vae,
    unet_config,
    vae_class,
    vae_factor,
)
from sdxs_lightning.families.network_types import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    CLIPTokenizer,
    UNet2DConditionModel,
)
from sdxs_lightning.families.sources import fitting_unet, resolve_base
from sdxs_lightning.families.weights import load_network

_PROBE = "A photo of 2 Red\tcars, 13 dogs & l'\u00e9t\u00e9 \u2014 \u96e8 \U0001f600!"
"""A text of letters, digits and signs, whose ids tell tokenizers of one vocabulary apart."""


class PretrainedBase(ABC):
    """A base on disk; reads constants at construction and loads networks on first use.

    Construction reads only small JSON files, after fetching a hub id or converting a single file. Text encoders and VAE are
    frozen and not in checkpoints.

    Args:
        base: diffusers folder, hub id (`org/name`, `org/name@revision`), or .safetensors file in the original layout.
        conditioning_timestep: timestep of one-step students.
        config: for a single file, the folder or hub id of its configs and tokenizers.

    Raises:
        FileNotFoundError: if the base or a component is missing.
        ValueError: for a base of another family, a pickle, a corrupt file, or a timestep outside the schedule.
    """

    layout: ClassVar[Layout]
    kl_scaling_factor: ClassVar[float]
    """Default if the KL VAE's config has no scaling_factor."""
    encoder_classes: ClassVar[dict[str, str]]
    """transformers classes of the text encoders, by folder; names, since importing transformers takes seconds."""

    def __init__(self, base: str, conditioning_timestep: int, config: str | None = None) -> None:
        from diffusers import AutoencoderTiny

        self.base = base
        self.folder = resolve_base(base, config, self.layout)
        scheduler = read_json(self.folder / "scheduler" / "scheduler_config.json")
        self.schedule = NoiseSchedule.from_scheduler_config(scheduler)
        self.prediction_type: PredictionType = scheduler.get("prediction_type", "epsilon")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"{self.layout.family}: the scheduler of '{self.folder}' has prediction_type '{self.prediction_type}', "
                f"known are {', '.join(PREDICTION_TYPES)}."
            )
        if not 0 <= conditioning_timestep < self.schedule.num_train_timesteps:
            raise ValueError(
                f"conditioning_timestep must be in [0, {self.schedule.num_train_timesteps - 1}], got "
                f"{conditioning_timestep}; change family.init_args.conditioning_timestep."
            )
        self.conditioning_timestep = conditioning_timestep
        self.pipeline_class: str = self.layout.pipeline_class
        self.pipeline_options: dict[str, Any] = dict(self.layout.pipeline_options)
        self.unet_config: dict[str, Any] = unet_config(self.folder / "unet")
        self._vae_config = read_json(self.folder / "vae" / "config.json")
        # Even if there is only a tiny VAE, the U-Net takes latents of the KL VAE that it was trained on.
        kl = kl_folder(self.folder)
        scale_of_kl = (
            (self.kl_scaling_factor, 0.0) if kl is None else latent_scale(kl, self.kl_scaling_factor)
        )
        self.scaling_factor, self.shift_factor = scale_of_kl
        tiny = vae_class(self.folder / "vae") is AutoencoderTiny
        self._decoder_scale = latent_scale(self.folder / "vae", 1.0 if tiny else self.kl_scaling_factor)
        self.resolution: int = self.unet_config["sample_size"] * vae_factor(self._vae_config)
        self._device, self._dtype = torch.device("cpu"), torch.float32

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """Shape (C, h, w) of one sample's latents, by default at the base's resolution."""
        side = (resolution or self.resolution) // vae_factor(self._vae_config)
        return self.unet_config["in_channels"], side, side

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Converts the KL VAE encoder's output, as stored in shards, to U-Net input (B, C, h, w), float32."""
        return scale(latents, self.scaling_factor, self.shift_factor)

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `scale_latents`: converts to the KL VAE decoder's input."""
        return unscale(latents, self.scaling_factor, self.shift_factor)

    @property
    def prompt_width(self) -> int:
        """Total width of the text encoders."""
        return sum(
            read_json(self.folder / name / "config.json")["hidden_size"] for name in self.encoder_classes
        )

    def load_unet(self, folder: str | None = None, option: str = "weights") -> UNet2DConditionModel:
        """Loads a new float32 U-Net: the base's, or that of a U-Net or pipeline folder or hub id (such as a pruned student).

        `option` is the setting that names it, for messages.
        """
        from diffusers import UNet2DConditionModel

        if folder is None:
            source = self.folder / "unet"
            check_unet(source, self.folder, self.prompt_width)
        else:
            source = fitting_unet(folder, option, self.folder, self.prompt_width)
        return load_network(UNet2DConditionModel, source)

    def load_vae(self) -> AutoencoderKL:
        """Loads the base's KL VAE, float32: `vae`, or `vae_large` if `vae` is a tiny one."""
        return read_vae(self.folder)

    @abstractmethod
    def encode_prompts(
        self, captions: list[str], original_sizes: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditioning:
        """Embeds B captions like the base's diffusers pipeline, with unconditional embeddings, under no_grad."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encodes images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w), float32: means of the KL VAE.

        The KL VAE encodes even if the base decodes with a tiny VAE, since the U-Net was trained on its latents.
        """
        posterior = self._kl_vae.module.encode(images.to(self._device, torch.float32)).latent_dist
        return self.scale_latents(posterior.mode())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], float32, under no_grad."""
        return self.decode_with_graph(latents)

    def decode_with_graph(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1] and not clamped, float32.

        Uses the base's `vae`. An AutoencoderTiny takes scaled latents unchanged, since its scaling factor is 1.
        """
        unscaled = unscale(latents.to(self._device), *self._decoder_scale)
        images: Tensor = self._vae.module.decode(unscaled).sample
        return images.float()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves the networks, including those loaded later.

        `dtype` applies to the text encoders; the VAE stays float32 (SDXL's overflows in float16).
        """
        self._device = torch.device(device) if device is not None else self._device
        self._dtype = dtype or self._dtype
        self.schedule.to(self._device)
        self.__dict__.pop("_empty_prompt", None)  # of the old dtype
        if "_text_encoders" in self.__dict__:
            for encoder in self._text_encoders:
                encoder.to(self._device, self._dtype)
        for name in ("_vae", "_own_kl_vae"):
            if name in self.__dict__:
                self.__dict__[name].to(self._device)
        return self

    def tokenizer_digest(self, load: bool) -> str | None:
        """16-digit hex hash of how prompts become token ids.

        Args:
            load: whether to load the tokenizers; None is returned otherwise, unless they have been used.
        """
        return self._tokenizer_digest if load or "_tokenizers" in self.__dict__ else None

    @cached_property
    def _tokenizer_digest(self) -> str:
        # Not of the files, which differ between versions of transformers.
        told = [
            [sorted(one.get_vocab().items()), self._token_ids(one, [_PROBE]).tolist()]
            for one in self._tokenizers
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def _token_ids(self, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
        """(B, tokens), int64: padded and truncated to the encoder's length, like in the diffusers pipelines."""
        tokens = tokenizer(
            captions,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # Else the host would wait for all work that it has queued on a GPU, at the start of each iteration.
        ids: Tensor = tokens.input_ids.to(self._device, non_blocking=self._device.type not in ("cpu", "mps"))
        return ids

    @cached_property
    def _tokenizers(self) -> list[CLIPTokenizer]:
        from transformers import CLIPTokenizer

        names = (name.replace("text_encoder", "tokenizer") for name in self.encoder_classes)
        return [CLIPTokenizer.from_pretrained(self.folder / name, local_files_only=True) for name in names]

    @cached_property
    def _text_encoders(self) -> list[Frozen[CLIPTextModel]]:
        import transformers

        return [
            Frozen(load_network(getattr(transformers, network), self.folder / name, self._dtype)).to(
                self._device
            )
            for name, network in self.encoder_classes.items()
        ]

    @property
    def _kl_vae(self) -> Frozen[AutoencoderKL]:
        from diffusers import AutoencoderKL

        return self._vae if isinstance(self._vae.module, AutoencoderKL) else self._own_kl_vae

    @cached_property
    def _own_kl_vae(self) -> Frozen[AutoencoderKL]:
        return Frozen(self.load_vae()).to(self._device)

    @cached_property
    def _vae(self) -> Frozen[AutoencoderKL | AutoencoderTiny]:
        folder = self.folder / "vae"
        return Frozen(load_network(vae_class(folder), folder)).to(self._device)
