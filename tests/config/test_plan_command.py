"""The memory plan on the command line, and on a GPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from evaluation.benchmarks.full_size import save_configs
from sdxs_lightning.cli import main
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.memory_plan.command import show_plan
from sdxs_lightning.memory_plan.planner import MemoryPlan, Planner
from sdxs_lightning.memory_plan.report import as_json, print_plan, sentences
from tests.config.test_configs import stack
from tests.helpers.planned import ADAMW, ONE_CPU, PLANNED, hardware
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_decoding import decoding
from tests.helpers.tiny_distillation import distillation
from tests.helpers.tiny_run import ROOT, tiny_config, write_config

# --------------------------------------------------------------------------------------------------- command line


def plan_of(arguments: list[str], folder: Path) -> dict[str, Any]:
    file = folder / "plan.json"
    assert (
        main([*arguments, "--plan", f"--plan_json={file}", f"--trainer.default_root_dir={folder}/run"]) == 0
    )
    assert not (folder / "run").exists()
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def test_sdxl_on_one_gpu_needs_more_than_90_gb(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_configs("sdxl", folder)
    arguments = [*stack("sdxl/distill.yaml"), "--config", str(ROOT / "configs/hardware/one_gpu.yaml")]
    arguments += [f"--model.init_args.family.init_args.base={base}", "--plan_gpu_gb=192"]
    plan = plan_of(arguments, tmp_path)
    networks, count = plan["networks"], 2_567_463_684
    assert networks["student"]["parameters"] == networks["fake_score"]["trainable"] == count
    assert networks["fake_score"]["optimizer"] == 8 * count
    assert networks["text_encoder_2"]["parameters"] == 694_659_840  # OpenCLIP bigG
    assert "vae" not in networks
    # METHOD.md 7: more than 90 GB without sharding. Masters, states, EMA, gradients and the real score are exact:
    assert plan["needed"] > 4 * count * (2 + 4 + 1 + 2) + 2 * count > 90e9
    assert plan["fits"] and plan["largest_batch"] > 4
    # A checkpoint: weights and AdamW's states of student, fake score and discriminator, and the EMA.
    checkpoint, (saved,) = plan["checkpoint"], plan["checkpoint_folders"]
    assert checkpoint["averages"] == 4 * count
    assert checkpoint["total"] == 28 * count + 12 * networks["discriminator"]["parameters"]
    assert checkpoint["total"] == sum(checkpoint[part] for part in ("weights", "averages", "optimizers"))
    assert saved["path"] == f"{tmp_path}/run/checkpoints" and saved["keep"] == 3 and saved["asynchronous"]
    assert saved["needed"] == 4 * saved["checkpoint"] == 4 * checkpoint["total"]
    assert saved["free"] > 0 and saved["fits"] == (saved["needed"] <= saved["free"])
    shown = capsys.readouterr().out
    assert "keeps 3 of 68.12 GiB" in shown and "asynchronous checkpoints: 68.12 GiB" in shown
    assert "2,567,463,684" in shown and "bf16-mixed, one device" in shown
    assert "of 192.00 GiB (--plan_gpu_gb)" in shown and "the largest batch per device that fits is" in shown


def tiny_arguments(folder: Path, base: Path, *flags: str) -> list[str]:
    config = tiny_config(folder)
    config["model"]["init_args"]["family"]["init_args"]["base"] = str(base)
    config["trainer"] |= {"accelerator": "gpu", "precision": "bf16-mixed"}
    # No data and no GPU are at hand.
    config["data"]["init_args"]["shards"] = "nowhere"
    return ["--config", str(write_config(folder / "tiny.yaml", config)), *flags]


def test_a_smaller_batch_may_be_what_fits(planner: Planner, planned: MemoryPlan) -> None:
    assert planned.fits and "Fits: " in " ".join(sentences(planned))
    memory = planned.needed_at_most(7)
    tight = replace(planned, hardware=replace(planned.hardware, memory=memory))
    assert not tight.fits and tight.largest_batch == 7
    (change,) = planner.changes(tight)
    assert change.plan.fits and change.plan.batch_size == 7
    printed = sentences(tight, [change])
    assert "Does not fit: " in printed[1] and printed[1].endswith(
        "the largest batch per device that fits is 7."
    )
    assert printed[2].startswith(
        "Change: data.init_args.batch_size 7 with accumulate_grad_batches 6, for the same"
    )
    narrow = replace(planned, hardware=replace(planned.hardware, memory=planned.needed()))
    assert sentences(narrow)[1].startswith("May not fit: ")


def test_a_plan_that_does_not_fit_suggests_changes(
    configs: dict[str, Path], planned: MemoryPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not the planner of the fixture: changes leave gradient checkpointing on.
    planner = Planner(distillation(configs["sdxl"], **PLANNED), hardware(0.5), 16)
    small = replace(planned, hardware=planner.hardware)
    assert not small.fits and small.largest_batch == 0
    changes = planner.changes(small)
    assert changes[0].what == "gradient_checkpointing: true of student and fake_score"
    assert changes[1].what.endswith("and --config configs/hardware/fsdp2.yaml on 8 GPUs")
    assert [change["what"] for change in as_json(small, changes)["changes"]] == [one.what for one in changes]
    print_plan(small, changes)
    printed = capsys.readouterr().out
    assert "not even a batch of 1 fits" in printed and "of 0.50 GiB (--plan_gpu_gb)" in printed
    assert "Change: gradient_checkpointing: true of student and fake_score: " in printed


@pytest.mark.parametrize("stage", ["miniaturise", "decoder", "teacher"])
def test_every_stage_has_a_plan(stage: str, tmp_path: Path) -> None:
    plan = plan_of(["--config", str(ROOT / f"configs/toy/{stage}.yaml"), "--plan_gpu_gb=0.001"], tmp_path)
    assert not plan["fits"] and (stage == "decoder" or plan["changes"])
    trained = [name for name, network in plan["networks"].items() if network["trainable"]]
    expected = {
        "miniaturise": ["student"],
        "decoder": ["decoder", "discriminator"],
        "teacher": ["denoiser"],
    }
    assert trained == expected[stage]
    assert any(network["role"] == "averaged" for network in plan["networks"].values())
    assert plan["needed"] > sum(network["weights"] for network in plan["networks"].values())
    assert "vae" not in plan["networks"]


def test_the_vae_is_planned_for_targets_and_for_latents_of_images(configs: dict[str, Path]) -> None:
    def networks(contents: list[str], **settings: Any) -> set[str]:
        data = {"init_args": {"batch_size": 4, "contents": contents}}
        plan = show_plan(decoding(configs["sd"], **settings), {"trainer": ONE_CPU, "data": data})
        return {one.name for one in plan.networks}

    assert "vae" in networks(["latents"], target="vae")
    assert "vae" in networks(["images"], target="images")
    assert "vae" not in networks(["latents", "images"], target="images")


def test_a_base_that_does_not_exist_is_refused(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = "--model.init_args.family.init_args.base=nowhere/at/all"
    assert main([*tiny_arguments(tmp_path, configs["sd"]), "--plan", flag]) == 2
    assert "there is no folder 'nowhere/at/all'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan_gpu_gb": 0}, "--plan_gpu_gb must be above 0"),
        ({"trainer": {"precision": "64-true"}}, "--plan does not know trainer.precision '64-true'"),
        ({"data": None}, "--plan reads data.init_args.batch_size, and this configuration has none"),
    ],
)
def test_what_a_plan_cannot_read_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {"trainer": ONE_CPU, "data": {"init_args": {"batch_size": 4}}}
    with pytest.raises(UserError, match=message):
        show_plan(LightningModule(), config | changes)


def test_a_stage_that_does_not_describe_itself_is_refused() -> None:
    with pytest.raises(UserError, match="does not know LightningModule: it has no plan_networks"):
        Planner(LightningModule(), hardware(), 4)


# ------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
def test_the_plan_is_what_the_gpu_allocates(folder: Path) -> None:
    """One iteration of a distillation of moderate size; everything but the CUDA context is in max_memory_allocated."""
    from diffusers import UNet2DConditionModel

    base = folder / "moderate"
    shutil.copytree(folder / "whole" / "sd-epsilon", base)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(128, 256, 512),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    unet.save_pretrained(base / "unet")
    size, device = 8, torch.device("cuda")

    def made() -> Any:
        return distillation(base, optimizer=ADAMW, real_score_dtype="bfloat16")

    plan = Planner(made(), hardware(), size).plan()
    stage = made()
    stage.configure_model()
    stage.to(device)
    stage.on_fit_start()
    batch = tiny_batch(size).to(device)
    batch = batch.__class__(
        **(batch.__dict__ | {"latents": torch.randn(size, *stage.family.latent_shape(), device=device)})
    )
    optimizers = {
        name: network.configure_optimizers()["optimizer"] for name, network in stage.networks.items()
    }
    stage.manual_backward = lambda loss: loss.backward()
    for iteration in range(3):
        if iteration == 2:  # by now the optimizers have their states and cuDNN its plans
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            for phase in stage.plan_step(batch):
                for name in phase.updates:
                    optimizers[name].step()
                    optimizers[name].zero_grad(set_to_none=True)
    allocated = torch.cuda.max_memory_allocated()
    counted = plan.needed() - plan.hardware.allowance
    assert counted == pytest.approx(allocated, rel=0.15)
    assert stage.family.latent_shape() != LATENT_SHAPE
