"""Stage `miniaturise`: its step against plain torch with hooks of its own, what learns, what is saved, and resume."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from data.shards.datamodule import ShardDataModule
from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.checkpointing import Checkpointing
from sdxs_lightning.callbacks.export import Export
from sdxs_lightning.cli import main
from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.errors import CheckpointNotWritten
from sdxs_lightning.core.seeding import Stream, integers, normal
from sdxs_lightning.networks.network import prepare_unet
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.knowledge_distillation import (
    FeatureDistillation,
    TaskLoss,
)
from sdxs_lightning.stages.prune_distill import PrunedUNetDistillation
from sdxs_lightning.surgery.topology import Stage, Topology
from sdxs_lightning.training.lr_schedules import TrapezoidLR
from tests.helpers.ranks.processes import train_in_ranks
from tests.helpers.resumed_run import same
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch, tiny_sd_unet
from tests.helpers.tiny_distillation import KINDS, family_of, weights
from tests.helpers.tiny_run import tiny_config, write_config

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.05)
SMALL = Topology(stages=(Stage(), Stage()), mid_block="none")
"""Of the tiny base's three stages the outer two."""
TAPS = {
    "down_blocks.0": "down_blocks.0",
    "down_blocks.1.attentions.0.proj_out": "down_blocks.1.attentions.0.proj_out",
    "up_blocks.0": "up_blocks.1",
    "up_blocks.1": "up_blocks.2",
}


def stage(base: Path, topology: str | Topology | None = SMALL, **settings: Any) -> PrunedUNetDistillation:
    defaults: dict[str, Any] = {"optimizer": SGD, "ema_decay": 0.75, "seed": 3}
    return PrunedUNetDistillation(family_of(base), topology, **defaults | settings)


def built(module: PrunedUNetDistillation) -> PrunedUNetDistillation:
    module.configure_model()
    return module


def moved_away(module: PrunedUNetDistillation) -> PrunedUNetDistillation:
    """With a student that differs from its teacher everywhere: after the surgery its first stages are equal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built(module).student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def fit(
    module: LightningModule,
    shards: Path,
    steps: int,
    ckpt: Path | None = None,
    batch_size: int = 4,
    **settings: Any,
) -> Trainer:
    trainer = Trainer(
        enable_checkpointing=any(isinstance(one, Checkpoint) for one in settings.get("callbacks", [])),
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ShardDataModule(str(shards), batch_size)
        trainer.fit(module, datamodule=data, ckpt_path=None if ckpt is None else str(ckpt))
    return trainer


def logged(module: PrunedUNetDistillation, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
    """One step outside a Trainer: the loss with its graph, and what would be logged."""
    lines: dict[str, float] = {}
    module.log_dict = lambda scalars: lines.update({k: float(v) for k, v in scalars.items()})  # type: ignore
    return module.training_step(batch, 0), lines


def hooked(unet: nn.Module, names: Sequence[str], *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    """Output and features of a forward pass; hooks of the test's own."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [dict(unet.named_modules())[name].register_forward_hook(keep) for name in names]
    output = unet(*args, **kwargs).sample
    for handle in handles:
        handle.remove()
    return output, seen


def mean_square(one: Tensor, two: Tensor) -> float:
    return float((one.detach().double() - two.detach().double()).pow(2).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_step_equals_plain_torch(base: Base, kind: str) -> None:
    folder = base(kind)
    features = FeatureDistillation(weight=0.5, tap_weights={"up_blocks.1": 3.0})
    module = moved_away(stage(folder, feature_distillation=features, task=TaskLoss(0.25)))
    assert module.taps == TAPS
    # Sizes that are not the target's, which SDXL is conditioned on.
    batch = replace(tiny_batch(5), original_sizes=torch.full((5, 2), 48), crops=torch.full((5, 2), 3))
    loss, lines = logged(module, batch)

    teacher = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert batch.latents is not None
    latents = batch.latents.double() * module.family.scaling_factor
    noise = normal(3, Stream.TEACHER_NOISE, batch.positions, LATENT_SHAPE).double()
    timesteps = integers(3, Stream.TEACHER_TIMESTEP, batch.positions, 0, 1000)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[timesteps][:, None, None, None]
    noisy = (abar.sqrt() * latents + (1 - abar).sqrt() * noise).float()
    conditioning = module.family.encode_prompts(batch.captions, batch.original_sizes, batch.crops)
    if kind.startswith("sdxl"):
        assert conditioning.add_time_ids is not None
        assert conditioning.add_time_ids[0].tolist() == [48, 48, 3, 3, 32, 32]
    call = (noisy, timesteps), conditioning.unet_kwargs()
    with torch.no_grad():
        wanted, theirs = hooked(teacher, list(TAPS.values()), *call[0], **call[1])
        output, ours = hooked(module.student.unet, list(TAPS), *call[0], **call[1])
    v_target = (abar.sqrt() * noise - (1 - abar).sqrt() * latents).float()
    target = v_target if kind.endswith("v_prediction") else noise.float()
    taps = {
        f"student/features/{name}": 0.5 * (3 if name == "up_blocks.1" else 1) * mean_square(one, two)
        for name, one, two in zip(TAPS, ours, theirs, strict=True)
    }
    terms = {
        "student/output": mean_square(output, wanted),
        "student/features": sum(taps.values()),
        "student/task": 0.25 * mean_square(output, target),
    }
    expected = terms | taps | {"student/loss": sum(terms.values())}
    assert lines == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(expected["student/loss"], rel=1e-5)
    assert all(value > 1e-6 for value in expected.values())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_only_in_the_student(base: Base, kind: str) -> None:
    module = moved_away(stage(base(kind)))
    assert module.teacher is not None and module.ema is not None
    loss, _ = logged(module, tiny_batch(4))
    loss.backward()
    for name, parameter in module.student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    for frozen in (module.teacher.module, module.ema.denoiser):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
        assert not frozen.training


class Weights(Callback):
    """The student's weights after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        assert isinstance(pl_module, PrunedUNetDistillation)
        self.seen.append(weights(pl_module.student.unet))


def test_student_and_average_move_and_the_average_is_exported(
    base: Base, shards: Path, tmp_path: Path
) -> None:
    folder = base("sd-v_prediction")
    module, witness = built(stage(folder)), Weights()
    start = weights(module.student.unet)
    assert module.teacher is not None
    frozen = weights(module.teacher.module)
    export = [Export(str(tmp_path / "unet"), dtype="float32"), Export(str(tmp_path / "half"))]
    fit(module, shards, 3, callbacks=[witness, *export])
    assert {key.split(".")[0] for key in module.state_dict()} == {"student", "ema"}
    for name, value in module.teacher.module.named_parameters():
        assert torch.equal(value, frozen[name]), name
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    half = UNet2DConditionModel.from_pretrained(tmp_path / "half", torch_dtype=torch.float16)
    for name, value in saved.named_parameters():
        one, two, three = (seen[name] for seen in witness.seen)
        expected = 0.75**3 * start[name] + 0.25 * (0.75**2 * one + 0.75 * two + three)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(three, two), name
        assert torch.equal(half.get_parameter(name), value.half()), name
    student = StudentGenerator(SGD, weights=str(tmp_path / "unet"))
    student.build(module.family)
    for name, value in student.denoiser.unet.named_parameters():
        assert torch.equal(value, saved.get_parameter(name)), name


def test_nothing_to_learn_where_nothing_is_removed(base: Base) -> None:
    for kind in KINDS:
        loss, lines = logged(built(stage(base(kind), Topology())), tiny_batch(3))
        assert loss.item() == 0
        assert set(lines.values()) == {0.0}
        assert {f"student/features/{side}_blocks.{i}" for side in ("down", "up") for i in range(3)} < set(
            lines
        )


def test_every_optimizer_step_counts_and_accumulation_is_one_batch(base: Base, shards: Path) -> None:
    """Two micro-batches of 4 are the mean of the two, and average once; gradients are clipped by their common norm."""
    folder = base("sd-epsilon")
    module = built(stage(folder))
    reference = copy.deepcopy(module.student)
    plain = built(stage(folder))
    plain.student = reference
    trainer = fit(module, shards, 1, accumulate_grad_batches=2, gradient_clip_val=0.01)
    data = ShardDataModule(str(shards), batch_size=4)
    data.setup()
    batches = iter(data.train_dataloader())
    for _ in range(2):
        (logged(plain, next(batches))[0] / 2).backward()
    gradients = [p.grad for p in reference.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients))
    assert float(trainer.callback_metrics["student/gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    assert norm > 0.01
    for now, before in zip(module.student.parameters(), reference.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(now, before - 0.05 * before.grad * 0.01 / norm, rtol=1e-4, atol=1e-6)
    assert module.ema is not None
    for now, new, before in zip(
        module.ema.parameters(), module.student.parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(now, 0.75 * before + 0.25 * new, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["sd-v_prediction", "sdxl-epsilon"])
def test_resumed_run_equals_the_uninterrupted_one(
    base: Base, shards: Path, tmp_path: Path, kind: str
) -> None:
    def run(name: str, ckpt: Path | None = None) -> dict[str, Any]:
        module = stage(
            base(kind),
            optimizer=partial(torch.optim.AdamW, lr=1e-3),
            lr_scheduler=partial(TrapezoidLR, total_updates=8, rise_updates=2, fall_updates=3),
            caption_dropout=0.3,
        )
        saver = Checkpointing(every_n_student_updates=2, keep=9, folder=str(tmp_path / name))
        settings: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
        # Three steps an epoch: the cut is inside the first, the end inside the second.
        fit(module, shards, 5, ckpt, batch_size=16, callbacks=[saver], **settings)
        contents: dict[str, Any] = torch.load(
            folders.complete_checkpoints(tmp_path / name)[-1] / folders.STATE, weights_only=False
        )
        return contents

    straight = run("straight")
    torch.manual_seed(12345)  # the global state must not matter
    cut = next((tmp_path / "straight").glob("update_00000002-*")) / folders.STATE
    resumed = run("resumed", cut)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        same(straight[part], resumed[part], part)
    assert resumed["global_step"] == 5 and resumed["epoch"] >= 1


def test_control_runs(base: Base) -> None:
    """Without weight transfer: the same network with other weights. Without distillation: no teacher is loaded."""
    folder = base("sd-epsilon")
    usual, fresh = built(stage(folder)), built(stage(folder, weight_transfer=False))
    usual_weights, fresh_weights = weights(usual.student), weights(fresh.student)
    assert usual_weights.keys() == fresh_weights.keys()
    assert not torch.equal(usual_weights["unet.conv_in.weight"], fresh_weights["unet.conv_in.weight"])
    torch.manual_seed(77)
    again, other = (
        built(stage(folder, weight_transfer=False)),
        built(stage(folder, weight_transfer=False, seed=4)),
    )
    assert torch.equal(weights(again.student)["unet.conv_in.weight"], fresh_weights["unet.conv_in.weight"])
    assert not torch.equal(
        weights(other.student)["unet.conv_in.weight"], fresh_weights["unet.conv_in.weight"]
    )
    alone = built(stage(folder, output_distillation=None, feature_distillation=None, task=TaskLoss()))
    assert alone.teacher is None and alone.taps == {}
    _, lines = logged(alone, tiny_batch(3))
    assert set(lines) == {"student/task", "student/loss"}
    no_features = built(stage(folder, feature_distillation=None))
    assert set(logged(no_features, tiny_batch(3))[1]) == {"student/output", "student/loss"}


def test_a_result_is_pruned_further(base: Base, shards: Path, tmp_path: Path) -> None:
    folder = base("sd-epsilon")
    first = stage(folder, Topology(mid_block="none"))
    fit(first, shards, 1, callbacks=[Export(str(tmp_path / "unet"), average=False, dtype="float32")])
    chained = {"weights": str(tmp_path / "unet")}
    with pytest.raises(ValueError, match="has another shape than the base.*name the pairs in feature_dist"):
        built(stage(folder, SMALL, **chained))
    second = built(stage(folder, SMALL, feature_distillation=FeatureDistillation(taps=TAPS), **chained))
    before, after = first.student.unet, second.student.unet
    assert torch.equal(after.conv_in.weight, before.conv_in.weight)
    assert torch.equal(
        after.up_blocks[0].resnets[0].conv2.weight, before.up_blocks[1].resnets[0].conv2.weight
    )
    assert second.teacher is not None
    whole = UNet2DConditionModel.from_pretrained(folder / "unet")
    for name, value in whole.named_parameters():
        assert torch.equal(second.teacher.module.unet.get_parameter(name), value), name
    # Going on with the network as it is.
    same_shape = built(stage(folder, None, feature_distillation=None, **chained))
    assert torch.equal(same_shape.student.unet.conv_in.weight, before.conv_in.weight)
    assert same_shape.student.unet.mid_block is None


def test_gradient_checkpointing_changes_nothing(base: Base) -> None:
    plain, saving = (built(stage(base("sdxl-epsilon"), gradient_checkpointing=on)) for on in (False, True))
    assert saving.student.unet.is_gradient_checkpointing
    for module in (plain, saving):
        logged(module, tiny_batch(3))[0].backward()
    for one, two in zip(plain.student.parameters(), saving.student.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-6)


def test_bf16_teacher_stays_near_and_the_loss_is_float32(base: Base, shards: Path) -> None:
    full, half = (stage(base("sd-epsilon"), real_score_dtype=name) for name in ("float32", "bfloat16"))
    reference = fit(full, shards, 1).callback_metrics
    found = fit(half, shards, 1, precision="bf16-mixed").callback_metrics
    assert half.teacher is not None and half.teacher.dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    for name in ("student/loss", "student/output", "student/features"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], reference[name], rtol=0.05, atol=1e-3)


def test_blocks_with_a_tap_inside_are_not_compiled() -> None:
    unet = prepare_unet(tiny_sd_unet(), False, compile_blocks=True, taps=list(TAPS.values()))
    left = [
        name
        for name, block in unet.named_modules()
        if type(block).__name__ in ("ResnetBlock2D", "Transformer2DModel")
        and block._compiled_call_impl is None
    ]
    assert left == ["down_blocks.1.attentions.0"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_distillation": None}, "output has no objective: set output_distillation, or task"),
        ({"topology": None, "weight_transfer": False}, "weight_transfer: false makes fresh weights"),
        ({"caption_dropout": 1.5}, "caption_dropout is a share"),
        ({"topology": "sdxs-513"}, "there is no preset 'sdxs-513'"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        (
            {"feature_distillation": FeatureDistillation(taps={"mid_block": "mid_block"})},
            "this U-Net has no block 'mid_block'",
        ),
        (
            {"feature_distillation": FeatureDistillation(taps={"up_blocks.0": "up_blocks.9"})},
            r"this U-Net has no block 'up_blocks\.9'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(base: Base, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(stage(base("sd-epsilon"), **settings))


def test_batches_that_are_refused(base: Base) -> None:
    module = built(stage(base("sd-epsilon")))
    with pytest.raises(ValueError, match="trains on latents with 4 channels and got none; point data"):
        module.training_step(replace(tiny_batch(2), latents=None), 0)
    with pytest.raises(ValueError, match=r"got some of shape \(3, 16, 16\)"):
        module.training_step(replace(tiny_batch(2), latents=torch.zeros(2, 3, 16, 16)), 0)


def test_a_full_disk_leaves_the_earlier_export(base: Base, shards: Path, tmp_path: Path) -> None:
    module = stage(base("sd-epsilon"))
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with pytest.raises(
        CheckpointNotWritten, match="the unet could not be written to.*file exists.*--trainer.max_steps 2"
    ):
        fit(module, shards, 1, callbacks=[Export(str(blocked / "unet"))])
    assert blocked.read_text() == "no folder"


def test_weights_that_the_exports_dtype_cannot_hold_leave_the_earlier_export(
    base: Base, shards: Path, tmp_path: Path
) -> None:
    class Grown(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for parameter in pl_module.parameters():
                parameter.data.fill_(1e6)

    module = stage(base("sd-epsilon"))
    message = (
        r"could not be written to .*has NaN, or values that float16 cannot hold; .*another folder or dtype"
    )
    with pytest.raises(CheckpointNotWritten, match=message):
        fit(module, shards, 1, callbacks=[Grown(), Export(str(tmp_path / "unet"), dtype="float16")])
    assert not (tmp_path / "unet").exists()


def command(folder: Path, run: str, **trainer: Any) -> dict[str, Any]:
    """The stage as the command line reads it, for three steps of two micro-batches of 4 in all."""
    config = tiny_config(folder)
    config["model"] = {
        "class_path": "sdxs_lightning.stages.prune_distill.PrunedUNetDistillation",
        "init_args": {
            "family": config["model"]["init_args"]["family"],
            "topology": {"stages": [{}, {"down_depths": 1}], "mid_block": "none"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
            "feature_distillation": {"tap_weights": {"up_blocks.1": 0.5, "down_blocks.0": None}},
            "task": {"weight": 0.5},
            "ema_decay": 0.5,
        },
    }
    config["data"]["init_args"]["batch_size"] = 4 // trainer.get("devices", 1)
    settings = {"max_steps": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    config["trainer"] |= settings | trainer | {"default_root_dir": str(folder / run)}
    config["trainer"]["callbacks"].append(
        {"class_path": "sdxs_lightning.callbacks.export.Export", "init_args": {"dtype": "float32"}}
    )
    return config


@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(tmp_path_factory: pytest.TempPathFactory, strategy: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "miniaturise"
    folder.mkdir(exist_ok=True)
    if not (folder / "alone").exists():
        assert main(["--config", str(write_config(folder / "alone.yaml", command(folder, "alone")))]) == 0
    sharded = {"class_path": "sdxs_lightning.training.sharding.ShardedNetworks"}
    config = command(folder, strategy, devices=2, strategy="ddp" if strategy == "ddp" else sharded)
    ended = train_in_ranks(["--config", str(write_config(folder / f"{strategy}.yaml", config))], folder)
    assert [rank.code for rank in ended] == [0, 0], ended
    alone, together = (
        UNet2DConditionModel.from_pretrained(folder / run / "unet") for run in ("alone", strategy)
    )
    start = built(stage(folder / "sd-epsilon", seed=0)).student.unet
    for name, value in alone.named_parameters():
        torch.testing.assert_close(together.get_parameter(name), value, rtol=0, atol=1e-6)
        assert not torch.equal(value, start.get_parameter(name)), name
    checkpoint = folders.complete_checkpoints(folder / strategy / "checkpoints")[-1]
    assert (checkpoint / folders.STATE).is_dir() == (strategy == "fsdp2")
