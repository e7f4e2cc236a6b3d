"""Wraps a U-Net; all U-Net calls go through here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.guidance import guide
from sdxs_lightning.core.noise_schedule import NoiseSchedule, PredictionType, to_noise_pred, to_pred_x0
from sdxs_lightning.networks.feature_taps import FeatureTap, encoder_of
from sdxs_lightning.networks.guidance_input import guidance_embedding

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class Prediction(NamedTuple):
    """A U-Net's output for noisy latents in three equivalent forms, all float32 (B, C, h, w)."""

    output: Tensor
    """Raw output of the network: epsilon, v or sample."""
    pred_x0: Tensor
    """Estimate of the clean latents."""
    noise_pred: Tensor
    """Estimate of the noise."""


class Denoiser(nn.Module):
    """A stock U-Net with its noise schedule and prediction type.

    Args:
        unet: any `UNet2DConditionModel`, in any dtype; inputs are cast to it, outputs to float32.
        schedule: noise schedule that the U-Net was trained with.
        prediction_type: "epsilon", "v_prediction" or "sample".
    """

    def __init__(
        self, unet: UNet2DConditionModel, schedule: NoiseSchedule, prediction_type: PredictionType
    ) -> None:
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Prediction:
        """Denoises without guidance.

        Args:
            noisy_latents: (B, C, h, w).
            timesteps: (B,), int64.
            conditioning: of B prompts.
        """
        return self._interpret(
            self._call(self.unet, noisy_latents, timesteps, conditioning), noisy_latents, timesteps
        )

    def guided(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float | Tensor,
    ) -> Prediction:
        """Denoises with classifier-free guidance, both halves as one batch of 2B; scale 1 is the plain forward.

        Guidance acts on the output. For given noisy latents pred_x0 and noise_pred are affine in it, so this equals
        guidance on either of them.
        """
        if not isinstance(guidance_scale, Tensor) and guidance_scale == 1.0:
            return cast(Prediction, self(noisy_latents, timesteps, conditioning))
        output = self.guided_output(noisy_latents, timesteps, conditioning, guidance_scale)
        return self._interpret(output, noisy_latents, timesteps)

    def unguided_pair(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[Prediction, Prediction]:
        """The predictions with and without the prompt, both halves as one batch of 2B."""
        twice = torch.cat([noisy_latents, noisy_latents]), torch.cat([timesteps, timesteps])
        uncond, cond = self._call(self.unet, *twice, conditioning.doubled()).chunk(2)
        known = noisy_latents, timesteps
        return self._interpret(cond, *known), self._interpret(uncond, *known)

    def guided_output(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float | Tensor,
    ) -> Tensor:
        """Only the `output` of `guided`; timesteps may be fractional, as some schedulers require."""
        if not isinstance(guidance_scale, Tensor) and guidance_scale == 1.0:
            return self._call(self.unet, noisy_latents, timesteps, conditioning).float()
        twice = torch.cat([noisy_latents, noisy_latents]), torch.cat([timesteps, timesteps])
        uncond, cond = self._call(self.unet, *twice, conditioning.doubled()).chunk(2)
        return guide(cond, uncond, guidance_scale)

    def with_features(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[Prediction, Tensor]:
        """Denoises without guidance and also returns the bottleneck features (B, C', h', w') of the same pass."""
        residuals = self._residuals(noisy_latents, timesteps, conditioning)
        with FeatureTap(self.unet) as tap:
            output = self._call(self.unet, noisy_latents, timesteps, conditioning, residuals)
        # As `features` has it, whose encoder ends after a ControlNet's residual.
        mid = residuals.get("mid_block_additional_residual")
        features = tap.features if mid is None else tap.features + mid
        return self._interpret(output, noisy_latents, timesteps), features

    def features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Bottleneck features (B, C', h', w') only; runs the encoder and mid block, not the decoder."""
        return self._call(encoder_of(self.unet), noisy_latents, timesteps, conditioning)

    def encoder_features(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, blocks: Sequence[str]
    ) -> dict[str, Tensor]:
        """Outputs (B, C', h', w') of named blocks of the encoder, at the encoder's cost.

        Raises:
            ValueError: if the encoder has no block of that name.
        """
        encoder = encoder_of(self.unet)
        with FeatureTap(encoder, *blocks) as tap:
            self._call(encoder, noisy_latents, timesteps, conditioning)
            return {block: tap[block] for block in blocks}

    def _call(
        self,
        unet: UNet2DConditionModel,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        residuals: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Raw output of the U-Net or its encoder; None computes the residuals."""
        dtype = next(self.unet.parameters()).dtype
        dimensions = self.unet.config.get("time_cond_proj_dim")
        if residuals is None:
            residuals = self._residuals(noisy_latents, timesteps, conditioning)
        prompts = conditioning if dimensions is None else conditioning.shifted()
        arguments = prompts.to(dtype=dtype).unet_kwargs() | dict(residuals)
        if dimensions is not None and conditioning.guidance_scales is not None:
            arguments["timestep_cond"] = guidance_embedding(conditioning.guidance_scales, dimensions).to(
                dtype
            )
        output: Tensor = unet(noisy_latents.to(dtype), timesteps, **arguments).sample
        return output

    def _residuals(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        """Arguments of the U-Net that come from a ControlNet; none here (see `controlled.py`)."""
        return {}

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that FSDP2 shards."""
        return [self.unet]

    def copy_for_average(self) -> Self:
        """A copy with the same frozen weights; an average follows the others."""
        frozen = {id(one): one for one in self.parameters() if not one.requires_grad}
        return copy.deepcopy(self, frozen)

    def _interpret(self, output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Prediction:
        output, noisy_latents = output.float(), noisy_latents.float()
        known = noisy_latents, timesteps, self.schedule, self.prediction_type
        return Prediction(output, to_pred_x0(output, *known), to_noise_pred(output, *known))
