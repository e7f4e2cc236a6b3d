"""Backend torch: the networks of a diffusers folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.families.folders import read_json, vae_class
from sdxs_lightning.families.weights import load_network
from sdxs_lightning.inference.adapters import ScaledAdapter
from sdxs_lightning.inference.model_folder import ModelFolder
from sdxs_lightning.inference.networks import Control, Prompts


class TorchNetworks:
    """Networks of a diffusers folder; loaded by `load`.

    Args:
        model: the folder.
        parts: networks by folder name; "encoder" is the autoencoder that encodes images, if there is one, and "controlnet"
            the ControlNet.
        device: where they are.
        dtype: of their weights.
        adapter: the LoRA.
    """

    def __init__(
        self,
        model: ModelFolder,
        parts: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        adapter: ScaledAdapter | None = None,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.parts = parts
        self._model = model
        self._adapter = adapter
        self._timesteps: dict[int, Tensor] = {}
        self._encoders = [parts[name] for name in model.encoders]
        self._decoder_scale = model.scale_of("vae")
        # As in diffusers' SDXL pipelines; their SD pipelines take the dtype that they were given.
        vae = parts["vae"].config
        self._decodes_in_float32 = bool(
            model.has_pooled_prompts and dtype == torch.float16 and vae.get("force_upcast", False)
        )
        if self._decodes_in_float32:
            parts["vae"].float()

    @classmethod
    def load(
        cls,
        model: ModelFolder,
        device: torch.device,
        dtype: torch.dtype,
        controlnet: str | Path | None = None,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
    ) -> TorchNetworks:
        """Loads all networks of a folder.

        Raises:
            UserError: for unreadable weights, or adapters that do not fit.
        """
        try:
            parts = {name: load_part(model, name) for name in ("unet", "vae", *model.encoders)}
            if controlnet is not None:
                parts["controlnet"] = load_fitting_controlnet(
                    controlnet, parts["unet"], model.factor, f"controlnet '{controlnet}'"
                )
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        adapter = None if lora is None else ScaledAdapter.load(lora, parts["unet"], lora_scale)
        for network in parts.values():
            place(network, device, dtype)
        if adapter is not None:
            adapter.start()
        return cls(model, parts, device, dtype, adapter)

    @property
    def has_control(self) -> bool:
        return "controlnet" in self.parts

    def set_lora_scale(self, scale: float) -> None:
        """Changes the weight of the LoRA, in place, so that compiled graphs stay valid.

        Raises:
            UserError: without a LoRA.
        """
        if self._adapter is None:
            raise UserError("the model was loaded without LoRA; give one as `lora`.")
        self._adapter.apply(scale)

    def encode_prompts(self, token_ids: Sequence[Tensor]) -> Prompts:
        placed = [ids.to(self.device) for ids in token_ids]
        return encoded_prompts(self._encoders, placed, self._model.has_pooled_prompts)

    def encode_image(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if "encoder" not in self.parts:
            self.parts["encoder"] = place(
                load_encoder(self._model, self.parts["vae"]), self.device, self.dtype
            )
        vae = self.parts["encoder"]
        scale = self._model.scale_of(encoder_folder(self._model, self.parts["vae"]))
        upcast = (
            self._model.has_pooled_prompts and self.dtype == torch.float16 and vae.config.get("force_upcast")
        )
        if upcast:
            vae.float()
        encoded = vae.encode(image.float() if upcast else image)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.sample(generator)
        scaled: Tensor = scale * latents.to(self.dtype)
        return scaled

    def predict(
        self,
        latents: Tensor,
        timestep: int | Tensor,
        prompts: Prompts,
        time_ids: Tensor | None,
        control: Control | None,
    ) -> Tensor:
        unet = self.parts["unet"]
        placed = self._placed(timestep)
        added = None if time_ids is None else {"text_embeds": prompts.pooled, "time_ids": time_ids}
        residuals: dict[str, Any] = {}
        if control is not None:
            down, mid = self.parts["controlnet"](
                latents,
                placed,
                encoder_hidden_states=prompts.embeds,
                controlnet_cond=control.images,
                conditioning_scale=control.scale,
                added_cond_kwargs=added,
                return_dict=False,
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        given = prompts.shifted()
        output: Tensor = unet(
            latents,
            placed,
            encoder_hidden_states=given.embeds,
            timestep_cond=given.guidance,
            added_cond_kwargs=None if added is None else added | {"text_embeds": given.pooled},
            return_dict=False,
            **residuals,
        )[0]
        return output

    def _placed(self, timestep: int | Tensor) -> Tensor:
        """The timestep on the device, copied there once: a copy for each call would make the host wait for the device."""
        if isinstance(timestep, Tensor):
            return timestep
        if timestep not in self._timesteps:
            self._timesteps[timestep] = torch.tensor(timestep, device=self.device)
        return self._timesteps[timestep]

    def decode(self, latents: Tensor) -> Tensor:
        if self._decodes_in_float32:
            latents = latents.float()
        images: Tensor = self.parts["vae"].decode(latents / self._decoder_scale, return_dict=False)[0]
        return images


def encoded_prompts(encoders: Sequence[Any], token_ids: Sequence[Tensor], pooled: bool) -> Prompts:
    """As diffusers' pipelines: SD's last hidden state; SDXL's penultimate ones side by side, and the pooled output."""
    if not pooled:
        return Prompts(encoders[0](token_ids[0])[0], None)
    outputs = [
        encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, token_ids, strict=True)
    ]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return Prompts(embeds, outputs[-1].text_embeds)


def load_part(model: ModelFolder, name: str) -> nn.Module:
    """One network of a diffusers folder, float32, on the CPU: "unet", "vae", "vae_large" or a text encoder.

    Raises:
        FileNotFoundError: without weights.
        ValueError: for unreadable ones.
    """
    import transformers
    from diffusers import UNet2DConditionModel

    from sdxs_lightning.families.sd import StableDiffusion
    from sdxs_lightning.families.sdxl import StableDiffusionXL

    folder = model.path / name
    network: Any
    if name == "unet":
        network = UNet2DConditionModel
    elif name.startswith("vae"):
        network = vae_class(folder)
    else:
        family = StableDiffusionXL if model.has_pooled_prompts else StableDiffusion
        network = getattr(transformers, family.encoder_classes[name])
    loaded: nn.Module = load_network(network, folder)
    return loaded.eval().requires_grad_(False)


def load_fitting_controlnet(source: str | Path, unet: Any, factor: int, named: str) -> nn.Module:
    """A ControlNet for RGB images whose residuals the U-Net takes, float32, on the CPU.

    Args:
        source: its folder or hub id.
        unet: the network that gets the residuals.
        factor: how many times smaller the latents are than images.
        named: its option and value, for messages.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for one of another U-Net or VAE, or of other condition images than RGB.
    """
    from sdxs_lightning.networks.controlnet import check_fits, check_reads_rgb, check_stem, load_controlnet

    controlnet = load_controlnet(source)
    check_fits(controlnet, unet, named)
    check_stem(controlnet, factor, named)
    check_reads_rgb(controlnet, named)
    loaded: nn.Module = controlnet.eval().requires_grad_(False)
    return loaded


def encoder_folder(model: ModelFolder, vae: Any) -> str:
    """The autoencoder that encodes images: "vae", or "vae_large" where the tiny one was exported without an encoder.

    Raises:
        UserError: where there is neither.
    """
    tiny = type(vae).__name__ == "AutoencoderTiny"
    # An untrained encoder is exported as NaN, see networks/tiny_decoder.py.
    if not tiny or all(bool(one.isfinite().all()) for one in vae.encoder.parameters()):
        return "vae"
    if (model.path / "vae_large").is_dir():
        return "vae_large"
    raise UserError(
        f"'{model.path}' cannot encode images: its tiny autoencoder has a decoder only, and there is no vae_large; add the "
        "base's VAE as vae_large."
    )


def load_encoder(model: ModelFolder, vae: Any) -> nn.Module:
    """The network of `encoder_folder`."""
    folder = encoder_folder(model, vae)
    if folder == "vae":
        same: nn.Module = vae
        return same
    found = read_json(model.path / folder / "config.json").get("_class_name", "AutoencoderKL")
    assert found == "AutoencoderKL", found
    return load_part(model, folder)


def place(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Moves and casts a network; on a GPU, convolutions become channels last, as its tensor cores want them."""
    from diffusers import ModelMixin

    nn.Module.to(network, device=device, dtype=dtype)  # the override of diffusers warns about every cast
    if device.type == "cuda" and isinstance(network, ModelMixin):
        nn.Module.to(network, memory_format=torch.channels_last)
    return network.eval().requires_grad_(False)
