"""The benchmark of start-up times."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.benchmarks.start_up import BASELINE, TimedCommand, commands, measure, table
from sdxs_lightning.core.errors import UserError


def test_ratios_are_to_the_baseline() -> None:
    sleep = "import time; time.sleep({})"
    (rows,) = measure(
        {
            BASELINE: TimedCommand(("-c", sleep.format(0.2))),
            "slow": TimedCommand(("-c", sleep.format(1.0)), 0, 1.5),
            "refused": TimedCommand(("-c", "raise SystemExit(2)"), 2, 5.0),
        },
        repeats=1,
    )
    assert rows[BASELINE]["ratio"] == 1.0 and rows["slow"]["ratio"] > 2 and rows["slow"]["seconds"] > 1
    marked = [line for line in table(rows).splitlines() if line.endswith("above")]
    assert [line.split()[0] for line in marked] == ["slow"]


def test_another_exit_code_is_an_error() -> None:
    code = "import sys; print('the reason', file=sys.stderr); sys.exit(3)"
    with pytest.raises(UserError, match="'bad' ended with exit code 3 instead of 0: the reason"):
        next(measure({"bad": TimedCommand(("-c", code))}, repeats=1))


def test_every_command_has_a_goal_but_the_imports() -> None:
    timed = commands(Path("shards"))
    assert [name for name, command in timed.items() if command.goal is None] == [
        BASELINE,
        "import lightning.pytorch",
        "import torch, diffusers",
    ]
