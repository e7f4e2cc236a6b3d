"""Training batches and U-Net conditioning; both are immutable and validate their data at construction."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Conditioning:
    """Inputs of a U-Net besides x_t and t: embeddings (never token ids), optionally with their unconditional counterparts."""

    prompt_embeds: Tensor
    """(B, tokens, d), float: the text encoder's hidden states; d = 768 SD-1.5, 1024 SD-2.1, 2048 SDXL."""
    pooled_prompt_embeds: Tensor | None = None
    """(B, d), float, SDXL only: the second text encoder's pooled output."""
    add_time_ids: Tensor | None = None
    """(B, 6), float, SDXL only: original h, w, crop top, left, target h, w, in pixels."""
    negative_prompt_embeds: Tensor | None = None
    """Same shape as prompt_embeds, for guidance: the encoding of "" (SD) or zeros (SDXL)."""
    negative_pooled_prompt_embeds: Tensor | None = None
    """Same shape as pooled_prompt_embeds, for guidance, SDXL only."""
    control_images: Tensor | None = None
    """(B, C, H, W), float in [0, 1], as in diffusers' ControlNetModel."""
    guidance_scales: Tensor | None = None
    """(B,), float32: for U-Nets with the guidance scale as an input (`time_cond_proj_dim`); others ignore it. 1 means none."""
    negative_prompt_shift: Tensor | None = None
    """Same shape as prompt_embeds: the unconditional encoding minus that of a negative prompt, 0 without one. For U-Nets with
    the guidance scale as an input, which get the sum of both; others ignore it, and are guided by negative_prompt_embeds."""
    negative_pooled_prompt_shift: Tensor | None = None
    """Same shape as pooled_prompt_embeds, likewise, SDXL only."""

    def __post_init__(self) -> None:
        if self.prompt_embeds.ndim != 3 or not self.prompt_embeds.is_floating_point():
            raise ValueError(
                "prompt_embeds must be float embeddings (B, tokens, d), got "
                f"{tuple(self.prompt_embeds.shape)} {self.prompt_embeds.dtype}; token ids go through the "
                "family's encode_prompts first."
            )
        if (self.pooled_prompt_embeds is None) != (self.add_time_ids is None):
            raise ValueError(
                "pooled_prompt_embeds and add_time_ids go together (SDXL has both, SD neither), got only "
                f"{'add_time_ids' if self.pooled_prompt_embeds is None else 'pooled_prompt_embeds'}."
            )
        batch_size = len(self.prompt_embeds)
        _check_tensor("pooled_prompt_embeds", self.pooled_prompt_embeds, (batch_size, None), floating=True)
        _check_tensor("add_time_ids", self.add_time_ids, (batch_size, 6), floating=True)
        _check_tensor("control_images", self.control_images, (batch_size, None, None, None), floating=True)
        _check_tensor("guidance_scales", self.guidance_scales, (batch_size,), floating=True)
        prompts, pooled = self.prompt_embeds, self.pooled_prompt_embeds
        _check_twin("prompt_embeds", prompts, "negative_prompt_embeds", self.negative_prompt_embeds)
        _check_twin("prompt_embeds", prompts, "negative_prompt_shift", self.negative_prompt_shift)
        name = "negative_pooled_prompt_embeds"
        _check_twin("pooled_prompt_embeds", pooled, name, self.negative_pooled_prompt_embeds)
        name = "negative_pooled_prompt_shift"
        _check_twin("pooled_prompt_embeds", pooled, name, self.negative_pooled_prompt_shift)
        if self.pooled_prompt_embeds is not None and (
            (self.negative_prompt_embeds is None) != (self.negative_pooled_prompt_embeds is None)
            or (self.negative_prompt_shift is None) != (self.negative_pooled_prompt_shift is None)
        ):
            raise ValueError(
                "negative_prompt_embeds and negative_pooled_prompt_embeds go together in SDXL, got only one; so do the shifts."
            )

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: slice) -> "Conditioning":
        """Returns the samples of a slice, as views."""
        return _map_tensors(self, lambda tensor: tensor[_as_slice(index)])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Conditioning":
        """Moves all tensors to `device` and casts them to `dtype`; add_time_ids and guidance_scales stay float32.

        They are embedded as sinusoids, and bfloat16 cannot distinguish 1023 px from 1024 px.
        """
        moved = _map_tensors(
            self, lambda tensor: tensor.to(device, dtype, non_blocking=_may_be_asynchronous(device))
        )
        embedded = {"add_time_ids": self.add_time_ids, "guidance_scales": self.guidance_scales}
        kept: dict[str, Any] = {
            name: value.to(device, torch.float32, non_blocking=_may_be_asynchronous(device))
            for name, value in embedded.items()
            if value is not None
        }
        return replace(moved, **kept)

    def unconditional(self) -> "Conditioning":
        """Returns the unconditional counterpart for guidance, with the same sizes and control images.

        Raises:
            ValueError: if there are no negative embeddings.
        """
        if self.negative_prompt_embeds is None:
            raise ValueError(
                "guidance needs negative_prompt_embeds and this Conditioning has none; "
                "the family's encode_prompts makes them."
            )
        return replace(
            self,
            prompt_embeds=self.negative_prompt_embeds,
            pooled_prompt_embeds=self.negative_pooled_prompt_embeds,
            negative_prompt_embeds=None,
            negative_pooled_prompt_embeds=None,
        )

    def doubled(self) -> "Conditioning":
        """Returns a batch of 2B for guidance: unconditional half first, as in diffusers.

        Raises:
            ValueError: if there are no negative embeddings.
        """
        uncond = self.unconditional()
        return replace(
            uncond, **{name: torch.cat([half, getattr(self, name)]) for name, half in _tensors(uncond)}
        )

    def with_negative_prompts(
        self, embeds: Tensor, pooled_embeds: Tensor | None, chosen: Tensor
    ) -> "Conditioning":
        """Returns these prompts with negative ones, for guidance and for U-Nets that take them as an input.

        Args:
            embeds: of B negative prompts, shape of prompt_embeds.
            pooled_embeds: theirs, shape of pooled_prompt_embeds; None for SD.
            chosen: (B,), bool: samples that get theirs; the others keep none.

        Raises:
            ValueError: if there are no unconditional embeddings.
        """
        uncond = self.unconditional()
        negative = torch.where(chosen[:, None, None], embeds, uncond.prompt_embeds)
        changes = {
            "negative_prompt_embeds": negative,
            "negative_prompt_shift": uncond.prompt_embeds - negative,
        }
        if pooled_embeds is not None and uncond.pooled_prompt_embeds is not None:
            pooled = torch.where(chosen[:, None], pooled_embeds, uncond.pooled_prompt_embeds)
            changes["negative_pooled_prompt_embeds"] = pooled
            changes["negative_pooled_prompt_shift"] = uncond.pooled_prompt_embeds - pooled
        return replace(self, **changes)

    def with_every(self, nth: int, other: "Conditioning") -> "Conditioning":
        """Returns these B prompts with every n-th replaced by those of another, which has ceil(B / n).

        Raises:
            ValueError: unless both have the same tensors.
        """
        own, others = dict(_tensors(self)), dict(_tensors(other))
        if own.keys() != others.keys():
            raise ValueError(
                f"prompts with {', '.join(own)} cannot be mixed with prompts with {', '.join(others)}."
            )
        mixed = {name: tensor.clone() for name, tensor in own.items()}
        for name, tensor in mixed.items():
            tensor[::nth] = others[name]
        return replace(self, **mixed)

    def guided_as(self, other: "Conditioning") -> "Conditioning":
        """Returns these prompts with what a U-Net with the guidance scale as an input gets of other ones' guidance."""
        return replace(
            self,
            guidance_scales=other.guidance_scales,
            negative_prompt_shift=other.negative_prompt_shift,
            negative_pooled_prompt_shift=other.negative_pooled_prompt_shift,
        )

    def guidance_scale(self, default: float) -> float | Tensor:
        """Guidance scales of the samples, (B, 1, 1, 1); without any the default."""
        return default if self.guidance_scales is None else self.guidance_scales.view(-1, 1, 1, 1)

    def shifted(self) -> "Conditioning":
        """Returns the prompts that a U-Net gets which takes negative prompts: their embeddings plus the shifts."""
        if self.negative_prompt_shift is None:
            return self
        pooled = self.pooled_prompt_embeds
        if pooled is not None:
            assert self.negative_pooled_prompt_shift is not None
            pooled = pooled + self.negative_pooled_prompt_shift
        embeds = self.prompt_embeds + self.negative_prompt_shift
        return replace(self, prompt_embeds=embeds, pooled_prompt_embeds=pooled)

    def unet_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments of UNet2DConditionModel, under diffusers' names."""
        kwargs: dict[str, Any] = {"encoder_hidden_states": self.prompt_embeds}
        if self.pooled_prompt_embeds is not None:
            kwargs["added_cond_kwargs"] = {
                "text_embeds": self.pooled_prompt_embeds,
                "time_ids": self.add_time_ids,
            }
        return kwargs


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingBatch:
    """One micro-batch of data, as yielded by the DataModules; Lightning moves it by `.to`."""

    captions: list[str]
    """B captions; "" is the empty prompt."""
    positions: Tensor
    """(B,), int64: number of samples that the run consumed before each, over all ranks; determines its noise."""
    sample_ids: list[str]
    """B sample names, as in the shards."""
    latents: Tensor | None = None
    """(B, C, h, w), float, unscaled: the VAE encoder's output."""
    images: Tensor | None = None
    """(B, 3, H, W), float in [-1, 1]."""
    pair_noise_seeds: Tensor | None = None
    """(B,), int64: for pairs of a target sampler, the key of the noise that the latents were made from."""
    original_sizes: Tensor | None = None
    """(B, 2), int64: height, width of the image before resizing, in pixels (SDXL)."""
    crops: Tensor | None = None
    """(B, 2), int64: top, left of the crop, in pixels (SDXL)."""
    control_images: Tensor | None = None
    """(B, C, H, W), float in [0, 1]."""

    def __post_init__(self) -> None:
        if isinstance(self.captions, str) or not all(isinstance(caption, str) for caption in self.captions):
            raise ValueError("captions must be a list of strings; token ids are made by the family.")
        batch_size = len(self.captions)
        if batch_size == 0:
            raise ValueError("a TrainingBatch needs at least one sample, got no captions.")
        if len(self.sample_ids) != batch_size:
            raise ValueError(
                f"sample_ids must be one per caption, got {len(self.sample_ids)} for {batch_size} captions."
            )
        _check_tensor("positions", self.positions, (batch_size,), floating=False)
        _check_tensor("latents", self.latents, (batch_size, None, None, None), floating=True)
        _check_tensor("images", self.images, (batch_size, 3, None, None), floating=True)
        _check_tensor("pair_noise_seeds", self.pair_noise_seeds, (batch_size,), floating=False)
        _check_tensor("original_sizes", self.original_sizes, (batch_size, 2), floating=False)
        _check_tensor("crops", self.crops, (batch_size, 2), floating=False)
        _check_tensor("control_images", self.control_images, (batch_size, None, None, None), floating=True)
        self._check_values()

    def _check_values(self) -> None:
        # On the host only: on a GPU reading values would synchronise with the device.
        if self.positions.device.type != "cpu":
            return
        if bool((self.positions < 0).any()):
            raise ValueError(f"positions count samples from 0, got {self.positions.tolist()}.")
        for name, tensor in (("latents", self.latents), ("images", self.images)):
            if tensor is None:
                continue
            # aminmax propagates NaN and infinity, and is 20 times faster than isfinite on each value.
            low, high = (bound.item() for bound in torch.aminmax(tensor))
            if not (math.isfinite(low) and math.isfinite(high)):
                broken = (~torch.isfinite(tensor)).flatten(1).any(dim=1).nonzero().flatten().tolist()
                ids = ", ".join(self.sample_ids[i] for i in broken)
                raise ValueError(f"{name} must be finite, got NaN or infinity in sample {ids}.")
            # 1.01: resizing may overshoot slightly, but pixels in 0-255 or scaled twice are an error.
            if name == "images" and max(-low, high) > 1.01:
                raise ValueError(
                    f"images must be in [-1, 1], got values up to {max(-low, high):g}; "
                    "latents.from_uint8 makes them of bytes."
                )

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: slice) -> "TrainingBatch":
        """Returns the samples of a slice; tensors are views."""
        index = _as_slice(index)
        cut: dict[str, Any] = {name: tensor[index] for name, tensor in _tensors(self)}
        return replace(self, captions=self.captions[index], sample_ids=self.sample_ids[index], **cut)

    def every(self, nth: int, option: str) -> "TrainingBatch":
        """Returns every n-th sample.

        Args:
            nth: 1 returns the batch.
            option: the configuration's name of it, for the message.

        Raises:
            ValueError: if `nth` does not divide the size; ranks would have parts of different sizes.
        """
        if nth == 1:
            return self
        if len(self) % nth:
            raise ValueError(
                f"{option} ({nth}) must divide the batch of a device, which has {len(self)} samples; change it, or "
                "data.batch_size."
            )
        return self[::nth]

    def to(self, device: torch.device | str) -> "TrainingBatch":
        """Moves the tensors; called by Lightning for every batch."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=_may_be_asynchronous(device)))

    def pin_memory(self) -> "TrainingBatch":
        """Pins the tensors; called by DataLoader(pin_memory=True)."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())


def _check_tensor(name: str, tensor: Tensor | None, shape: tuple[int | None, ...], *, floating: bool) -> None:
    if tensor is None:
        return
    if floating != tensor.is_floating_point() or not (floating or tensor.dtype == torch.int64):
        raise ValueError(f"{name} must be {'float' if floating else 'int64'}, got {tensor.dtype}.")
    fits = tensor.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} must have shape ({wanted}{',' if len(shape) == 1 else ''}), got {tuple(tensor.shape)}; "
            "there is one row per sample."
        )


def _check_twin(name: str, tensor: Tensor | None, twin_name: str, twin: Tensor | None) -> None:
    if twin is None:
        return
    if tensor is None:
        raise ValueError(f"{twin_name} was given without {name}.")
    if twin.shape != tensor.shape:
        raise ValueError(
            f"{twin_name} must have the shape of {name}, {tuple(tensor.shape)}, got {tuple(twin.shape)}; expand one row over "
            "the batch."
        )


def _as_slice(index: slice) -> slice:
    if not isinstance(index, slice):
        raise TypeError(f"index a batch with a slice, batch[i:i + 1], got {type(index).__name__}.")
    return index


def _may_be_asynchronous(device: torch.device | str | None) -> bool:
    """Whether a copy may be asynchronous; not to the host, where it could be read before it is complete."""
    return device is not None and torch.device(device).type != "cpu"


_Batch = TypeVar("_Batch", Conditioning, TrainingBatch)


def _tensors(batch: Conditioning | TrainingBatch) -> list[tuple[str, Tensor]]:
    values = [(field.name, getattr(batch, field.name)) for field in fields(batch)]
    return [(name, value) for name, value in values if isinstance(value, Tensor)]


def _map_tensors(batch: _Batch, function: Callable[[Tensor], Tensor]) -> _Batch:
    changes: dict[str, Any] = {name: function(tensor) for name, tensor in _tensors(batch)}
    return replace(batch, **changes)
