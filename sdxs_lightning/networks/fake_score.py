"""The fake score (online DM): a diffusion model of the student's current samples."""

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
from sdxs_lightning.networks.guidance_input import GuidanceInput, add_guidance_input
from sdxs_lightning.networks.lora import LoRA, cast_base, each_merged, plain_shapes
from sdxs_lightning.networks.network import Network, frozen_fingerprint, load_denoiser, save_adapters_only
from sdxs_lightning.networks.student_generator import StudentGenerator


class FakeScore(Network):
    """A trainable copy of the base, or adapters on the base; a discriminator may read its bottleneck.

    Args:
        optimizer: called with the trainable parameters.
        lr_scheduler: stepped once per update of the fake score; None keeps the rate constant.
        weights: U-Net or pipeline folder to start from; None starts from the base.
        lora: trains adapters on the base, so that fake and real score share one copy of its weights: less memory, and a
            smaller optimizer state; None trains all weights of a copy.
        gradient_checkpointing: recompute blocks in the backward pass: less memory, about a third more compute.
        compile_blocks: torch.compile each block; worthwhile on a GPU for runs longer than minutes.
        alignment: share of the way to the student's weights that the weights move after each student update (SenseFlow's
            implicit distribution alignment, 1 - lambda there), those of a warm-up included, after which they are an average of
            the student's; needs a student of the base's architecture. 0 is DMD2.

    Raises:
        ValueError: if both weights and lora are set; for an alignment outside [0, 1), or with lora.
    """

    denoiser: Denoiser
    frozen_fingerprint: str | None
    """Fingerprint of the weights under the adapters; None without adapters."""

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        alignment: float = 0.0,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if not 0 <= alignment < 1:
            raise ValueError(f"fake_score.alignment must be in [0, 1), got {alignment}.")
        if alignment and lora is not None:
            raise ValueError(
                f"fake_score.alignment is {alignment} and moves all weights, of which fake_score.lora trains none; set "
                "alignment to 0, or lora to null."
            )
        if weights is not None and lora is not None:
            raise ValueError(
                f"fake_score.lora learns on the base's own weights, and fake_score.weights is '{weights}'; set one of them to "
                "null."
            )
        self._weights = weights
        self.lora = lora
        self.alignment = alignment
        self._switches = gradient_checkpointing, compile_blocks

    def build(self, family: Family) -> None:
        """Loads the network. Idempotent."""
        if hasattr(self, "denoiser"):
            return
        self.denoiser = load_denoiser(
            family, self._weights, self.lora, *self._switches, "fake_score.init_args.weights"
        )
        self.frozen_fingerprint = frozen_fingerprint(self.denoiser)
        if self.lora is not None:
            save_adapters_only(self)

    def take_guidance(self, guidance: GuidanceInput) -> None:
        """Makes the guidance scale an input, as it is of the student: its samples depend on it.

        Raises:
            ValueError: with adapters.
        """
        if self.lora is not None:
            raise ValueError(
                "student.guidance makes the guidance scale an input of the fake score too, which fake_score.lora would freeze; "
                "set fake_score.lora or student.guidance to null."
            )
        add_guidance_input(self.denoiser.unet, guidance.dimensions)

    def shared_base(self, dtype: torch.dtype) -> Denoiser | None:
        """The base inside this network, for use as the real score; None without adapters.

        Args:
            dtype: dtype to cast the base's weights to, in place; the adapters stay float32.
        """
        if self.lora is None:
            return None
        cast_base(self.denoiser.unet, dtype)
        return BaseView(self.denoiser)

    def check_alignment(self, student: StudentGenerator) -> None:
        """Raises ValueError if the weights are to be aligned with those of a student of another architecture."""
        own, other = (plain_shapes(each.denoiser.unet) for each in (self, student))
        if self.alignment and own != other:
            unlike = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
            raise ValueError(
                f"fake_score.alignment is {self.alignment}, and {len(unlike)} tensors of the student differ from the fake "
                f"score's, such as {unlike[0]}; set alignment to 0, or begin both from one U-Net: fake_score.weights as "
                "student.weights, as configs/toy/pruned.yaml does."
            )

    @torch.no_grad()
    def align(self, student: StudentGenerator) -> None:
        """Moves the weights towards the student's, its adapters merged, by the share `alignment`.

        Source: SenseFlow, arXiv:2506.00523, section 3.1.
        """
        if not self.alignment:
            return
        own, unet = dict(self.denoiser.unet.named_parameters()), student.denoiser.unet
        for name, weight in each_merged(unet, dict(unet.named_parameters())):
            own[name].lerp_(weight, self.alignment)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the noise prediction (B, C, h, w), float32."""
        return self.predict(noisy_latents, timesteps, conditioning).noise_pred

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Prediction:
        """Returns output, pred_x0 and noise_pred."""
        return cast(Prediction, self.denoiser(noisy_latents, timesteps, conditioning))

    def predict_with_features(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[Prediction, Tensor]:
        """Like `predict`, with the bottleneck features (B, C', h', w') of the same pass."""
        prediction, features = self.denoiser.with_features(noisy_latents, timesteps, conditioning)
        return prediction, self._for_heads(features)

    def features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Bottleneck features (B, C', h', w') only, at the encoder's cost."""
        return self._for_heads(self.denoiser.features(noisy_latents, timesteps, conditioning))

    def _for_heads(self, features: Tensor) -> Tensor:
        # A shared base may be bfloat16; the discriminator's head is float32.
        return features if self.lora is None else features.float()

    def feature_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape (C', h', w') of the bottleneck features for latents of the given shape."""
        return bottleneck_shape(self.denoiser.unet, latent_shape)
