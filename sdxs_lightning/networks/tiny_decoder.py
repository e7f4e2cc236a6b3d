"""The tiny image decoder: the decoder of diffusers' AutoencoderTiny, as in TAESD."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from sdxs_lightning.families.network_types import AutoencoderTiny
from sdxs_lightning.networks.ema import check_decay
from sdxs_lightning.networks.network import Network, without_autocast


@dataclass(frozen=True)
class DecoderTopology:
    """Architecture of the decoder, with diffusers' names; the defaults are TAESD's, 1,222,531 parameters."""

    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    """Channels at each resolution, from the latents' to the image's; diffusers' decoder needs them equal."""
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    """Residual blocks of three 3x3 convolutions at each resolution."""
    upsample_fn: Literal["nearest", "bilinear", "bicubic"] = "nearest"
    """Interpolation between two resolutions."""
    upsampling_scaling_factor: int = 2
    """Upsampling factor per side."""
    act_fn: Literal["relu", "gelu", "swish", "mish"] = "relu"
    """Activation between the convolutions of a block."""

    def __post_init__(self) -> None:
        if len(self.block_out_channels) != len(self.num_decoder_blocks) or not self.block_out_channels:
            raise ValueError(
                "decoder.topology needs one width and one number of blocks per resolution, got block_out_channels "
                f"{list(self.block_out_channels)} and num_decoder_blocks {list(self.num_decoder_blocks)}."
            )
        if len(set(self.block_out_channels)) > 1:
            raise ValueError(
                f"decoder.topology.block_out_channels must be equal, got {list(self.block_out_channels)}: diffusers' "
                "DecoderTiny does not change width between resolutions."
            )

    @property
    def factor(self) -> int:
        """Upscaling factor per side from latents to image."""
        return int(self.upsampling_scaling_factor ** (len(self.block_out_channels) - 1))

    def config(self, latent_channels: int) -> dict[str, Any]:
        """Arguments of AutoencoderTiny for this decoder, with a minimal encoder.

        The decoder takes scaled latents, so scaling_factor is 1 and shift_factor 0.
        """
        resolutions = len(self.block_out_channels)
        return {
            "latent_channels": latent_channels,
            "decoder_block_out_channels": self.block_out_channels,
            "num_decoder_blocks": self.num_decoder_blocks,
            "upsample_fn": self.upsample_fn,
            "upsampling_scaling_factor": self.upsampling_scaling_factor,
            "act_fn": self.act_fn,
            "encoder_block_out_channels": (8,) * resolutions,
            "num_encoder_blocks": (1,) * resolutions,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
        }


class TinyDecoder(Network):
    """Maps scaled latents to images; a plain CNN without attention and normalisation.

    Always trains in float32: bfloat16 images have steps of half a byte near white, which a discriminator detects, and the cost
    is negligible beside the sampler's and the VAE's.

    Args:
        optimizer: called with the trainable parameters.
        lr_scheduler: stepped once per update of the decoder; None keeps the rate constant.
        topology: None is TAESD's, or that of base_weights.
        base_weights: folder of an AutoencoderTiny (or of a pipeline with one) to start from, such as TAESD; its encoder is
            exported too. None starts from random weights.
        compile_decoder: torch.compile the decoder; worthwhile on a GPU for runs longer than minutes.
        seed: seed of random weights, which are thus equal on every rank.

    Raises:
        ValueError: if both topology and base_weights are set.
    """

    decoder: nn.Module

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        topology: DecoderTopology | None = None,
        base_weights: str | None = None,
        compile_decoder: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if topology is not None and base_weights is not None:
            raise ValueError(
                "decoder.init_args.topology and base_weights exclude each other: the folder has its own topology; set one "
                "of them to null."
            )
        self._topology = topology or DecoderTopology()
        self._base_weights = base_weights
        self._compile = compile_decoder
        self._seed = seed

    def build(self, latent_channels: int, vae_factor: int) -> None:
        """Builds the network. Idempotent.

        Args:
            latent_channels: latent channels of the base.
            vae_factor: upscaling factor of the base's VAE per side.

        Raises:
            FileNotFoundError: if base_weights has no AutoencoderTiny.
            ValueError: if the topology does not fit the base's latents.
        """
        if hasattr(self, "decoder"):
            return
        autoencoder = self._autoencoder(latent_channels)
        config = autoencoder.config
        factor = tiny_factor(config)
        if (config.latent_channels, factor) != (latent_channels, vae_factor):
            raise ValueError(
                f"the tiny decoder maps {config.latent_channels} latent channels to images {factor} times as large, and the "
                f"base has {latent_channels} channels and factor {vae_factor}; change decoder.init_args.topology (one entry "
                "more doubles the image) or base_weights."
            )
        self._latent_channels = latent_channels
        self.decoder = autoencoder.decoder.train().to(memory_format=torch.channels_last)
        if self._compile:
            self.decoder.compile()

    def forward(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1], not clamped, float32."""
        with without_autocast(latents.device):
            images: Tensor = self.decoder(latents.float())
        return images

    @property
    def last_weight(self) -> nn.Parameter:
        """Weight of the last convolution, where the gradients of the losses are compared."""
        layers: Any = self.decoder.layers
        weight: nn.Parameter = layers[-1].weight
        return weight

    def autoencoder(self, weights: Mapping[str, Tensor]) -> AutoencoderTiny:
        """Builds the AutoencoderTiny to export, with the given decoder weights.

        Its encoder is that of base_weights. Without base_weights the untrained encoder is filled with NaN, so that an
        image-to-image pipeline fails visibly.

        Args:
            weights: unsharded decoder weights, named as in `self.decoder`.
        """
        autoencoder = self._autoencoder(self._latent_channels)
        if self._base_weights is None:
            for parameter in autoencoder.encoder.parameters():
                nn.init.constant_(parameter, float("nan"))
        autoencoder.decoder.load_state_dict(weights)
        return autoencoder.eval()

    def _autoencoder(self, latent_channels: int) -> AutoencoderTiny:
        from diffusers import AutoencoderTiny

        if self._base_weights is None:
            # A random state of its own, so that weights do not depend on earlier draws, which differ between ranks.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                autoencoder = AutoencoderTiny(**self._topology.config(latent_channels))
                _initialise(autoencoder.decoder)
                return autoencoder
        return load_tiny(self._base_weights, "decoder.init_args.base_weights")


@torch.no_grad()
def _initialise(decoder: nn.Module) -> None:
    """Variance-preserving initialisation, with residual blocks near the identity and a mid-grey output.

    Without normalisation torch's default weights are too small: on the toy world this gains 1 dB in the first 400 updates.
    """
    from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock

    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            # The convolutions after upsampling have neither bias nor activation.
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if module.bias is None else "relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    blocks = [module.conv[-1] for module in decoder.modules() if isinstance(module, AutoencoderTinyBlock)]
    layers: Any = decoder.layers
    for convolution in (*blocks, layers[-1]):
        convolution.weight.mul_(0.1)
    layers[-1].bias.fill_(0.5)  # the decoder's own output range is [0, 1]


def load_tiny(folder: str, option: str) -> AutoencoderTiny:
    """Loads an AutoencoderTiny, float32, from its folder or from the `vae` folder of a pipeline.

    Args:
        folder: the folder.
        option: name of the setting, for the error message.

    Raises:
        FileNotFoundError: if the folder has no AutoencoderTiny.
    """
    from diffusers import AutoencoderTiny

    path = Path(folder)
    if not (path / "config.json").is_file():
        path = path / "vae"
    config = AutoencoderTiny.load_config(path) if (path / "config.json").is_file() else {}
    found = config.get("_class_name")
    if found != "AutoencoderTiny":
        what = f"a {found}" if found else "neither config.json nor vae/config.json"
        raise FileNotFoundError(
            f"'{folder}' holds {what} and no AutoencoderTiny; give the folder of one as {option}."
        )
    with torch.device("cpu"):  # on the memory plan's meta device loading warns for each tensor
        autoencoder: AutoencoderTiny = AutoencoderTiny.from_pretrained(
            path, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    return autoencoder.to(torch.get_default_device())


def tiny_factor(config: Any) -> int:
    """Upscaling factor per side of an AutoencoderTiny with this config."""
    return int(config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1))


class DecoderAverage(nn.Module):
    """Exponential moving average of the decoder, initialised as a copy of it; exported.

    average <- decay * average + (1 - decay) * decoder, once per update. A registered submodule, so checkpoints include it.

    Args:
        decoder: a built decoder.
        decay: in [0, 1); 0 copies the weights.

    Raises:
        ValueError: if decay is out of range.
    """

    def __init__(self, decoder: TinyDecoder, decay: float) -> None:
        super().__init__()
        check_decay(decay)
        self.decay = decay
        self.decoder = copy.deepcopy(decoder.decoder).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, decoder: TinyDecoder) -> None:
        """Updates the average."""
        averaged: list[Tensor] = list(self.parameters())
        current: list[Tensor] = list(decoder.decoder.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.decay)
