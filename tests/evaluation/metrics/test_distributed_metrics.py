"""Two processes measure, draw and report as one does, under DDP and with every network sharded (FSDP2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.images.generate import rank_batches
from evaluation.protocols.protocols import PROTOCOLS
from tests.helpers.ranks.evaluation_worker import COUNT, UPDATES, measure_everything, measured, scores
from tests.helpers.ranks.processes import in_ranks


@pytest.fixture(scope="module")
def two_processes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what both ranks saw under each strategy."""
    out = tmp_path_factory.mktemp("two")
    ended = in_ranks(measure_everything, (world, out), out)
    assert [rank.code for rank in ended] == [0, 0], ended[0].said[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a single process measures."""
    with pytest.MonkeyPatch.context() as patch:
        for name, protocol in list(PROTOCOLS.items()):
            patch.setitem(PROTOCOLS, name, protocol)  # measured() replaces them; put them back afterwards
        return measured(world, tmp_path_factory.mktemp("alone"))


@pytest.mark.timeout(700)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_measure_what_one_does(
    alone: dict[str, Any], two_processes: Path, strategy: str
) -> None:
    ranks: list[dict[str, Any]] = [
        json.loads((two_processes / f"{strategy}-{rank}.json").read_text()) for rank in range(2)
    ]
    assert ranks[0]["fid"] == ranks[1]["fid"]
    assert len(ranks[0]["fid"]) == UPDATES + 1
    # Grey levels may tip over: rounding differs between batches of 2 and of 1.
    assert ranks[0]["fid"] == pytest.approx(alone["fid"], rel=1e-3)
    assert ranks[0]["caption_accuracy"] == alone["caption_accuracy"]
    for key in ("student", "student_before", "real_vs_real"):
        assert ranks[0]["report"][key]["fid"] == pytest.approx(alone["report"][key]["fid"], rel=1e-3)
    assert (two_processes / strategy / "samples.png").exists()
    assert len(list((two_processes / strategy / "samples").iterdir())) == UPDATES + 1


@pytest.mark.timeout(700)
def test_metrics_of_two_processes_equal_those_of_one(world: Path, two_processes: Path) -> None:
    fid, score, _ = scores(world / "clip", 0, 1, batch_size=COUNT)
    seen = 0
    for rank in range(2):
        rank_fid, rank_score, rank_count = json.loads((two_processes / f"scores-{rank}.json").read_text())
        # Features differ by float32 rounding between batch sizes; the sums themselves are float64.
        assert rank_fid == pytest.approx(fid, rel=1e-5)
        assert rank_score == pytest.approx(score, rel=1e-5)
        seen += rank_count
    assert seen == COUNT  # after compute the states are the rank's own again


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_sample_once_and_as_many_batches_on_every_rank(world_size: int, batch_size: int) -> None:
    shares = [list(rank_batches(5, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(sample_ids) >= 1 for share in shares for sample_ids, _ in share)
    counted = [
        i for share in shares for sample_ids, counting in share for i in sample_ids[:counting].tolist()
    ]
    assert sorted(counted) == [0, 1, 2, 3, 4]
