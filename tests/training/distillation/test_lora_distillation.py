"""Student and fake score that learn by adapters: what moves, what is saved, what is exported, what is planned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from sdxs_lightning.callbacks.export import Export
from sdxs_lightning.cli import main
from sdxs_lightning.memory_plan.hardware import read_hardware
from sdxs_lightning.memory_plan.planner import Planner
from sdxs_lightning.networks.adapter_views import AveragedView, BaseView
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.lora import LoRA, add_lora, lora_parameters
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from tests.helpers.resumed_run import same
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_distillation import built, distillation, family_of, fit, save_base, weights
from tests.helpers.tiny_run import tiny_config, write_config
from tests.training.resume.test_resume import Witness

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.1)
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
FEW = ("to_q", "ff.net.2", "conv1", "conv_shortcut")
STUDENT, FAKE = LoRA(rank=2, alpha=4.0, seed=1, targets=FEW), LoRA(rank=3, targets=FEW)


def with_adapters(
    base: Path,
    optimizer: Any = SGD,
    student: LoRA | None = STUDENT,
    fake_score: LoRA = FAKE,
    **settings: Any,
) -> OneStepDistillation:
    switches = {"gradient_checkpointing": settings.pop("gradient_checkpointing", False)}
    return distillation(
        base,
        optimizer=optimizer,
        student=StudentGenerator(optimizer, lora=student, **switches),
        fake_score=FakeScore(optimizer, lora=fake_score, **switches),
        **settings,
    )


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("kind", ["sd-v_prediction", "sdxl-epsilon"])
def test_adapters_move_and_the_base_is_on_disk_what_it_is_in_memory(
    base: Base, shards: Path, kind: str
) -> None:
    # SGD would leave A where it is: its gradient goes through B, which one update of 0.1 leaves far below A's last digit.
    adamw = partial(torch.optim.AdamW, lr=1e-2, eps=1e-12, weight_decay=0)
    module = built(with_adapters(base(kind), adamw, LoRA(rank=2), LoRA(rank=3)))
    assert module.real_score is not None and module.ema is not None
    assert isinstance(module.real_score.module, BaseView) and isinstance(module.ema.denoiser, AveragedView)
    assert module.real_score.module.unet is module.fake_score.denoiser.unet  # type: ignore[union-attr]
    before = weights(module)
    trainer = fit(module, shards, batches=2)
    now = weights(module)
    differs = {name for name in now if not torch.equal(now[name], before[name])}
    # The first update moves B alone, because it was 0; the second A, too.
    adapters = {name for name in now if ".lora_" in name.replace("/", ".")}
    assert {name for name in differs if name.split(".")[0] != "discriminator"} == adapters
    assert {name.split(".")[0] for name in adapters} == {"student", "fake_score", "ema"}
    sizes = [sum(p.numel() for g in o.param_groups for p in g["params"]) for o in trainer.optimizers]
    for role, size in zip(("student", "fake_score"), sizes, strict=False):
        adapted = lora_parameters(module.networks[role]).values()
        assert (
            size
            == sum(p.numel() for p in adapted)
            < 0.5 * sum(p.numel() for p in module.networks[role].parameters())
        )
    plain = unet_of(base(kind))
    for role in ("student", "fake_score"):
        frozen = {name for name in now if name.startswith(role) and name not in adapters}
        assert len(frozen) == len(plain)
        for name in frozen:
            on_disk = plain[name.removeprefix(f"{role}.denoiser.unet.").replace(".base_layer.", ".")]
            assert torch.equal(now[name], on_disk), name


def test_a_real_score_of_its_own_would_say_the_same(
    base: Base, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared weights are an arrangement in memory and nothing else."""
    arrived = []
    for own in (False, True):
        if own:
            monkeypatch.setattr(FakeScore, "shared_base", lambda *_: None)
        module = with_adapters(base("sd-v_prediction"), gradient_checkpointing=not own)
        fit(module, shards, batches=3)
        assert module.real_score is not None
        assert type(module.real_score.module) is (Denoiser if own else BaseView)
        arrived.append(weights(module))
    for name, value in arrived[0].items():
        torch.testing.assert_close(value, arrived[1][name], rtol=0, atol=1e-6, msg=name)


def test_a_checkpoint_has_adapters_only_and_resumes_exactly(base: Base, shards: Path, tmp_path: Path) -> None:
    folder = base("sd-epsilon")
    make = partial(with_adapters, folder, ADAMW, discriminator=Discriminator(ADAMW))
    straight = make()
    fit(straight, shards, 4, callbacks=[Witness(tmp_path / "cut.ckpt", 2)]).save_checkpoint(
        tmp_path / "straight.ckpt"
    )
    resumed = make()
    fit(resumed, shards, 4, ckpt_path=str(tmp_path / "cut.ckpt")).save_checkpoint(tmp_path / "resumed.ckpt")
    contents = [torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("straight", "resumed")]
    for part in ("state_dict", "optimizer_states", "iterations", "student_updates"):
        same(contents[0][part], contents[1][part], part)
    saved = contents[0]["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"student", "fake_score", "ema", "discriminator"}
    assert all(".lora_" in name.replace("/", ".") for name in saved if not name.startswith("discriminator"))
    assert len([name for name in saved if name.startswith("ema.")]) == len(lora_parameters(resumed.student))
    for name, value in weights(straight).items():
        assert torch.equal(value, dict(resumed.named_parameters())[name]), name
    # Another rank, or none, is another network.
    with pytest.raises(RuntimeError, match="size mismatch for student"):
        built(make(student=LoRA(rank=5))).load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*student\.denoiser\.unet\.conv_in\.weight"):
        built(make(student=None)).load_state_dict(saved)
    # Neither is another base of the same shape the one that the adapters were trained on.
    shutil.copytree(folder, tmp_path / "other")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "other" / "unet")
    with torch.no_grad():
        unet.conv_in.bias.add_(1e-3)
    unet.save_pretrained(tmp_path / "other" / "unet")
    built(make()).on_load_checkpoint(contents[0])
    moved = built(with_adapters(tmp_path / "other", ADAMW, discriminator=Discriminator(ADAMW)))
    with pytest.raises(
        ValueError, match="checkpoint's student was trained on frozen weights with fingerprint"
    ):
        moved.on_load_checkpoint(contents[0])


@pytest.mark.parametrize(("kind", "average"), [("sd-v_prediction", True), ("sdxl-epsilon", False)])
def test_the_exported_folder_is_the_student_with_its_adapters_merged(
    base: Base, shards: Path, tmp_path: Path, kind: str, average: bool
) -> None:
    module = with_adapters(base(kind), partial(torch.optim.SGD, lr=1.0), LoRA(rank=2, alpha=4.0))
    export = Export(str(tmp_path / "out"), average=average, dtype="float32")
    export.on_train_end(fit(module, shards, batches=3), module)
    captions = tiny_batch(3).captions
    noise = torch.randn(3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    assert module.ema is not None
    conditioning = module.family.encode_prompts(captions)
    with torch.no_grad():
        current, averaged = module.student(noise, conditioning), module.ema(noise, conditioning)
    expected, other = (averaged, current) if average else (current, averaged)
    pipeline = getattr(diffusers, module.family.pipeline_class).from_pretrained(tmp_path / "out")
    assert unet_of(tmp_path / "out").keys() == unet_of(base(kind)).keys()
    found = pipeline(
        captions,
        num_inference_steps=1,
        guidance_scale=0.0,
        latents=noise,
        width=32,
        height=32,
        output_type="latent",
    ).images
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * size)
    assert (found - other).abs().max() > 1e-3 * size
    assert torch.equal(module.student(noise, conditioning), current)  # the export left it what it was


def test_half_precision_of_the_base_and_full_precision_of_the_adapters(base: Base, shards: Path) -> None:
    module = with_adapters(base("sdxl-epsilon"), real_score_dtype="bfloat16")
    trainer = fit(module, shards, batches=2, precision="bf16-mixed")
    assert module.fake_score is not None
    types = {name: p.dtype for name, p in module.fake_score.named_parameters()}
    assert {dtype for name, dtype in types.items() if ".lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in types.items() if ".lora_" not in name} == {torch.bfloat16}
    reference = fit(with_adapters(base("sdxl-epsilon")), shards, batches=2).callback_metrics
    for name in ("student/distribution_matching", "fake_score/loss"):
        torch.testing.assert_close(trainer.callback_metrics[name], reference[name], rtol=0.05, atol=1e-3)


def test_the_plan_counts_frozen_and_trained_weights(base: Base) -> None:
    plain = sum(value.numel() for value in unet_of(base("sdxl-epsilon")).values())
    module = built(with_adapters(base("sdxl-epsilon")))
    student, fake = (
        sum(p.numel() for p in lora_parameters(module.networks[role]).values())
        for role in ("student", "fake_score")
    )
    hardware = partial(read_hardware, gpu_gib=80.0)
    one_gpu = hardware({"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"})
    planner = Planner(with_adapters(base("sdxl-epsilon"), ADAMW, real_score_dtype="bfloat16"), one_gpu, 4)
    rows = {one.name: one for one in planner.plan().networks}
    assert (rows["student"].parameters, rows["student"].trainable) == (plain + student, student)
    assert (rows["fake_score"].parameters, rows["fake_score"].trainable) == (plain + fake, fake)
    assert (rows["ema"].parameters, rows["real_score"].parameters) == (student, 0)
    schedule = 3 * 1000 * 4  # buffers of a noise schedule
    assert rows["student"].weights == 4 * (plain + student) + schedule
    assert rows["fake_score"].weights == 2 * plain + 4 * fake + schedule
    assert (rows["fake_score"].gradients, rows["fake_score"].optimizer) == (4 * fake, 8 * fake)
    # FSDP2 gathers the whole base and reduces the adapters' gradients alone.
    full = Planner(distillation(base("sdxl-epsilon"), optimizer=ADAMW), one_gpu, 4)
    sharded = hardware(
        {
            "accelerator": "gpu",
            "devices": 8,
            "strategy": {"class_path": "sdxs_lightning.training.sharding.ShardedNetworks"},
        }
    )
    gathered = [one.plan(sharded).buffers["FSDP2 gathering"] for one in (planner, full)]
    assert gathered[0] < 0.7 * gathered[1]


def test_the_command_line_reads_adapters(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    parts = config["model"]["init_args"]
    parts["student"]["init_args"]["lora"] = {"rank": 2, "targets": ["to_q", "conv1"]}
    parts["fake_score"]["init_args"]["lora"] = {"rank": 5}
    arguments = ["--config", str(write_config(tmp_path / "run.yaml", config))]
    arguments += ["--model.init_args.fake_score.init_args.lora.rank=3", "--plan"]
    assert main([*arguments, f"--plan_json={tmp_path / 'plan.json'}"]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())["networks"]
    family = family_of(save_base("sd-epsilon", tmp_path))
    few, all_of_them = LoRA(rank=2, targets=("to_q", "conv1")), LoRA(rank=3)
    for role, lora in (("student", few), ("fake_score", all_of_them), ("ema", few)):
        expected = sum(p.numel() for p in lora_parameters(add_lora(family.load_unet(), lora)).values())
        assert plan[role]["parameters" if role == "ema" else "trainable"] == expected


def test_refusal_of_two_bases() -> None:
    with pytest.raises(
        ValueError, match=r"fake_score\.lora learns on the base's own weights, and fake_score\.w"
    ):
        FakeScore(SGD, weights="somewhere", lora=FAKE)


def test_without_adapters_there_is_no_shared_base(base: Base) -> None:
    fake_score = FakeScore(SGD)
    fake_score.build(family_of(base("sd-epsilon")))
    assert fake_score.shared_base(torch.float32) is None
