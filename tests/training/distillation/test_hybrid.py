"""Four processes as 2 replicas of 2 shards (HSDP): DDP's weights, resumes in other layouts, and what travels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.memory_plan.hardware import read_hardware
from sdxs_lightning.memory_plan.planner import MemoryPlan, Planner
from sdxs_lightning.training.sharding import ShardedNetworks, mesh_shape
from tests.helpers.planned import ONE_CPU
from tests.helpers.ranks.distributed_worker import arrived
from tests.helpers.ranks.hybrid_worker import MICRO_BATCHES, Sent, adapters, controlnet, gan, train_everything
from tests.helpers.ranks.processes import in_ranks
from tests.helpers.tiny_distillation import built

pytestmark = pytest.mark.timeout(600)

SHARDED = "sdxs_lightning.training.sharding.ShardedNetworks"
SHARD_GROUPS, REPLICATE_GROUPS = [(0, 1), (2, 3)], [(0, 2), (1, 3)]
Results = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(
    base: Callable[[str], Path], shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Results]:
    """What each of the four saw; they run once for all tests here."""
    out = tmp_path_factory.mktemp("four")
    ended = in_ranks(train_everything, (base("sd-v_prediction"), shards, out), out, count=4)
    assert [rank.code for rank in ended] == [0] * 4, [rank.said[-3000:] for rank in ended]
    return [torch.load(out / f"rank_{rank}.pt", weights_only=False) for rank in range(4)]


def plan_of(stage: Any, replicate: int | None, contents: list[str], accumulate: int) -> MemoryPlan:
    """The plan for four processes, as DDP or with so many replicas."""
    init_args = {"data_parallel_replicate": replicate, "data_parallel_shard": "auto"}
    strategy = "ddp" if replicate is None else {"class_path": SHARDED, "init_args": init_args}
    hardware = read_hardware(ONE_CPU | {"devices": 4, "strategy": strategy}, 16)
    return Planner(stage, hardware, 1, contents, accumulate).plan()


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


@pytest.mark.parametrize("case", ["hsdp gan", "fsdp2 from hsdp"])
def test_ten_iterations_are_ddps(ranks: list[Results], base: Callable[[str], Path], case: str) -> None:
    expected = ranks[0]["ddp gan"]["weights"]
    start = arrived(built(gan(base("sd-v_prediction"))))
    assert farthest(start, expected) > 1e-3
    for results in ranks:  # replicas that drifted apart would differ between ranks
        assert farthest(results[case]["weights"], expected) < 1e-6


@pytest.mark.parametrize("case", ["controlnet", "adapters"])
def test_a_controlnet_and_adapters_are_ddps(ranks: list[Results], case: str) -> None:
    expected = ranks[0][f"ddp {case}"]["weights"]
    for results in ranks:
        found = results[f"hsdp {case}"]["weights"]
        # Sharding ends the sharing of frozen weights with the average, whose names are then listed too.
        assert expected.keys() <= found.keys()
        assert farthest({name: found[name] for name in expected}, expected) < 1e-6


def test_every_network_is_sharded_in_a_group_and_replicated_across(ranks: list[Results]) -> None:
    placements = ranks[0]["placements"]
    assert placements.keys() == {"student", "fake_score", "discriminator", "ema", "real_score"}
    for role, found in placements.items():
        assert found == {"(Replicate(), Shard(dim=0))"}, role


@pytest.mark.parametrize("case", ["gan", "controlnet", "adapters"])
def test_norms_before_clipping_are_those_of_whole_gradients(ranks: list[Results], case: str) -> None:
    for results in ranks:  # the norms of single terms are those of each rank's own samples
        expected = results[f"ddp {case}"]["norms"]
        assert max(norm for one in expected for norm in one.values()) > 0
        for one, other in zip(results[f"hsdp {case}"]["norms"], expected, strict=True):
            assert one == pytest.approx(other, rel=1e-4)


def elements(sent: list[Sent], operation: str) -> int:
    """Elements given to all collectives of a kind."""
    return sum(one.elements for one in sent if one.operation == operation)


@pytest.mark.parametrize("case", ["gan", "controlnet", "adapters"])
def test_only_gradients_travel_between_the_groups_and_the_plan_counts_them(
    ranks: list[Results], base: Callable[[str], Path], case: str
) -> None:
    stage: Any = {"gan": gan, "controlnet": controlnet, "adapters": adapters}[case](base("sd-v_prediction"))
    contents = ["latents"] if case == "gan" else ["latents", "control_images"]
    traffic = plan_of(stage, 2, contents, 1 if case == "gan" else MICRO_BATCHES).traffic
    sent = ranks[0][f"hsdp {case}"]["sent"]
    between = [one for one in sent if one.members in REPLICATE_GROUPS]
    within = [one for one in sent if one.members in SHARD_GROUPS]
    rest = [one for one in sent if one not in between and one not in within]
    assert {one.operation for one in between} == {"allreduce_"}
    # All float32. Micro-batches before the last send nothing between the groups.
    assert elements(between, "allreduce_") == traffic.reduced / 4 > 0
    assert elements(within, "_reduce_scatter_base_") == traffic.scattered / 4
    assert elements(within, "_allgather_base_") == pytest.approx(traffic.gathered / 4, rel=0.07)
    # Besides these, scalars: flags of the run among all, and the norm of every parameter within a group.
    assert {one.members for one in rest} <= {(0, 1, 2, 3)}
    scalars = [one for one in within if "_base_" not in one.operation]
    assert sum(one.elements for one in rest + scalars) < 1000


def test_gradients_of_ddp_leave_during_the_backward_pass(
    ranks: list[Results], base: Callable[[str], Path]
) -> None:
    traffic = plan_of(gan(base("sd-v_prediction")), None, ["latents"], 1).traffic
    sent = [one for one in ranks[0]["ddp gan"]["sent"] if one.elements > 100]
    assert {one.operation for one in sent} == {"allreduce_"}
    assert elements(sent, "allreduce_") == traffic.averaged / 4
    overlapped, everything = ranks[0]["overlap"]
    share = overlapped / everything
    print(f"{share:.0%} of the gradients were sent before their backward pass ended")
    # The first of the passes of the student and of the others find out the order.
    assert share > 0.5


@pytest.mark.parametrize(
    ("sizes", "processes", "machines", "shape"),
    [
        ((1, "auto"), 8, 1, (1, 8)),
        (("auto", "auto"), 32, 4, (4, 8)),
        (("auto", "auto"), 8, 1, (1, 8)),
        (("auto", 4), 32, 4, (8, 4)),
        ((2, "auto"), 32, 4, (2, 16)),
        ((2, 4), 8, 1, (2, 4)),
        ((1, "auto"), 1, 1, (1, 1)),
    ],
)
def test_sizes_of_the_mesh(
    sizes: tuple[Any, Any], processes: int, machines: int, shape: tuple[int, int]
) -> None:
    assert mesh_shape(*sizes, processes, machines) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (3, "auto"),
            "data_parallel_replicate 3 and data_parallel_shard auto, and the run 8 processes on 2 machine",
        ),
        (("auto", 5), "data_parallel_replicate auto and data_parallel_shard 5"),
        ((2, 2), "the two multiplied must be the number of processes"),
        ((0, "auto"), "data_parallel_replicate 0"),
        ((-2, -4), "data_parallel_replicate -2"),
        ((16, "auto"), "change one of them and leave the other 'auto'"),
        ((8, "auto"), "leaves nothing to shard among 8 processes .* configs/hardware/ddp.yaml"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[Any, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mesh_shape(*sizes, 8, 2)
    strategy = {"data_parallel_replicate": sizes[0], "data_parallel_shard": sizes[1]}
    trainer = {"devices": 4, "num_nodes": 2, "strategy": {"class_path": SHARDED, "init_args": strategy}}
    with pytest.raises(UserError, match=message):
        read_hardware(ONE_CPU | trainer)
    with pytest.raises(UserError, match=message):
        Trainer(accelerator="cpu", devices=4, num_nodes=2, strategy=ShardedNetworks(*sizes))


def test_the_plan_of_replicas_has_the_memory_of_one_and_less_traffic_across(
    base: Callable[[str], Path],
) -> None:
    planner = Planner(gan(base("sd-v_prediction")), read_hardware(ONE_CPU), 1)

    def plan(devices: int, nodes: int, replicate: int) -> MemoryPlan:
        strategy = {"class_path": SHARDED, "init_args": {"data_parallel_replicate": replicate}}
        return planner.plan(
            read_hardware(ONE_CPU | {"devices": devices, "num_nodes": nodes, "strategy": strategy}, 16)
        )

    machine, replicated, sharded = plan(4, 1, 1), plan(4, 2, 2), plan(4, 2, 1)
    assert replicated.hardware.layout == "hsdp on 2 x 4" and sharded.hardware.layout == "fsdp2 on 8"
    assert replicated.needed() == machine.needed() > sharded.needed()
    assert replicated.traffic.sent_within == machine.traffic.sent_within
    assert machine.traffic.sent_across == sharded.traffic.sent_across == 0
    assert replicated.traffic.sent_across == replicated.traffic.reduced  # a ring of two sends its whole input
    assert 4 * replicated.traffic.sent_across < sharded.traffic.sent_within
