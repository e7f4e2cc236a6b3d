"""Prompts for grids."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.prepare.pairs.prompts import grid_prompts
from data.shards.writer import ShardWriter
from data.toy.world import captions
from sdxs_lightning.core.errors import UserError


def test_prompts_of_a_grid_are_spread_over_the_set(tmp_path: Path) -> None:
    lines = [f"prompt {i}" for i in range(10)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    with ShardWriter(tmp_path / "set", samples_per_shard=4) as writer:
        for line in lines:
            writer.write({"txt": line})
    for named in (tmp_path / "prompts.txt", tmp_path / "set"):
        assert grid_prompts(str(named), 4) == [lines[i] for i in (0, 2, 5, 7)]
        assert grid_prompts(str(named), 10) == lines
    assert grid_prompts("toy:val", 3) == captions("val", 3, 0)
    with pytest.raises(UserError, match="holds 10 prompts, fewer than the 11 of the grid"):
        grid_prompts(str(tmp_path / "set"), 11)
