"""A family without weights: networks on the meta device, built from their configs."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.families import Family
from sdxs_lightning.families.folders import kl_folder, read_json, unet_config, vae_class
from sdxs_lightning.families.sources import fitting_unet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel


META = torch.device("meta")


class WeightlessFamily:
    """Replaces a family by one with the same constants and with networks on the meta device.

    Args:
        family: the family, of which only JSON files are read.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._dtype = torch.float32
        self.encodes = False
        """Whether the stage has encoded prompts."""

    def __getattr__(self, name: str) -> Any:
        # copy and pickle look up attributes before the object is initialised.
        if name.startswith("__") or "_family" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._family, name)

    def load_unet(self, folder: str | None = None, option: str = "weights") -> UNet2DConditionModel:
        """Builds the base's U-Net, or that of a U-Net or pipeline folder (such as a pruned student), if it fits the base."""
        from diffusers import UNet2DConditionModel

        if folder is None:
            config = self._family.unet_config
        else:
            config = unet_config(fitting_unet(folder, option, self._family.folder, self.prompt_width))
        with META:
            return UNet2DConditionModel.from_config(config)

    def load_vae(self) -> AutoencoderKL:
        """Builds the base's KL VAE."""
        from diffusers import AutoencoderKL

        folder = kl_folder(self._family.folder)
        if folder is None:
            raise FileNotFoundError(f"'{self._family.folder}' has no AutoencoderKL in vae or vae_large.")
        with META:
            return AutoencoderKL.from_config(read_json(folder / "config.json"))

    def encode_prompts(
        self, captions: list[str], original_sizes: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditioning:
        """Returns embeddings with the right shapes and dtype; the text encoders' temporary activations are not counted."""
        self.encodes = True
        encoders, count = list(self.text_encoders.values()), len(captions)
        configs: list[Any] = [encoder.config for encoder in encoders]
        shape = count, configs[0].max_position_embeddings, sum(config.hidden_size for config in configs)
        embeds = torch.empty(shape, dtype=self._dtype, device=META)
        if len(encoders) == 1:
            # SD's unconditional embeddings are one row expanded to B.
            negative = torch.empty((1, *shape[1:]), dtype=self._dtype, device=META).expand_as(embeds)
            return Conditioning(prompt_embeds=embeds, negative_prompt_embeds=negative)
        pooled = torch.empty(count, configs[-1].projection_dim, dtype=self._dtype, device=META)
        return Conditioning(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            add_time_ids=torch.empty(count, 6, device=META),
            negative_prompt_embeds=torch.zeros_like(embeds),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled),
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        from diffusers import AutoencoderKL

        assert isinstance(self.vae, AutoencoderKL)
        return self._family.scale_latents(self.vae.encode(images).latent_dist.mode())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_with_graph(latents)

    def decode_with_graph(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(self._family.unscale_latents(latents)).sample
        return images.float()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Sets the dtype of the text encoders; all networks stay on the meta device."""
        self._dtype = dtype or self._dtype
        self._family.schedule.to(META)
        for encoder in self.text_encoders.values():
            encoder.to(self._dtype)
        return self

    @cached_property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Text encoders by folder name."""
        folders = [self._family.folder / name for name in ("text_encoder", "text_encoder_2")]
        present = [folder for folder in folders if (folder / "config.json").is_file()]
        return {folder.name: _text_encoder(read_json(folder / "config.json")) for folder in present}

    @cached_property
    def vae(self) -> AutoencoderKL | AutoencoderTiny:
        """The base's `vae`, used by `encode` and `decode`; built on first use."""
        folder = self._family.folder / "vae"
        # Not counted as live bytes: only the first of the profile's two runs builds it, which would change the growth with the
        # batch.
        with _disable_current_modes(), META:
            vae = vae_class(folder).from_config(read_json(folder / "config.json"))
        return vae.eval().requires_grad_(False)

    @property
    def decodes(self) -> bool:
        """Whether the stage has decoded or encoded images."""
        return "vae" in self.__dict__


def _text_encoder(config: dict[str, Any]) -> nn.Module:
    import transformers

    name = (config.get("architectures") or ["CLIPTextModel"])[0]
    with META:
        encoder: nn.Module = getattr(transformers, name)(transformers.CLIPTextConfig.from_dict(config))
    return encoder.eval().requires_grad_(False)
