"""Timesteps, guidance, latents: identities, invariances, refusals."""

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from sdxs_lightning.core.guidance import guide
from sdxs_lightning.core.latents import from_uint8, scale, to_uint8, unscale
from sdxs_lightning.core.noise_schedule import NoiseSchedule, to_pred_x0
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange, few_step_timesteps


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_range_draws_both_ends_and_nothing_else() -> None:
    drawn = TimestepRange(20, 24).draw(0, Stream.SCORE_TIMESTEP, torch.arange(2000))
    assert torch.bincount(drawn).nonzero().flatten().tolist() == [20, 21, 22, 23, 24]
    assert TimestepRange(399, 399).draw(0, Stream.SCORE_TIMESTEP, torch.arange(5)).tolist() == [399] * 5
    assert TimestepRange() == TimestepRange(20, 980)
    for low, high in ((5, 4), (-1, 10)):
        with pytest.raises(ValueError, match=f"0 <= low <= high, got low {low} and high {high}; change"):
            TimestepRange(low, high)


def test_few_step_timesteps_begin_where_they_should() -> None:
    assert few_step_timesteps(1) == [999]
    assert few_step_timesteps(4) == [999, 749, 499, 249]
    assert few_step_timesteps(4, spacing="leading", steps_offset=1) == [751, 501, 251, 1]
    with pytest.raises(ValueError, match=r"steps must be in \[1, 1000\], got 0"):
        few_step_timesteps(0)
    with pytest.raises(ValueError, match=r"visit timestep 1000, outside \[0, 999\]"):
        few_step_timesteps(1000, spacing="leading", steps_offset=1)
    with pytest.raises(ValueError, match="spacing 'linspace' is not known"):
        few_step_timesteps(4, spacing="linspace")  # type: ignore[arg-type]


def test_guidance() -> None:
    cond, uncond = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    assert torch.equal(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 0.0), uncond, rtol=0, atol=1e-6)
    torch.testing.assert_close(guide(cond, uncond, 7.5), uncond + 7.5 * (cond - uncond), rtol=0, atol=1e-5)
    assert torch.equal(guide(cond, cond, 7.5), cond)
    assert guide(cond.bfloat16(), uncond.bfloat16(), 3.0).dtype == torch.float32
    with pytest.raises(ValueError, match="cond and uncond must have one shape"):
        guide(cond, uncond[:1], 3.0)


def test_guidance_of_noise_is_guidance_of_clean_latents() -> None:
    cond, uncond, noisy = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    schedule, timesteps = NoiseSchedule.scaled_linear(), torch.tensor([50, 800])
    first = to_pred_x0(guide(cond, uncond, 3.0), noisy, timesteps, schedule, "epsilon")
    halves = [to_pred_x0(output, noisy, timesteps, schedule, "epsilon") for output in (cond, uncond)]
    torch.testing.assert_close(first, guide(halves[0], halves[1], 3.0), rtol=1e-5, atol=1e-4)


def test_latent_scale_round_trip() -> None:
    latents = randn(2, 4, 8, 8)
    assert torch.equal(scale(latents, 0.18215), latents * 0.18215)
    torch.testing.assert_close(scale(latents, 0.5, 0.25), (latents - 0.25) * 0.5)
    torch.testing.assert_close(unscale(scale(latents, 0.18215), 0.18215), latents, rtol=0, atol=1e-6)
    torch.testing.assert_close(unscale(scale(latents, 0.36, 0.1), 0.36, 0.1), latents, rtol=0, atol=1e-6)
    assert scale(latents.half(), 0.18215).dtype == torch.float32


def test_bytes_round_trip() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(from_uint8(every_byte)), every_byte)
    assert from_uint8(every_byte).aminmax() == (-1.0, 1.0)


def test_bytes_are_clamped_and_rounded_as_in_diffusers() -> None:
    images = 1.5 * randn(2, 3, 16, 16)
    expected = VaeImageProcessor().postprocess(images, output_type="pil")
    got = to_uint8(images).permute(0, 2, 3, 1).numpy()
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.999, 1.0, 9.0])).tolist() == [0, 0, 255, 255, 255]


def test_images_refuse_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match=r"to_uint8 takes float images in \[-1, 1\], got torch.uint8"):
        to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="from_uint8 takes uint8 images, got torch.float32"):
        from_uint8(torch.zeros(1, 3, 2, 2))
