"""Adapters on a U-Net, and the two other networks that it then is: the base it was, and its average."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from evaluation.benchmarks.full_size import sd15_unet_config, sd21_unet_config, sdxl_unet_config
from sdxs_lightning.core.noise_schedule import NoiseSchedule
from sdxs_lightning.core.option_bounds import LARGEST_RANK
from sdxs_lightning.export import plain_unet
from sdxs_lightning.networks.adapter_views import AveragedView, BaseView
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.lora import (
    ADAPTER,
    TARGETS,
    LoRA,
    add_lora,
    cast_base,
    lora_parameters,
    merged_weights,
)
from sdxs_lightning.networks.lora_extraction import low_rank
from sdxs_lightning.networks.lora_files import Adapters, live_adapters, write_lora
from sdxs_lightning.networks.network import no_param_grad
from tests.helpers.tiny import LATENT_SHAPE, tiny_conditioning, tiny_sd_unet, tiny_sdxl_unet

TIMESTEPS = torch.tensor([999, 10, 500])
NOISY = torch.randn(3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(3))


def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_scheduler_config(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
        }
    )


def denoiser(unet: UNet2DConditionModel) -> Denoiser:
    return Denoiser(unet, schedule(), "epsilon")


def adapted(sdxl: bool = False, lora: LoRA | None = None, moved: float = 0.0) -> UNet2DConditionModel:
    """A tiny U-Net with adapters, whose matrices B have moved by about so much."""
    unet = add_lora(tiny_sdxl_unet() if sdxl else tiny_sd_unet(), lora or LoRA(rank=3))
    move(unet, moved)
    return unet


@torch.no_grad()
def move(unet: UNet2DConditionModel, size: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(unet).items():
        if ".lora_B." in name:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def output_of(network: Denoiser, sdxl: bool = False) -> Tensor:
    with torch.no_grad():
        output: Tensor = network(NOISY, TIMESTEPS, tiny_conditioning(3, sdxl=sdxl)).output
    return output


def frozen_unet(sdxl: bool) -> UNet2DConditionModel:
    """Frozen, since torch multiplies by a weight that learns in another order, and rounds the last bit otherwise."""
    return (tiny_sdxl_unet() if sdxl else tiny_sd_unet()).requires_grad_(False)


@torch.no_grad()
def outputs_of(network: Denoiser, sdxl: bool) -> list[Tensor]:
    """What a denoiser says in each way."""
    arguments = NOISY, TIMESTEPS, tiny_conditioning(3, sdxl=sdxl)
    prediction, features = network.with_features(*arguments)
    guided = network.guided(*arguments, guidance_scale=3.0).output
    return [prediction.output, features, guided, network.features(*arguments)]


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_adapters_begin_at_nothing_and_merge_into_the_plain_network(sdxl: bool) -> None:
    unet = frozen_unet(sdxl)
    before, names = output_of(denoiser(unet), sdxl), unet.state_dict().keys()
    add_lora(unet, LoRA(rank=3, alpha=6.0))
    assert torch.equal(output_of(denoiser(unet), sdxl), before)

    move(unet, 0.3)
    after = output_of(denoiser(unet), sdxl)
    assert (after - before).abs().mean() > 0.1 * before.abs().mean()
    merged = plain_unet(unet, unet.state_dict())
    assert merged.state_dict().keys() == names
    torch.testing.assert_close(output_of(denoiser(merged), sdxl), after, rtol=1e-5, atol=1e-5)
    assert torch.equal(output_of(denoiser(unet), sdxl), after)  # merging left it alone

    peft = copy.deepcopy(unet)
    peft.fuse_lora()
    peft.unload_lora()
    for name, value in peft.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_the_released_adapter_has_as_many_weights() -> None:
    """SDXS-512 DreamShaper: its released anime adapter is of rank 64 on these targets and has 27.07 M weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=768,
        )
    layers = [
        layer
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(TARGETS)
    ]
    expected = 0
    for layer in layers:
        weight = layer.weight
        expected += 64 * (
            weight[0].numel() + weight.shape[0]
        )  # A sees what a row of W sees, B makes the rows
    add_lora(unet, LoRA(rank=64))
    assert sum(p.numel() for p in lora_parameters(unet).values()) == expected
    assert round(expected / 1e6, 2) == 27.07


def test_the_largest_rank_is_the_largest_full_rank_of_an_adapted_layer() -> None:
    ranks = []
    for config in (sd15_unet_config(), sd21_unet_config(), sdxl_unet_config()):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        weights = [
            layer.weight
            for name, layer in unet.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(TARGETS)
        ]
        ranks.append(max(min(len(weight), weight[0].numel()) for weight in weights))
    assert ranks == [LARGEST_RANK] * 3
    LoRA(rank=LARGEST_RANK)


def test_only_adapters_learn_and_they_depend_on_their_seed_only() -> None:
    networks = []
    for global_seed, seed in ((0, 1), (5, 1), (0, 2)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        unet = adapted(lora=LoRA(rank=2, seed=seed, targets=("to_q", "conv1")))
        assert torch.equal(torch.get_rng_state(), state)
        networks.append(lora_parameters(unet))
        learning = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
        assert learning == networks[-1].keys()
        assert {name.split(".lora_")[0].split(".")[-1] for name in learning} == {"to_q", "conv1"}
    one, two, three = networks
    assert all(torch.equal(one[name], two[name]) for name in one)
    differing = [name for name in one if not torch.equal(one[name], three[name])]
    assert differing == [name for name in one if ".lora_A." in name]  # B is zero whatever the seed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"lora\.rank must be in \[1, 1280\], got 0"),
        ({"rank": 10_000_000}, r"lora\.rank must be in \[1, 1280\], got 10000000"),
        ({"alpha": -1.0}, r"lora\.alpha must be above 0, or null for the rank, got -1\.0"),
        ({"alpha": float("nan")}, r"lora\.alpha must be above 0, or null for the rank, got nan"),
        ({"targets": ()}, r"lora\.targets names no layer; leave it out"),
        (
            {"targets": ("to_q", "to_x")},
            r"lora\.targets: 'to_x' is no layer of this U-Net; give ends of names",
        ),
        ({"targets": ("mid_block",)}, r"'mid_block' is a UNetMidBlock2DCrossAttn; give ends of names"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(lora=LoRA(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_the_base_is_still_there(sdxl: bool) -> None:
    network = denoiser(frozen_unet(sdxl))
    before = outputs_of(network, sdxl)
    add_lora(network.unet, LoRA(rank=3)).train()
    move(network.unet, 0.3)
    base = BaseView(network)
    assert list(base.parameters()) == [] and base.state_dict() == {}
    base.eval().requires_grad_(False)
    for now, then, learned in zip(outputs_of(base, sdxl), before, outputs_of(network, sdxl), strict=True):
        assert torch.equal(now, then) and not torch.equal(learned, then)
    # And the network is what it was: adapters on and learning, in training mode.
    assert all(p.requires_grad for p in lora_parameters(network).values()) and network.unet.training
    with no_param_grad(network):
        output_of(base, sdxl)
        assert not any(p.requires_grad for p in network.parameters())


def test_gradients_flow_through_the_base_to_inputs_also_where_blocks_are_recomputed() -> None:
    plain = denoiser(tiny_sd_unet())
    network = denoiser(adapted(moved=0.3).train())
    network.unet.enable_gradient_checkpointing()
    gradients = []
    for one in (plain, BaseView(network)):
        noisy = NOISY.clone().requires_grad_()
        one.features(noisy, TIMESTEPS, tiny_conditioning(3)).square().sum().backward()
        gradients.append(noisy.grad)
    assert gradients[0] is not None and gradients[1] is not None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network.unet.is_gradient_checkpointing


def test_the_average_is_a_network_of_its_own() -> None:
    unet = adapted(moved=0.3)
    network = denoiser(unet)
    average = AveragedView(network)
    assert torch.equal(output_of(average), output_of(network))
    assert len(list(average.parameters())) == len(lora_parameters(unet))
    then, kept = output_of(network), copy.deepcopy(unet)
    move(unet, 0.3, seed=1)
    now = output_of(network)
    assert torch.equal(output_of(average), then) and not torch.equal(now, then)
    assert torch.equal(output_of(network), now)
    with average.applied():
        weights = {name: value.clone() for name, value in unet.state_dict().items()}
    for name, value in merged_weights(kept, kept.state_dict()).items():
        assert torch.equal(merged_weights(unet, weights)[name], value), name


def test_the_average_is_not_hidden_by_the_copies_that_autocast_keeps() -> None:
    unet = adapted(moved=0.3)
    network = denoiser(unet)
    average = AveragedView(network)
    move(unet, 0.3, seed=1)
    alone = []
    for one in (network, average):
        with torch.autocast("cpu", torch.bfloat16):
            alone.append(one(NOISY, TIMESTEPS, tiny_conditioning(3)).output.detach())
    assert not torch.equal(*alone)
    with torch.autocast("cpu", torch.bfloat16):
        for one, expected in ((network, alone[0]), (average, alone[1]), (network, alone[0])):
            found = one(NOISY, TIMESTEPS, tiny_conditioning(3)).output
            assert torch.equal(found.detach(), expected)


def test_a_base_in_half_precision_leaves_float32_adapters() -> None:
    unet = adapted(moved=0.3)
    full = output_of(denoiser(unet))
    cast_base(unet, torch.bfloat16)
    assert {p.dtype for p in lora_parameters(unet).values()} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    output = output_of(denoiser(unet))
    torch.testing.assert_close(output, full, rtol=0.1, atol=0.05 * float(full.abs().max()))
    loss = denoiser(unet)(NOISY, TIMESTEPS, tiny_conditioning(3)).output.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_parameters(unet).values())


# ---------------------------------------------------------------------------------------------------- begun from a LoRA


def written(folder: Path, sdxl: bool = False, **settings: Any) -> Adapters:
    """A LoRA of rank 3 and alpha 1.5, and its updates."""
    unet = adapted(sdxl, LoRA(rank=3, alpha=1.5, **settings), moved=0.3)
    adapters = live_adapters(unet.state_dict(), 1.5)
    write_lora(folder, adapters, dtype=torch.float32)
    return adapters


@pytest.mark.parametrize("rank", [2, 3, 5])
@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_adapters_begin_from_a_lora(tmp_path: Path, sdxl: bool, rank: int) -> None:
    given = written(tmp_path, sdxl)
    unet = add_lora(
        tiny_sdxl_unet() if sdxl else tiny_sd_unet(), LoRA(rank=rank, alpha=4.0, weights=str(tmp_path))
    )
    begun = live_adapters(unet.state_dict(), 4.0)
    assert begun.keys() == given.keys()
    for name, adapter in given.items():
        expected = low_rank(adapter.delta(), rank)[0].delta() if rank < 3 else adapter.delta()
        torch.testing.assert_close(begun[name].delta(), expected, rtol=1e-5, atol=1e-6)
        # What the LoRA leaves free can still learn: random rows of A, zero columns of B.
        assert bool((begun[name].up.flatten(1)[:, 3:] == 0).all())
        assert bool((begun[name].down.flatten(1)[3:].abs().amax(1) > 0).all())
    assert all(parameter.requires_grad for parameter in lora_parameters(unet).values())


def test_a_lora_of_other_layers_or_another_network_begins_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(
        ValueError, match=r"adapts \d+ layer\(s\) that are not among lora\.targets, such as '"
    ):
        add_lora(tiny_sd_unet(), LoRA(rank=2, targets=("to_q",), weights=str(tmp_path)))
    with pytest.raises(ValueError, match=r"lora\.weights '.*'"):
        add_lora(tiny_sdxl_unet(), LoRA(rank=2, weights=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"lora\.weights"):
        add_lora(tiny_sd_unet(), LoRA(rank=2, weights=str(tmp_path / "nowhere")))
    with torch.device("meta"):  # the memory plan reads no file
        unet = UNet2DConditionModel.from_config(tiny_sd_unet().config)
    add_lora(unet, LoRA(rank=2, weights=str(tmp_path / "nowhere")))
    assert ADAPTER in unet.peft_config
