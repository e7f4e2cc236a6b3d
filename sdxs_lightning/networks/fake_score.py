"""The fake score, or online DM: a diffusion model of what the student makes at present."""

from __future__ import annotations

from typing import cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.families import Family
from sdxs_lightning.networks.adapter_views import BaseView
from sdxs_lightning.networks.denoiser import Denoiser, Prediction
from sdxs_lightning.networks.feature_taps import bottleneck_shape
from sdxs_lightning.networks.lora import LoRA, cast_base
from sdxs_lightning.networks.network import Network, frozen_fingerprint, load_denoiser, save_adapters_only


class FakeScore(Network):
    """A trainable copy of the base, or adapters on it; a discriminator may read its bottleneck.

    Args:
        optimizer: called with the trainable parameters.
        lr_scheduler: stepped once per update of the fake score; None keeps the rate.
        weights: U-Net or pipeline folder to start from; None starts from the base.
        lora: learns by adapters on the base itself, so that one copy of its weights serves the fake and the real score: less
            memory, and a smaller optimizer; None trains every weight of a copy.
        gradient_checkpointing: recompute blocks in the backward pass: less memory, a third more work.
        compile_blocks: torch.compile of each block; pays on a GPU for runs of more than minutes.

    Raises:
        ValueError: for both weights and lora.
    """

    denoiser: Denoiser
    frozen_fingerprint: str | None
    """Of the weights under its adapters; None where every weight learns."""

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if weights is not None and lora is not None:
            raise ValueError(
                f"fake_score.lora learns on the base's own weights, and fake_score.weights is '{weights}'; set one of them to "
                "null."
            )
        self._weights = weights
        self.lora = lora
        self._switches = gradient_checkpointing, compile_blocks

    def build(self, family: Family) -> None:
        """Loads the network; a second call does nothing."""
        if hasattr(self, "denoiser"):
            return
        self.denoiser = load_denoiser(family, self._weights, self.lora, *self._switches)
        self.frozen_fingerprint = frozen_fingerprint(self.denoiser)
        if self.lora is not None:
            save_adapters_only(self)

    def shared_base(self, dtype: torch.dtype) -> Denoiser | None:
        """The base inside this network, to serve as real score; None for a fake score that has weights of its own.

        Args:
            dtype: of the base's weights from now on; the adapters stay float32.
        """
        if self.lora is None:
            return None
        cast_base(self.denoiser.unet, dtype)
        return BaseView(self.denoiser)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Noise prediction (B, C, h, w), float32."""
        return self.predict(noisy_latents, timesteps, conditioning).noise_pred

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Prediction:
        """Output, pred_x0 and noise_pred."""
        return cast(Prediction, self.denoiser(noisy_latents, timesteps, conditioning))

    def predict_with_features(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[Prediction, Tensor]:
        """`predict`, and the bottleneck's features (B, C', h', w') of the same pass."""
        prediction, features = self.denoiser.with_features(noisy_latents, timesteps, conditioning)
        return prediction, self._for_heads(features)

    def features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Bottleneck features alone, at the encoder's cost."""
        return self._for_heads(self.denoiser.features(noisy_latents, timesteps, conditioning))

    def _for_heads(self, features: Tensor) -> Tensor:
        # A shared base may be bfloat16 throughout; the discriminator's head is float32.
        return features if self.lora is None else features.float()

    def feature_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape (C', h', w') of the features for latents of that shape."""
        return bottleneck_shape(self.denoiser.unet, latent_shape)
