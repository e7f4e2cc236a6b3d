"""One, two and four processes get the same numbers, with uneven shares, an empty rank and images that two ranks have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.ranks.metric_ranks import COUNT, measure_in_ranks, measured
from tests.helpers.ranks.processes import in_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    ended = in_ranks(measure_in_ranks, (out,), out, count=4, seconds=200)
    assert [rank.code for rank in ended] == [0] * 4, [rank.said[-1500:] for rank in ended]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("case", "many"), [("four", COUNT), ("two", COUNT), ("few", 30)])
def test_every_rank_finds_what_one_process_finds(ranks: list[dict[str, Any]], case: str, many: int) -> None:
    alone = measured(0, 1, batch_size=11, many=many)
    held = 0
    for rank in ranks if case != "two" else ranks[:2]:
        found = rank[case]
        held += found.pop("rows-after")
        for name, expected in alone.items():
            if not name.endswith("-after"):
                wanted = dict(expected) if isinstance(expected, dict) else expected
                if isinstance(wanted, dict):
                    parts = list(wanted.pop("left_out", ()))
                    assert found[name].pop("left_out", []) == pytest.approx(parts, rel=1e-9, abs=1e-12), name
                assert found[name] == pytest.approx(wanted, rel=1e-9, abs=1e-12), name
    # Afterwards each rank has its own images again: the shared ones are counted on both of their ranks.
    shares = {"four": many + 3, "two": many, "few": many + 3}
    assert held == shares[case]
