"""Frozen networks, the denoiser, feature taps, the target sampler: against stock diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.core.noise_schedule import NoiseSchedule, PredictionType
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.feature_taps import FeatureTap, bottleneck_of, bottleneck_shape, encoder_of
from sdxs_lightning.pairs.target_sampler import TargetSampler
from tests.helpers.tiny import LATENT_SHAPE, tiny_conditioning, tiny_sd_unet, tiny_sdxl_unet

TIMESTEPS = torch.tensor([20, 999])


def denoiser(prediction_type: PredictionType = "epsilon", sdxl: bool = False) -> Denoiser:
    unet = tiny_sdxl_unet() if sdxl else tiny_sd_unet()
    return Denoiser(unet, NoiseSchedule.scaled_linear(), prediction_type)


def latents(seed: int = 0) -> Tensor:
    return torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))


def without_mid_block() -> UNet2DConditionModel:
    config = {name: value for name, value in tiny_sd_unet().config.items() if not name.startswith("_")}
    return UNet2DConditionModel(**config | {"mid_block_type": None})


def test_frozen_is_in_no_state_and_passes_gradients_to_inputs() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = Frozen(nn.Linear(3, 3))

    owner = Owner()
    assert not owner.state_dict() and not list(owner.parameters()) and not owner.teacher.module.training
    inputs = torch.ones(1, 3, requires_grad=True)
    owner.teacher(inputs).sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in owner.teacher.module.parameters())
    assert owner.teacher.to(dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_prediction_equals_diffusers_scheduler(prediction_type: PredictionType) -> None:
    model, noisy, conditioning = denoiser(prediction_type), latents(), tiny_conditioning(2)
    with torch.no_grad():
        prediction = model(noisy, TIMESTEPS, conditioning)
        output = model.unet(noisy, TIMESTEPS, encoder_hidden_states=conditioning.prompt_embeds).sample
    assert torch.equal(prediction.output, output)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
    )
    scheduler.set_timesteps(1000)
    for i, timestep in enumerate(TIMESTEPS.tolist()):
        expected = scheduler.step(output[i], timestep, noisy[i]).pred_original_sample
        torch.testing.assert_close(prediction.pred_x0[i], expected, rtol=1e-5, atol=1e-5)
    alpha, sigma = model.schedule.alpha_t(TIMESTEPS), model.schedule.sigma_t(TIMESTEPS)
    rebuilt = alpha * prediction.pred_x0 + sigma * prediction.noise_pred
    torch.testing.assert_close(rebuilt, noisy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sdxl", [False, True])
def test_guidance_is_one_doubled_batch_and_scale_one_is_none(sdxl: bool) -> None:
    model, noisy, conditioning = denoiser(sdxl=sdxl), latents(), tiny_conditioning(2, sdxl=sdxl)
    sizes: list[int] = []
    model.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        plain = model(noisy, TIMESTEPS, conditioning)
        uncond = model(noisy, TIMESTEPS, conditioning.unconditional())
        guided = model.guided(noisy, TIMESTEPS, conditioning, 3.0)
        one = model.guided(noisy, TIMESTEPS, conditioning, 1.0)
    assert sizes == [2, 2, 4, 2]
    torch.testing.assert_close(
        guided.output, uncond.output + 3 * (plain.output - uncond.output), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(one.output, plain.output)


def test_bfloat16_network_takes_and_gives_float32() -> None:
    model = denoiser()
    with torch.no_grad():
        expected = model(latents(), TIMESTEPS, tiny_conditioning(2)).output
        frozen = Frozen(model).to(dtype=torch.bfloat16)
        prediction = frozen(latents(), TIMESTEPS, tiny_conditioning(2))
    assert {value.dtype for value in prediction} == {torch.float32}
    assert model.schedule.alpha.dtype == torch.float32
    assert 0 < (prediction.output - expected).abs().max() < 0.1


@pytest.mark.parametrize("sdxl", [False, True])
def test_encoder_view_gives_the_tapped_features_and_their_gradients(sdxl: bool) -> None:
    model, conditioning = denoiser(sdxl=sdxl), tiny_conditioning(2, sdxl=sdxl)
    gradients = []
    for early in (False, True):
        noisy = latents().requires_grad_()
        model.zero_grad()
        if early:
            features = model.features(noisy, TIMESTEPS, conditioning)
        else:
            _, features = model.with_features(noisy, TIMESTEPS, conditioning)
        features.square().mean().backward()
        assert noisy.grad is not None and model.unet.conv_in.weight.grad is not None
        gradients.append((features.detach(), noisy.grad, model.unet.conv_in.weight.grad.clone()))
        assert all(parameter.grad is None for parameter in model.unet.up_blocks.parameters())
    for full, view in zip(*gradients, strict=True):
        assert torch.equal(full, view)


def test_encoder_view_leaves_the_network_as_it_was() -> None:
    unet = tiny_sd_unet()
    view = encoder_of(unet)
    assert len(view.up_blocks) == 0 and len(unet.up_blocks) == 3
    assert unet.conv_norm_out is not None and isinstance(unet.conv_out, nn.Conv2d)
    assert view.conv_in.weight is unet.conv_in.weight


@pytest.mark.parametrize("unet", [tiny_sd_unet(), without_mid_block()])
def test_bottleneck_shape_is_what_comes_out(unet: UNet2DConditionModel) -> None:
    model = Denoiser(unet, NoiseSchedule.scaled_linear(), "epsilon")
    with torch.no_grad():
        features = model.features(latents(), TIMESTEPS, tiny_conditioning(2))
        _, tapped = model.with_features(latents(), TIMESTEPS, tiny_conditioning(2))
    assert tuple(features.shape[1:]) == bottleneck_shape(unet, LATENT_SHAPE)
    assert torch.equal(features, tapped)


def test_taps_of_several_blocks_and_of_none() -> None:
    unet = tiny_sd_unet()
    assert bottleneck_of(unet) == "mid_block" and bottleneck_of(without_mid_block()) == "down_blocks.2"
    with torch.no_grad(), FeatureTap(unet, "down_blocks.0", "up_blocks.2") as tap:
        unet(latents(), TIMESTEPS, encoder_hidden_states=tiny_conditioning(2).prompt_embeds)
    assert tap["down_blocks.0"].shape[-1] == 8 and tap["up_blocks.2"].shape[-1] == 16
    assert not unet.down_blocks[0]._forward_hooks
    with pytest.raises(ValueError, match=r"no block 'mid_blok'; it has .*mid_block"):
        FeatureTap(unet, "mid_blok")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("steps", "spacing"), [(4, "trailing"), (7, "trailing"), (10, "leading"), (1, "trailing")]
)
def test_target_sampler_equals_the_diffusers_loop(
    prediction_type: PredictionType, steps: int, spacing: Spacing
) -> None:
    model, noise, conditioning = denoiser(prediction_type), latents(), tiny_conditioning(2)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    expected = noise
    twice: Conditioning = conditioning.doubled()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            doubled = torch.cat([expected, expected])
            output = model.unet(doubled, timestep, encoder_hidden_states=twice.prompt_embeds).sample
            uncond, cond = output.chunk(2)
            expected = scheduler.step(uncond + 3.0 * (cond - uncond), timestep, expected).prev_sample
    found = TargetSampler(model, steps, 3.0, spacing)(noise, conditioning)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
