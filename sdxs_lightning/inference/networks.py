"""What a backend provides: the networks of a student as four functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Embedded prompts, in the dtype of the networks."""

    embeds: Tensor
    """(B, tokens, d)."""
    pooled: Tensor | None
    """(B, p); None for SD."""
    guidance: Tensor | None = None
    """(B, g): embedding of the guidance scale, for a U-Net that takes it."""
    shift: Tensor | None = None
    """(B, tokens, d): what negative prompts add to the embeds that such a U-Net gets; a ControlNet gets them without."""
    pooled_shift: Tensor | None = None
    """(B, p): likewise; None for SD."""

    def shifted(self) -> Prompts:
        """The prompts that the U-Net gets."""
        if self.shift is None:
            return self
        pooled = self.pooled
        if pooled is not None and self.pooled_shift is not None:
            pooled = pooled + self.pooled_shift
        return Prompts(self.embeds + self.shift, pooled, self.guidance)


@dataclass(frozen=True)
class Control:
    """Input of a ControlNet."""

    images: Tensor
    """(B, 3, H, W), in [0, 1], in the dtype of the networks."""
    scale: float
    """Factor of the residuals."""


class Networks(Protocol):
    """A student's networks on a backend; latents are scaled, images in [-1, 1]."""

    device: torch.device
    """Where inputs have to be."""
    dtype: torch.dtype
    """Of inputs and outputs."""

    def encode_prompts(self, token_ids: Sequence[Tensor]) -> Prompts:
        """Embeds prompts; token ids (B, tokens), int64, one tensor for each text encoder."""

    def encode_image(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Encodes one image (1, 3, H, W) to latents (1, C, h, w), sampled where the encoder is a distribution.

        Raises:
            UserError: for a model without encoder.
        """

    def predict(
        self,
        latents: Tensor,
        timestep: int | Tensor,
        prompts: Prompts,
        time_ids: Tensor | None,
        control: Control | None,
    ) -> Tensor:
        """The U-Net's output (B, C, h, w) for noisy latents.

        Args:
            latents: (B, C, h, w).
            timestep: a number, or int64 () on the device.
            prompts: embedded.
            time_ids: (B, 6) for SDXL.
            control: input of the ControlNet.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents to images (B, 3, H, W), not clamped."""

    @property
    def has_control(self) -> bool:
        """Whether `predict` takes a control image."""
