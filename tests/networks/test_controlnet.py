"""ControlNets for any U-Net: residuals, identity at the start, files, and diffusers' own pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from evaluation.benchmarks.full_size import sd21_unet_config
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import NoiseSchedule
from sdxs_lightning.export import export_pipeline
from sdxs_lightning.families import hub
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.networks.backward_simulation import one_step
from sdxs_lightning.networks.controlled import ControlledDenoiser, ControlledStudent, ControlNetSource
from sdxs_lightning.networks.controlnet import (
    StudentControlNet,
    build_controlnet,
    check_fits,
    controlnet_config,
    controlnet_from_unet,
    load_controlnet,
    save_controlnet,
    skip_widths,
    stock_controlnet,
)
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.guidance_input import add_guidance_input
from sdxs_lightning.surgery.config import meta_unet, prune_config
from sdxs_lightning.surgery.presets import PRESETS
from sdxs_lightning.surgery.pruning import prune
from sdxs_lightning.surgery.topology import Stage, Topology
from tests.helpers.tiny import (
    LATENT_SHAPE,
    RESOLUTION_PX,
    save_tiny_sd,
    save_tiny_sdxl,
    tiny_conditioning,
    tiny_sd_unet,
    tiny_sdxl_unet,
)

STEM = (4, 8)
TOPOLOGIES = {
    "whole": Topology(),
    "midless": Topology(mid_block="none"),
    "two-stages": Topology(stages=(Stage(), Stage()), mid_block="none"),
    "resnet-mid": Topology(mid_block="resnet"),
}
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
RESIDUALS = {
    # skip connections and the middle: 12 + 1 for SD-1.5; 6 + 1 for SDXS-512, as METHOD.md counts.
    None: 13,
    "sdxs-512": 7,
    "sdxs-512-0.9": 7,
    "bk-base": 9,
    "bk-small": 9,
    "bk-tiny": 7,
    "sdxs-1024": 10,
    "vega": 10,
    "koala-700m": 7,
    "ssd-1b": 10,
}


def inputs(sdxl: bool, batch: int = 2) -> tuple[Tensor, Tensor, Conditioning, Tensor]:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(batch, *LATENT_SHAPE, generator=generator)
    controls = torch.rand(batch, 3, RESOLUTION_PX, RESOLUTION_PX, generator=generator)
    return latents, torch.tensor([10, 900][:batch]), tiny_conditioning(batch, sdxl=sdxl), controls


def shaken(controlnet: ControlNetModel) -> ControlNetModel:
    """With random weights in place of the zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return controlnet.eval()


def residuals(controlnet: ControlNetModel, sdxl: bool) -> list[Tensor]:
    latents, timesteps, conditioning, controls = inputs(sdxl)
    down, mid = controlnet(
        latents, timesteps, controlnet_cond=controls, return_dict=False, **conditioning.unet_kwargs()
    )
    return [*down, mid]


# ------------------------------------------------------------------------------------------------ counts at full size


@pytest.mark.parametrize(("preset", "count"), RESIDUALS.items())
def test_residual_counts_and_widths_per_preset(preset: str | None, count: int) -> None:
    bases = [SDXL] if preset in ("sdxs-1024", "vega", "koala-700m", "ssd-1b") else [SD15, sd21_unet_config()]
    for base in bases:
        config = base if preset is None else prune_config(base, PRESETS[preset])
        with torch.device("meta"):
            controlnet = build_controlnet(controlnet_config(config))
        unet = meta_unet(config)
        assert len(skip_widths(controlnet)) + 1 == count
        check_fits(controlnet, unet, "controlnet")
        # What the U-Net takes from each up block's ResNets, in reverse: an independent count of its skip connections.
        taken = sum(len(block.resnets) for block in unet.up_blocks)
        assert len(skip_widths(unet)) == taken
        assert isinstance(controlnet, StudentControlNet) == (unet.mid_block is None)


def test_the_released_sketch_controlnet_has_a_mid_block_that_its_unet_has_not() -> None:
    config = prune_config(SD15, PRESETS["sdxs-512"])
    with torch.device("meta"):
        controlnet = build_controlnet(controlnet_config(config, mid_block="added"))
    # METHOD.md 4: 186.55 M parameters.
    assert sum(parameter.numel() for parameter in controlnet.parameters()) == 186_551_440
    assert type(controlnet) is ControlNetModel
    check_fits(controlnet, meta_unet(config), "controlnet")


# ------------------------------------------------------------------------------------------------ tiny, with weights


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_new_controlnet_changes_nothing_and_survives_its_folder(
    name: str, sdxl: bool, tmp_path: Path
) -> None:
    unet, _ = prune(tiny_sdxl_unet() if sdxl else tiny_sd_unet(), TOPOLOGIES[name])
    controlnet = controlnet_from_unet(unet, STEM).eval()
    for copied in ("conv_in", "time_embedding", "down_blocks"):
        own, unets = (part.get_submodule(copied).state_dict() for part in (controlnet, unet))
        assert all(torch.equal(own[key], value) for key, value in unets.items())
    latents, timesteps, conditioning, _ = inputs(sdxl)
    plain = unet(latents, timesteps, **conditioning.unet_kwargs()).sample
    *down, mid = residuals(controlnet, sdxl)
    controlled = unet(
        latents,
        timesteps,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        **conditioning.unet_kwargs(),
    ).sample
    assert (controlled - plain).abs().max() == 0.0
    assert [one.shape[1] for one in down] == skip_widths(unet)

    before = residuals(shaken(controlnet), sdxl)
    save_controlnet(controlnet, tmp_path / "controlnet", torch.float32)
    loaded = load_controlnet(tmp_path / "controlnet")
    stock = stock_controlnet(controlnet)
    assert type(loaded) is type(controlnet) and type(stock) is ControlNetModel
    for other in (loaded, stock.eval()):
        assert all(torch.equal(one, two) for one, two in zip(before, residuals(other, sdxl), strict=True))
    assert before[0].abs().max() > 0.01


def test_what_stock_diffusers_says_to_a_controlnet_without_mid_block(tmp_path: Path) -> None:
    unet, _ = prune(tiny_sd_unet(), TOPOLOGIES["midless"])
    with pytest.raises(ValueError, match="unknown mid_block_type : None"):
        ControlNetModel.from_unet(unet)
    save_controlnet(controlnet_from_unet(unet, STEM), tmp_path / "c", torch.float32)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["mid_block_type"] is None
    with pytest.raises(ValueError, match="unknown mid_block_type : None"):
        ControlNetModel.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("midless", [False, True], ids=["mid", "midless"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_stock_pipelines_draw_what_training_drew(kind: str, midless: bool, tmp_path: Path) -> None:
    """The whole round trip: student and ControlNet folders, loaded by diffusers' pipelines."""
    sdxl = kind == "sdxl"
    save: Callable[[Path], Path] = save_tiny_sdxl if sdxl else save_tiny_sd
    family = (StableDiffusionXL if sdxl else StableDiffusion)(str(save(tmp_path / "base")), 399)
    unet = family.load_unet()
    if midless:
        unet, _ = prune(unet, TOPOLOGIES["midless"])
    controlnet = shaken(controlnet_from_unet(unet, STEM))
    export_pipeline(unet, family, tmp_path / "student", dtype=torch.float32)
    save_controlnet(controlnet, tmp_path / "controlnet", torch.float32)

    noise, _, _, controls = inputs(sdxl)
    prompts = ["a red circle", "a blue square"]
    conditioning = family.encode_prompts(prompts)
    denoiser = Denoiser(unet, family.schedule, family.prediction_type)
    controlled = ControlledDenoiser(denoiser, controlnet, conditioning_scale=0.8)
    with torch.no_grad():
        expected, plain = (
            one_step(controlled, noise, Conditioning(**vars(conditioning) | {"control_images": given}), 399)
            for given in (controls, None)
        )
    assert (expected - plain).abs().max() > 0.01

    plain_class = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    parts = plain_class.from_pretrained(tmp_path / "student", use_safetensors=True).components
    extra = {} if sdxl else {"requires_safety_checker": False}
    pipeline_class: Any = StableDiffusionXLControlNetPipeline if sdxl else StableDiffusionControlNetPipeline
    pipeline = pipeline_class(**parts, **extra, controlnet=load_controlnet(tmp_path / "controlnet"))
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        prompt=prompts,
        image=controls,
        latents=noise,
        num_inference_steps=1,
        guidance_scale=0.0,
        controlnet_conditioning_scale=0.8,
        output_type="latent",
    ).images
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frozen", ["unet", "controlnet"])
def test_a_frozen_part_is_no_parameter_but_moves_along(frozen: Any) -> None:
    unet = tiny_sd_unet()
    family_like = Denoiser(unet, NoiseSchedule(torch.linspace(0.999, 0.005, 1000)), "epsilon")
    controlled = ControlledDenoiser(family_like, controlnet_from_unet(unet, STEM), frozen=frozen)
    assert {name.split(".")[0] for name, _ in controlled.named_parameters()} == {"unet", "controlnet"} - {
        frozen
    }
    controlled.double()
    assert all(
        parameter.dtype == torch.float64
        for network in controlled.networks
        for parameter in network.parameters()
    )
    prompts = Conditioning(prompt_embeds=torch.zeros(1, 4, 32), control_images=torch.ones(1, 3, 32, 32))
    controlled.with_features(torch.zeros(1, 4, 16, 16), torch.tensor([9]), prompts)
    copied = controlled.copy_for_average()  # a forward pass leaves nothing behind
    hidden, shown = ("unet", "controlnet") if frozen == "unet" else ("controlnet", "unet")
    assert getattr(copied, hidden) is getattr(controlled, hidden)
    assert getattr(copied, shown) is not getattr(controlled, shown)


# --------------------------------------------------------------------------------------------------------- messages


def test_a_controlnet_of_another_student_is_refused() -> None:
    unet, smaller = tiny_sd_unet(), prune(tiny_sd_unet(), TOPOLOGIES["two-stages"])[0]
    with pytest.raises(ValueError, match=r"has 6 down residuals of widths \[8, 8, 8, .*takes 4 of"):
        check_fits(controlnet_from_unet(unet, STEM), smaller, "student.controlnet.weights 'x'")
    sdxl = tiny_sdxl_unet()
    alike = UNet2DConditionModel(
        **dict(sdxl.config) | {"cross_attention_dim": unet.config.cross_attention_dim}
    )
    with pytest.raises(ValueError, match="'x' is of the kind of SD, and the U-Net of that of SDXL"):
        check_fits(controlnet_from_unet(unet, STEM), alike, "student.controlnet.weights 'x'")
    narrow = UNet2DConditionModel(**dict(unet.config) | {"cross_attention_dim": 16})
    with pytest.raises(ValueError, match="reads prompts of width 32, and the U-Net 16"):
        check_fits(controlnet_from_unet(unet, STEM), narrow, "student.controlnet.weights 'x'")


def test_sources_are_checked(tmp_path: Path) -> None:
    family = StableDiffusion(str(save_tiny_sd(tmp_path / "base")))
    unet = family.load_unet()
    assert ControlNetSource().make(unet, family, "x").config["conditioning_embedding_out_channels"] == (
        16,
        32,
    )
    with pytest.raises(
        ValueError, match="8 times smaller, and the latents .* are 2 times smaller.* give 2 stem_widths"
    ):
        ControlNetSource(stem_widths=(4, 4, 4, 4)).make(unet, family, "student.controlnet")
    with pytest.raises(FileNotFoundError, match="there is no ControlNet in 'nowhere'"):
        ControlNetSource("nowhere").make(unet, family, "student.controlnet")
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel, expected a ControlNetModel"):
        load_controlnet(tmp_path / "base" / "unet")
    with pytest.raises(ValueError, match=r"train is false and controlnet\.weights null"):
        ControlNetSource(train=False)
    with pytest.raises(ValueError, match="conditioning_scale must be 0 or more, got -1"):
        ControlNetSource(conditioning_scale=-1.0)
    with pytest.raises(ValueError, match="conditioning_scale is 0, which .* nothing would be trained"):
        ControlNetSource(conditioning_scale=0.0)
    ControlNetSource("x", train=False, conditioning_scale=0.0)  # the base's, switched off
    with pytest.raises(ValueError, match="conditioning_channels must be 1 or more, got 0"):
        ControlNetSource(conditioning_channels=0)
    for widths in ((), (8, 0)):
        with pytest.raises(ValueError, match="stem_widths must be widths of 1 or more"):
            ControlNetSource(stem_widths=widths)
    save_controlnet(controlnet_from_unet(unet, (8, 16), conditioning_channels=1), tmp_path / "one")
    one = str(tmp_path / "one")
    ControlNetSource(one, conditioning_channels=1, stem_widths=(8, 16)).make(unet, family, "x")
    with pytest.raises(ValueError, match="x.conditioning_channels is 3, and x.weights .* has 1; set"):
        ControlNetSource(one).make(unet, family, "x")


def test_a_student_is_controlled_at_the_timesteps_of_its_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = StableDiffusion(str(save_tiny_sd(tmp_path / "base")))
    student, sgd = tmp_path / "student", partial(torch.optim.SGD, lr=0.1)
    for steps, other in (([699], [999]), ([999, 499], [999])):
        export_pipeline(
            family.load_unet(), family, student, steps[0], timesteps=steps if len(steps) > 1 else None
        )
        monkeypatch.setattr(hub, "fetch", lambda *_: student)
        for weights in (student, student / "unet", "org/student"):
            ControlledStudent(sgd, weights=str(weights), timesteps=steps).build(family)
            refused = rf"is a student of the timesteps \[{', '.join(map(str, steps))}\] .* trained at \[999\]"
            with pytest.raises(ValueError, match=refused):
                ControlledStudent(sgd, weights=str(weights), timesteps=other).build(family)
    ControlledStudent(sgd, weights=str(tmp_path / "base"), timesteps=[499]).build(family)  # no exported one
    guided = family.load_unet()
    add_guidance_input(guided, 8)
    guided.save_pretrained(tmp_path / "guided")
    with pytest.raises(ValueError, match="take the guidance scale .* such a student cannot be trained"):
        ControlledStudent(sgd, weights=str(tmp_path / "guided")).build(family)
