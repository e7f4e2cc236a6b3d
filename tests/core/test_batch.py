"""Conditioning and TrainingBatch: what they hand out, how they move, what they refuse."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from sdxs_lightning.core.batch import Conditioning, TrainingBatch


def sd(batch_size: int = 3) -> Conditioning:
    embeds = torch.arange(batch_size * 2 * 4, dtype=torch.float32).view(batch_size, 2, 4)
    return Conditioning(prompt_embeds=embeds, negative_prompt_embeds=-embeds)


def sdxl(batch_size: int = 3) -> Conditioning:
    pooled = torch.arange(batch_size * 5, dtype=torch.float32).view(batch_size, 5)
    return replace(
        sd(batch_size),
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=torch.zeros_like(pooled),
        add_time_ids=torch.tensor([[1023.0, 1001.0, 0, 0, 1024, 1024]]).expand(batch_size, -1),
    )


def batch(**changes: Any) -> TrainingBatch:
    values: dict[str, Any] = {
        "captions": ["a", "", "c"],
        "positions": torch.arange(3),
        "sample_ids": ["x", "y", "z"],
        "latents": torch.zeros(3, 4, 8, 8),
        "images": torch.zeros(3, 3, 16, 16),
        "original_sizes": torch.full((3, 2), 16),
        "crops": torch.zeros(3, 2, dtype=torch.int64),
    }
    return TrainingBatch(**{**values, **changes})


def test_unet_kwargs_of_both_kinds() -> None:
    assert sd().unet_kwargs().keys() == {"encoder_hidden_states"}
    conditioning = sdxl()
    kwargs = conditioning.unet_kwargs()
    assert kwargs.keys() == {"encoder_hidden_states", "added_cond_kwargs"}
    assert kwargs["encoder_hidden_states"] is conditioning.prompt_embeds
    assert kwargs["added_cond_kwargs"]["text_embeds"] is conditioning.pooled_prompt_embeds
    assert kwargs["added_cond_kwargs"]["time_ids"] is conditioning.add_time_ids


@pytest.mark.parametrize("conditioning", [sd(), sdxl(), replace(sd(), control_images=torch.rand(3, 1, 2, 2))])
def test_doubled_is_the_unconditional_half_then_the_conditional(conditioning: Conditioning) -> None:
    doubled, uncond = conditioning.doubled(), conditioning.unconditional()
    assert len(doubled) == 6
    assert uncond.prompt_embeds is conditioning.negative_prompt_embeds
    assert uncond.pooled_prompt_embeds is conditioning.negative_pooled_prompt_embeds
    for name in ("prompt_embeds", "pooled_prompt_embeds", "add_time_ids", "control_images"):
        value = getattr(conditioning, name)
        if value is None:
            assert getattr(doubled, name) is None
        else:
            assert torch.equal(getattr(doubled[:3], name), getattr(uncond, name))
            assert torch.equal(getattr(doubled[3:], name), value)
    assert doubled.negative_prompt_embeds is None


def test_slices_cut_every_tensor() -> None:
    part = sdxl()[1:3]
    assert len(part) == 2
    assert torch.equal(part.prompt_embeds, sdxl().prompt_embeds[1:3])
    assert part.add_time_ids is not None
    assert part.add_time_ids.shape == (2, 6)
    cut = batch()[1:2]
    assert (cut.captions, cut.sample_ids, cut.positions.tolist()) == ([""], ["y"], [1])
    assert cut.latents is not None
    assert cut.latents.shape == (1, 4, 8, 8)
    for complete in (sdxl(), batch()):
        with pytest.raises(TypeError, match="index a batch with a slice, .* got int"):
            complete[0]  # type: ignore[index]


def test_a_cast_leaves_time_ids_exact() -> None:
    cast = sdxl().to(dtype=torch.bfloat16)
    assert cast.prompt_embeds.dtype == torch.bfloat16
    assert cast.negative_pooled_prompt_embeds is not None
    assert cast.negative_pooled_prompt_embeds.dtype == torch.bfloat16
    assert cast.add_time_ids is not None
    assert cast.add_time_ids.dtype == torch.float32
    assert cast.add_time_ids[0, 0].item() == 1023


def test_both_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        sd().prompt_embeds = torch.zeros(1, 2, 3)  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        batch().captions = []  # type: ignore[misc]


def test_lightning_moves_a_batch() -> None:
    moved = move_data_to_device(batch(), torch.device("meta"))
    assert isinstance(moved, TrainingBatch)
    for tensor in (moved.positions, moved.latents, moved.images, moved.original_sizes, moved.crops):
        assert tensor is not None
        assert tensor.device.type == "meta"
    assert moved.captions == ["a", "", "c"]
    back = batch().to("cpu")
    assert len(back) == 3
    assert back.positions.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt_embeds": torch.zeros(3, 77, dtype=torch.int64)},
            r"prompt_embeds must be float .*token ids go",
        ),
        ({"prompt_embeds": torch.zeros(3, 4)}, r"prompt_embeds must be float embeddings .* got \(3, 4\)"),
        ({"pooled_prompt_embeds": None, "negative_pooled_prompt_embeds": None}, "got only add_time_ids"),
        ({"add_time_ids": None}, "go together .* got only pooled_prompt_embeds"),
        ({"add_time_ids": torch.zeros(3, 5)}, r"add_time_ids must have shape \(3, 6\), got \(3, 5\)"),
        (
            {"add_time_ids": torch.zeros(3, 6, dtype=torch.int64)},
            "add_time_ids must be float, got torch.int64",
        ),
        (
            {"pooled_prompt_embeds": torch.zeros(2, 5)},
            r"pooled_prompt_embeds must have shape \(3, \*\), got \(2, 5\); there is one row per sample",
        ),
        (
            {"negative_prompt_embeds": torch.zeros(1, 2, 4)},
            r"negative_prompt_embeds must have the shape of prompt_embeds, \(3, 2, 4\), got \(1, 2, 4\)",
        ),
        ({"negative_pooled_prompt_embeds": None}, "go together in SDXL, got only one"),
        ({"negative_prompt_embeds": None}, "go together in SDXL, got only one"),
        ({"control_images": torch.zeros(3, 2, 2)}, r"control_images must have shape \(3, \*, \*, \*\)"),
    ],
)
def test_conditioning_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        replace(sdxl(), **changes)
    assert "\n" not in str(error.value)


def test_conditioning_without_a_twin_refuses_guidance() -> None:
    alone = Conditioning(prompt_embeds=torch.zeros(3, 2, 4))
    for method in (alone.unconditional, alone.doubled):
        with pytest.raises(ValueError, match="guidance needs negative_prompt_embeds"):
            method()
    with pytest.raises(
        ValueError, match="negative_pooled_prompt_embeds was given without pooled_prompt_embeds"
    ):
        replace(alone, negative_pooled_prompt_embeds=torch.zeros(3, 4))


NAN_LATENTS = torch.zeros(3, 4, 8, 8)
NAN_LATENTS[1, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": "abc"}, "captions must be a list of strings"),
        ({"captions": [1, 2, 3]}, "captions must be a list of strings; token ids"),
        ({"captions": []}, "at least one sample, got no captions"),
        ({"sample_ids": ["x"]}, "sample_ids must be one per caption, got 1 for 3 captions"),
        ({"positions": torch.arange(3).int()}, "positions must be int64, got torch.int32"),
        ({"positions": torch.arange(2)}, r"positions must have shape \(3,\), got \(2,\); there is one row"),
        ({"positions": torch.tensor([-1, 0, 1])}, r"positions count samples from 0, got \[-1, 0, 1\]"),
        (
            {"latents": torch.zeros(2, 4, 8, 8)},
            r"latents must have shape \(3, \*, \*, \*\), got \(2, 4, 8, 8\)",
        ),
        ({"latents": torch.zeros(3, 4, 8, 8, dtype=torch.uint8)}, "latents must be float, got torch.uint8"),
        ({"latents": NAN_LATENTS}, "latents must be finite, got NaN or infinity in sample y"),
        ({"images": torch.zeros(3, 3, 2, 2, dtype=torch.uint8)}, "images must be float, got torch.uint8"),
        ({"images": torch.full((3, 3, 2, 2), 255.0)}, r"images must be in \[-1, 1\], got values up to 255"),
        ({"images": torch.zeros(3, 4, 2, 2)}, r"images must have shape \(3, 3, \*, \*\), got \(3, 4, 2, 2\)"),
        ({"pair_noise_seeds": torch.zeros(3)}, "pair_noise_seeds must be int64, got torch.float32"),
        ({"pair_noise_seeds": torch.arange(4)}, r"pair_noise_seeds must have shape \(3,\), got \(4,\)"),
        ({"original_sizes": torch.zeros(3, 3).long()}, r"original_sizes must have shape \(3, 2\)"),
        ({"crops": torch.zeros(3, 2)}, "crops must be int64, got torch.float32"),
        ({"control_images": torch.zeros(3, 1, 4)}, r"control_images must have shape \(3, \*, \*, \*\)"),
    ],
)
def test_training_batch_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        batch(**changes)
    assert "\n" not in str(error.value)
