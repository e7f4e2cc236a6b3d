"""Two processes with adapters reach what one reaches, under DDP and under FSDP2; checkpoints and exports included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor, Shard

from sdxs_lightning.callbacks.export import Export
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.lora import LoRA, each_merged, lora_parameters, merged_weights
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.ranks.distributed_worker import STRATEGIES, SaveAfter, arrived, strategy_of
from tests.helpers.ranks.processes import in_ranks
from tests.helpers.rounding import ADAM_EPS, tolerance_of
from tests.helpers.tiny_distillation import built, distillation, fit

pytestmark = pytest.mark.timeout(600)

ITERATIONS, SAVED_AFTER = 5, 3
LR = 1e-3
GRADIENT_CLIP_NORM = 1.0
TARGETS = ("to_q", "ff.net.2", "conv1", "conv_shortcut")


def module_for(base: Path) -> OneStepDistillation:
    """Two iterations of warm-up, whose pairs the shared base samples, then the student on every second iteration."""
    adamw = partial(torch.optim.AdamW, lr=LR, eps=ADAM_EPS)
    return distillation(
        base,
        optimizer=adamw,
        student=StudentGenerator(adamw, lora=LoRA(rank=2, targets=TARGETS)),
        fake_score=FakeScore(adamw, lora=LoRA(rank=3, targets=TARGETS)),
        update_schedule=UpdateSchedule(
            max_student_updates=99, fake_score_updates_per_student_update=2, warmup_updates=2
        ),
        pairs=PairSettings(count=7, sampler_steps=2, sampler_batch_size=4),
        regression=Regression(),
        gradient_clip_norm=GRADIENT_CLIP_NORM,
    )


def train(base: Path, shards: Path, out: Path) -> None:
    """In each of two processes: a run that exports, and its second half once more from the checkpoint."""
    for strategy in STRATEGIES:
        two: dict[str, Any] = {"batch_size": 2, "devices": 2}
        module, save = module_for(base), SaveAfter(SAVED_AFTER, out / f"{strategy}.ckpt")
        trainer = fit(module, shards, ITERATIONS, callbacks=[save], strategy=strategy_of(strategy), **two)
        Export(str(out / strategy), dtype="float32").on_train_end(trainer, module)
        straight = arrived(module)
        resumed = module_for(base)
        fit(resumed, shards, ITERATIONS, ckpt_path=str(save.path), strategy=strategy_of(strategy), **two)
        results = {
            "straight": straight,
            "resumed": arrived(resumed),
            "sent": save.counted.sent,
            "sharded": all(isinstance(p, DTensor) for p in module.parameters()),
            "merged": merged_shards(module),
        }
        if trainer.is_global_zero:
            torch.save(results, out / f"{strategy}.pt")


def merged_shards(module: OneStepDistillation) -> dict[str, torch.Tensor]:
    """The student's weights with its adapters, as a fake score is aligned with: each rank merges its own shards."""
    unet, found = module.student.denoiser.unet, {}
    weights = dict(unet.named_parameters())
    for name, value in each_merged(unet, weights):
        if isinstance(value, DTensor):
            assert value.placements == weights.get(name, value).placements == (Shard(0),), name
            value = value.full_tensor()
        found[name] = value.detach()
    return found


@pytest.fixture(scope="module")
def two_processes(
    base: Callable[[str], Path], shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with the results of the pair; it runs once for all tests here."""
    out = tmp_path_factory.mktemp("two")
    ended = in_ranks(train, (base("sd-v_prediction"), shards, out), out)
    assert [rank.code for rank in ended] == [0, 0], [rank.said[-3000:] for rank in ended]
    return out


@pytest.fixture(scope="module")
def one_process(base: Callable[[str], Path], shards: Path) -> OneStepDistillation:
    """A single process on the same global batches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of the two: the order of sums depends on it
    module = module_for(base("sd-v_prediction"))
    fit(module, shards, ITERATIONS, batch_size=4)
    torch.set_num_threads(threads)
    return module


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_are_one(two_processes: Path, one_process: OneStepDistillation, strategy: str) -> None:
    results = torch.load(two_processes / f"{strategy}.pt")
    assert results["sharded"] == (strategy == "fsdp2")
    expected = arrived(one_process)
    start = arrived(built(module_for(one_process.family.folder)))
    assert results["straight"].keys() == results["resumed"].keys() == expected.keys()
    moved = 0.0
    for name, value in expected.items():
        adapter = ".lora_" in name.replace("/", ".")
        learns = adapter or name.startswith("discriminator")
        atol = tolerance_of(value, "adam", LR, ITERATIONS, GRADIENT_CLIP_NORM) if learns else 0.0
        torch.testing.assert_close(results["straight"][name], value, rtol=0, atol=atol, msg=name)
        assert torch.equal(results["resumed"][name], results["straight"][name]), name
        if ".lora_B." in name:
            moved = max(moved, float((value - start[name]).abs().max()) / atol)
    assert moved > 10, "the bound would hide a wrong update"
    unet = one_process.student.denoiser.unet
    for name, value in merged_weights(unet, unet.state_dict()).items():
        atol = tolerance_of(value, "adam", LR, ITERATIONS, GRADIENT_CLIP_NORM)
        torch.testing.assert_close(results["merged"].pop(name), value, rtol=0, atol=atol, msg=name)
    assert not results["merged"]
    assert one_process.ema is not None
    with one_process.ema.applied():
        unet = one_process.ema.denoiser.unet
        averaged = merged_weights(unet, {name: value.clone() for name, value in unet.state_dict().items()})
    exported = load_file(two_processes / strategy / "unet" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == averaged.keys()
    for name, value in exported.items():
        atol = tolerance_of(averaged[name], "adam", LR, ITERATIONS, GRADIENT_CLIP_NORM)
        torch.testing.assert_close(value, averaged[name], rtol=0, atol=atol, msg=name)


def test_checkpoints_are_small_and_only_adapters_travel(
    two_processes: Path, one_process: OneStepDistillation
) -> None:
    state = torch.load(two_processes / "ddp.ckpt", weights_only=False)["state_dict"]
    parts = {name.split(".")[0]: 0 for name in state}
    for name, value in state.items():
        parts[name.split(".")[0]] += value.numel()
    sizes = {
        role: sum(p.numel() for p in (lora_parameters(network) or dict(network.named_parameters())).values())
        for role, network in one_process.networks.items()
    }
    assert parts == sizes | {"ema": sizes["student"]}
    sharded = FileSystemReader(two_processes / "fsdp2.ckpt").read_metadata().state_dict_metadata
    assert {name for name in sharded if name.startswith("state_dict.")} == {
        f"state_dict.{name}" for name in state
    }
    sent = torch.load(two_processes / "ddp.pt")["sent"]
    others = [sizes["fake_score"] + sizes["discriminator"]]
    student = [sizes["student"]]
    both = student + others
    iterations = [student, student, both, others, both]
    assert sent == [size for iteration in iterations for size in iteration]
