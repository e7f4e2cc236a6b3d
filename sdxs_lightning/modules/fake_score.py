"""The fake score, or online DM: a diffusion model of what the student makes at present."""

from __future__ import annotations

from typing import cast

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from sdxs_lightning.batch import Conditioning
from sdxs_lightning.families import Family
from sdxs_lightning.modules.network import Network, prepare_unet
from sdxs_lightning.teacher.denoiser import Denoiser, Prediction
from sdxs_lightning.teacher.feature_taps import bottleneck_shape


class FakeScore(Network):
    """A trainable copy of the base, whose bottleneck also is the discriminator's eye.

    Args:
        optimizer: called with the trainable parameters.
        lr_scheduler: stepped once per update of the fake score; None keeps the rate.
        weights: U-Net or pipeline folder to start from; None starts from the base.
        gradient_checkpointing: recompute blocks in the backward pass: less memory, a third more work.
        compile_blocks: torch.compile of each block; pays on a GPU for runs of more than minutes.
    """

    denoiser: Denoiser

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self._weights = weights
        self._switches = gradient_checkpointing, compile_blocks

    def build(self, family: Family) -> None:
        """Loads the network; a second call does nothing."""
        if hasattr(self, "denoiser"):
            return
        unet = prepare_unet(family.load_unet(self._weights), *self._switches)
        self.denoiser = Denoiser(unet, family.schedule, family.prediction_type)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Noise prediction (B, C, h, w), float32."""
        return self.predict(noisy_latents, timesteps, conditioning).noise_pred

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Prediction:
        """Everything that the network says: its output, pred_x0 and noise_pred."""
        return cast(Prediction, self.denoiser(noisy_latents, timesteps, conditioning))

    def predict_with_features(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[Prediction, Tensor]:
        """`predict`, and the bottleneck's features (B, C', h', w') of the same pass."""
        return self.denoiser.with_features(noisy_latents, timesteps, conditioning)

    def features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Bottleneck features alone, at the encoder's cost."""
        return self.denoiser.features(noisy_latents, timesteps, conditioning)

    def feature_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape (C', h', w') of the features for latents of that shape."""
        return bottleneck_shape(self.denoiser.unet, latent_shape)
