"""What the backends onnx and openvino share: networks as graphs of named arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdxs_lightning.core.errors import UserError, first_line
from sdxs_lightning.inference.model_folder import ModelFolder
from sdxs_lightning.inference.networks import Control, Prompts

Arrays = Mapping[str, "np.ndarray[Any, Any]"]
DOWN_RESIDUAL = "down_block_additional_residual_"
MID_RESIDUAL = "mid_block_additional_residual"
"""Inputs of a U-Net that takes a ControlNet's residuals; the first is followed by a number."""


class GraphNetworks(ABC):
    """Networks of an export.

    Args:
        model: the export's folder.
    """

    def __init__(self, model: ModelFolder) -> None:
        assert model.manifest is not None
        self._model = model
        self._controlled = bool(model.manifest["control_residuals"])
        self.device = torch.device("cpu")
        self.dtype: torch.dtype = getattr(torch, model.manifest["input_dtype"])

    @abstractmethod
    def run(self, part: str, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs of a part by name."""

    @property
    def has_control(self) -> bool:
        return self._controlled

    def encode_prompts(self, token_ids: Sequence[Tensor]) -> Prompts:
        outputs = [
            self.run(name, {"input_ids": ids.numpy()})
            for name, ids in zip(self._model.encoders, token_ids, strict=True)
        ]
        if not self._model.has_pooled_prompts:
            return Prompts(torch.from_numpy(outputs[0]["last_hidden_state"]), None)
        embeds = [torch.from_numpy(_penultimate(one)) for one in outputs]
        return Prompts(torch.cat(embeds, dim=-1), torch.from_numpy(outputs[-1]["text_embeds"]))

    def encode_image(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if not (self._model.path / "vae_encoder").is_dir():
            raise UserError(
                f"'{self._model.path}' cannot encode images: the model that it was exported from has no encoder."
            )
        output = self.run("vae_encoder", {"sample": image.numpy()})
        if "latent_sample" in output:
            return torch.from_numpy(output["latent_sample"])
        mean, logvar = torch.from_numpy(output["latent_parameters"]).chunk(2, dim=1)
        drawn = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        return mean + torch.exp(0.5 * logvar) * drawn

    def predict(
        self,
        latents: Tensor,
        timestep: int | Tensor,
        prompts: Prompts,
        time_ids: Tensor | None,
        control: Control | None,
    ) -> Tensor:
        inputs = {
            "sample": latents.numpy(),
            "timestep": np.array(int(timestep), dtype=np.int64),
            "encoder_hidden_states": prompts.embeds.numpy(),
        }
        if time_ids is not None and prompts.pooled is not None:
            inputs |= {"text_embeds": prompts.pooled.numpy(), "time_ids": time_ids.numpy()}
        residuals = self._residuals(inputs, control) if self._controlled else {}
        return torch.from_numpy(self.run("unet", inputs | residuals)["out_sample"])

    def decode(self, latents: Tensor) -> Tensor:
        return torch.from_numpy(self.run("vae_decoder", {"latent_sample": latents.numpy()})["sample"])

    def _residuals(
        self, inputs: dict[str, np.ndarray[Any, Any]], control: Control | None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """The ControlNet's outputs as inputs of the U-Net; zeros without a control image, which add nothing."""
        if control is None:
            return self._zero_residuals(inputs["sample"])
        scale = np.array(control.scale, dtype=inputs["sample"].dtype)
        given = inputs | {"controlnet_cond": control.images.numpy(), "conditioning_scale": scale}
        outputs = self.run("controlnet", given)
        mid = outputs.pop("mid_block_res_sample")
        return {f"{DOWN_RESIDUAL}{_number(name, '_')}": one for name, one in outputs.items()} | {
            MID_RESIDUAL: mid
        }

    def _zero_residuals(self, sample: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        assert self._model.manifest is not None
        batch, _, height, width = sample.shape
        zeros = {}
        for name, channels, halvings in self._model.manifest["control_residuals"]:
            sides = [-(-side // 2**halvings) for side in (height, width)]
            zeros[name] = np.zeros((batch, channels, *sides), dtype=sample.dtype)
        return zeros


def unloadable(file: Path, error: Exception) -> UserError:
    """For a graph that a runtime does not load; runtimes raise classes of their own."""
    return UserError(
        f"'{file}' cannot be loaded ({first_line(error)}); was a file cut off? Export the model again."
    )


def _penultimate(outputs: Arrays) -> np.ndarray[Any, Any]:
    """The hidden state before the last layer; as diffusers' SDXL pipelines take it."""
    names = sorted((name for name in outputs if name.startswith("hidden_states.")), key=_number)
    return outputs[names[-2]]


def _number(name: str, separator: str = ".") -> int:
    return int(name.rpartition(separator)[2])
