"""The memory plan against arithmetic and against what autograd really keeps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.memory_plan.as_on_cuda import AsOnCuda
from sdxs_lightning.memory_plan.hardware import GIB, read_hardware
from sdxs_lightning.memory_plan.live_bytes import LiveBytes, ShapeMemory
from sdxs_lightning.memory_plan.network_bytes import network_bytes, state_per_element, update_workspace
from sdxs_lightning.memory_plan.planner import MemoryPlan, Planner
from sdxs_lightning.memory_plan.step_memory import BatchShape, run_step
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.stages.teacher import DenoisingTraining
from sdxs_lightning.training.plannable import PlannedNetwork
from sdxs_lightning.training.sharding import blocks_of
from tests.helpers.planned import ADAMW, ONE_CPU, ONE_GPU, hardware, teacher
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch, tiny_sd_unet, tiny_sdxl_unet
from tests.helpers.tiny_distillation import distillation

SCHEDULE = 3 * 1000 * 4
"""Buffers of a noise schedule, float32 always."""


# ------------------------------------------------------------------------------------------------ exact arithmetic


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_element"),
    [
        (ADAMW, 8),
        (partial(torch.optim.AdamW, lr=1e-3), 8),
        (partial(torch.optim.SGD, lr=1e-3, momentum=0.9), 4),
        (partial(torch.optim.SGD, lr=1e-3), 0),
    ],
)
def test_bytes_of_a_network_and_of_its_optimizers_state(optimizer: Any, bytes_per_element: int) -> None:
    unet = tiny_sd_unet()
    count = sum(parameter.numel() for parameter in unet.parameters())
    result = network_bytes(PlannedNetwork("student", unet, "trained", optimizer), shards=1)
    assert (result.parameters, result.trainable) == (count, count)
    assert (result.weights, result.gradients) == (4 * count, 4 * count)
    # What the optimizer really holds after a step on the network itself.
    real = optimizer(unet.parameters())
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real.step()
    held = [value for entry in real.state.values() for value in entry.values() if isinstance(value, Tensor)]
    assert sum(value.nbytes for value in held if value.ndim) == result.optimizer == bytes_per_element * count


def test_masters_in_bfloat16_have_states_in_bfloat16(configs: dict[str, Path]) -> None:
    planner = Planner(distillation(configs["sd"], optimizer=ADAMW), hardware(precision="bf16-true"), 4)
    rows = {one.name: network_bytes(one, 1) for one in planner.networks}
    student, real = rows["student"], rows["real_score"]
    assert (
        student.weights == 2 * student.parameters + SCHEDULE and student.gradients == 2 * student.parameters
    )
    assert student.optimizer == 4 * student.parameters
    assert real.weights == 4 * real.parameters + SCHEDULE  # frozen networks follow real_score_dtype


@pytest.mark.parametrize("shards", [2, 8])
@pytest.mark.parametrize("unet", [tiny_sd_unet(), tiny_sdxl_unet()], ids=["sd", "sdxl"])
def test_a_sharded_network_has_the_first_chunk_of_every_tensor(unet: nn.Module, shards: int) -> None:
    result = network_bytes(PlannedNetwork("student", unet, "trained", ADAMW), shards)
    mine = sum(parameter.chunk(shards)[0].numel() for parameter in unet.parameters())
    assert (result.weights, result.gradients, result.optimizer) == (4 * mine, 4 * mine, 8 * mine)
    unsharded = network_bytes(PlannedNetwork("student", unet, "trained", ADAMW, sharded=False), shards)
    assert unsharded == network_bytes(PlannedNetwork("student", unet, "trained", ADAMW), 1)


def test_roles_of_a_distillation(planned: MemoryPlan) -> None:
    found = {one.name: one for one in planned.networks}
    roles = {"student": "trained", "fake_score": "trained", "discriminator": "trained", "ema": "averaged"}
    roles |= dict.fromkeys(("real_score", "text_encoder", "text_encoder_2"), "frozen")
    assert {name: one.role for name, one in found.items()} == roles
    count = sum(parameter.numel() for parameter in tiny_sdxl_unet().parameters())
    assert found["ema"].weights == 4 * count + SCHEDULE
    assert found["ema"].gradients == found["ema"].optimizer == 0
    assert found["real_score"].weights == 2 * count + SCHEDULE
    assert found["fake_score"].trainable == count and found["real_score"].trainable == 0
    assert planned.buffers == {"CUDA context": 3 * GIB // 4}
    sizes = [one.weights + one.optimizer for one in planned.networks]
    assert planned.needed() == sum(sizes) + 3 * GIB // 4 + planned.step.peak(16).total


def test_ddp_has_buckets_of_every_trained_network(planner: Planner, planned: MemoryPlan) -> None:
    trained = sum(one.trainable for one in planned.networks)
    buffers = planner._buffers(hardware(devices=4, strategy="ddp"))
    assert buffers == {"DDP buckets": 4 * trained, "CUDA context, NCCL": 7 * GIB // 4}


@pytest.mark.parametrize(
    ("trainer", "processes", "strategy", "shards"),
    [
        ({"devices": 1}, 1, "one device", 1),
        ({"devices": "2"}, 2, "ddp", 1),
        ({"devices": [0, 1, 3], "strategy": "ddp"}, 3, "ddp", 1),
        ({"devices": 4, "num_nodes": 2, "strategy": "ddp"}, 8, "ddp", 1),
        (
            {
                "devices": 8,
                "num_nodes": 4,
                "strategy": {"class_path": "sdxs_lightning.training.sharding.ShardedNetworks"},
            },
            32,
            "fsdp2",
            32,
        ),
        (
            {
                "devices": 8,
                "num_nodes": 4,
                "strategy": {
                    "class_path": "sdxs_lightning.training.sharding.ShardedNetworks",
                    "init_args": {"data_parallel_replicate": "auto", "data_parallel_shard": "auto"},
                },
            },
            32,
            "hsdp",
            8,
        ),
    ],
)
def test_the_machine_is_read_from_the_trainer_section(
    trainer: dict[str, Any], processes: int, strategy: str, shards: int
) -> None:
    found = read_hardware(ONE_GPU | trainer, 40)
    assert (found.processes, found.strategy, found.shards) == (processes, strategy, shards)
    assert found.memory == 40 * GIB and found.assumed is None
    assert found.autocast == torch.bfloat16 and found.weights is None


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"strategy": "deepspeed"}, "trainer.strategy 'deepspeed'; it knows auto, ddp and"),
        ({"precision": "transformer-engine"}, "trainer.precision 'transformer-engine'; it knows 32-true"),
    ],
)
def test_an_unknown_machine_is_refused(trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hardware(**trainer)


# ---------------------------------------------------------------------------------------------- what a step keeps


def kept_on_cpu(stage: DenoisingTraining, batch_size: int) -> int:
    """Bytes of the storages that autograd keeps between forward and backward of a real step; weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = stage.training_step(tiny_batch(batch_size), 0)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl-epsilon"])
def test_what_the_forward_pass_keeps_is_what_autograd_keeps(
    kind: str, folder: Path, configs: dict[str, Path]
) -> None:
    plan = Planner(teacher(configs[kind.partition("-")[0]]), read_hardware(ONE_CPU), 4).plan()
    real = teacher(folder / "whole" / kind)
    for batch_size in (2, 8):
        counted = plan.step.kept_bytes(batch_size)["training step"]
        # The batch itself is counted too.
        assert counted == pytest.approx(kept_on_cpu(real, batch_size), rel=0.01)


def test_one_profile_holds_for_every_batch_size(planner: Planner, planned: MemoryPlan) -> None:
    profile, size = planned.step, 16
    batch = BatchShape(LATENT_SHAPE, accumulate=2)
    workspaces = {"student": 0, "fake_score": 0, "discriminator": 0}
    counted = run_step(planner.stage, planner.networks, hardware(), batch, workspaces, ShapeMemory(), size)
    peaks = [max(live for live, _ in line.live) for line in counted]
    assert [moment.total for moment in profile.phase_peaks(size)] == peaks
    assert list(profile.kept_bytes(size).values()) == [line.kept for line in counted]
    # Activations grow in proportion; gradients and autocast's copies of weights do not grow at all.
    kept = [profile.kept_bytes(size)["student's iteration"] for size in (1, 2, 3)]
    assert kept[2] - kept[1] == kept[1] - kept[0] > 0


def test_gradient_checkpointing_keeps_less(planned: MemoryPlan, configs: dict[str, Path]) -> None:
    networks: dict[str, Any] = {
        "student": StudentGenerator(ADAMW, gradient_checkpointing=True),
        "fake_score": FakeScore(ADAMW, gradient_checkpointing=True),
    }
    stage = distillation(configs["sdxl"], optimizer=ADAMW, accumulate_grad_batches=2, **networks)
    checkpointed = Planner(stage, hardware(), 16).plan()
    assert planned.checkpointed == () and checkpointed.checkpointed == ("student", "fake_score")
    for phase in ("student's iteration", "iteration of fake score and discriminator"):
        assert checkpointed.step.kept_bytes(16)[phase] < 0.5 * planned.step.kept_bytes(16)[phase]
    assert checkpointed.step.peak(16).activations < planned.step.peak(16).activations
    assert checkpointed.step.peak(16).gradients <= planned.step.phase_peaks(16)[0].gradients


def test_mixed_precision_keeps_a_copy_of_every_weight_that_is_multiplied(configs: dict[str, Path]) -> None:
    plan = Planner(teacher(configs["sd"]), hardware(), 4).plan()
    multiplied = [m for m in tiny_sd_unet().modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    copies = 2 * sum(parameter.numel() for module in multiplied for parameter in module.parameters())
    # What does not grow with the batch; a few scalars beside the copies.
    assert plan.step.kept[0][0] == pytest.approx(copies, abs=4096)


def test_attention_keeps_no_matrix_of_rows_by_rows() -> None:
    heads, rows, width = 4, 1000, 16
    query, key, value = (torch.empty(1, heads, rows, width, device="meta") for _ in range(3))
    query.requires_grad_()
    live = LiveBytes()
    with live, AsOnCuda():
        live.line.clear()
        before = live.live
        output = nn.functional.scaled_dot_product_attention(query, key, value)
    assert live.live - before == 4 * heads * rows * (width + 1)  # the output, and one number per row
    assert output.transpose(1, 2).reshape(1, rows, -1).untyped_storage() is output.untyped_storage()


def test_live_bytes_follow_storages() -> None:
    live = LiveBytes()
    with live:
        kept = torch.empty(1000, device="meta")
        view = kept.view(10, 100)
        assert live.live == 4000
        dropped = kept + 1
        assert live.live == 8000
        dropped.mul_(2)
        del dropped
        assert live.live == 4000
        del kept
        assert live.live == 4000  # the view holds it
        del view
    assert live.live == 0
    assert max(total for total, _ in live.line) == 8000


def test_fsdp2_shares_gradients_and_copies_no_weights(planner: Planner, planned: MemoryPlan) -> None:
    sharded = {"class_path": "sdxs_lightning.training.sharding.ShardedNetworks"}
    plan = planner.plan(hardware(devices=8, strategy=sharded))
    for one in plan, planned:
        assert one.step.peak(16).gradients == sum(network.gradients for network in one.networks)
    # The gathered weights are bfloat16 already, and counted with the gathering.
    assert plan.step.kept[0][0] < 0.1 * planned.step.kept[0][0]
    # At least a block of a trained network gathered in bfloat16, with its gradients there and in float32.
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks_of(tiny_sdxl_unet()))
    assert (2 + 2 + 4) * largest < plan.buffers["FSDP2 gathering"] < 2 * (2 + 2 + 2 + 4 + 4) * largest
    learning = [p for one in planner.networks if one.role == "trained" for p in one.module.parameters()]
    assert {p.dtype for p in learning} == {torch.float32}  # as before


def test_optimizers_that_step_all_tensors_together_need_a_copy() -> None:
    unet = tiny_sd_unet()
    count = sum(parameter.numel() for parameter in unet.parameters())
    expected = {ADAMW: 0, partial(torch.optim.AdamW, lr=1e-3): 4 * count}
    for optimizer, workspace in expected.items():
        network = PlannedNetwork("student", unet, "trained", optimizer)
        assert update_workspace(network, 1) == workspace
        assert state_per_element(network) == 8
