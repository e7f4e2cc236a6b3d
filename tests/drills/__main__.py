"""Runs the drills: python -m tests.drills [WORD ...]   (those whose name holds a word; all of them, a quarter of an hour).

Writes their rows in the table of configs/CLUSTER.md. Exit code 1 if one came out otherwise than wanted; what this machine
cannot run is left out, and said.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.drills.drills import DRILLS
from tests.drills.preparing import PREPARING_DRILLS
from tests.drills.runs import LEFT_OUT, CannotRun, Outcome, Runs
from tests.drills.slurm_drills import SLURM_DRILLS
from tests.helpers.tiny_run import ROOT

PAGE = ROOT / "configs" / "CLUSTER.md"
HEAD = "| drill | wanted | got | |\n|---|---|---|---|\n"
"""Of the table, with which the page ends."""
Drills = Mapping[str, Callable[[Runs], Outcome]]


def verdict(outcome: Outcome) -> str:
    """Last column of the table."""
    if outcome.got.startswith(LEFT_OUT):
        return LEFT_OUT
    return "passed" if outcome.wanted == outcome.got else "**FAILED**"


def run_in_turn(drills: Drills) -> dict[str, Outcome]:
    """Runs drills one after the other, and says what came of each."""
    outcomes = {}
    for name, drill in drills.items():
        start = time.monotonic()
        try:
            with (
                tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work,
                Runs(Path(work).resolve()) as runs,
            ):
                outcome = drill(runs)
        except CannotRun as reason:
            outcome = Outcome("", f"{LEFT_OUT}: {reason}", "")
        except Exception as error:
            outcome = Outcome("no error", f"{type(error).__name__}: {error}", traceback.format_exc())
        outcomes[name] = outcome
        found, seconds = verdict(outcome).strip("*"), time.monotonic() - start
        sys.stdout.write(f"{found:8} {seconds:4.0f} s  {name}: {outcome.got}\n")
        if found == "FAILED":
            sys.stdout.write(f"     wanted: {outcome.wanted}\n{outcome.said}\n")
        sys.stdout.flush()
    return outcomes


def write_table(outcomes: Mapping[str, Outcome]) -> None:
    """Writes the rows of these drills; those of others that there still are stay, and what was left out changes none."""
    text, _, table = PAGE.read_text().partition(HEAD)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines(keepends=True)}
    for name, one in outcomes.items():
        if verdict(one) != LEFT_OUT:
            rows[name] = f"| {name} | {one.wanted} | {one.got} | {verdict(one)} |\n"
    every = [*DRILLS, *PREPARING_DRILLS, *SLURM_DRILLS]
    PAGE.write_text(text + HEAD + "".join(rows[name] for name in every if name in rows))


def main(words: list[str]) -> int:
    """Runs the drills whose name holds one of the words; those of SLURM, which mostly wait, beside the others."""

    def chosen(drills: Drills) -> Drills:
        return {
            name: drill for name, drill in drills.items() if not words or any(word in name for word in words)
        }

    with ThreadPoolExecutor(1) as beside:
        slurm = beside.submit(run_in_turn, chosen(SLURM_DRILLS))
        # In the main thread, where Ray sets its signal handlers.
        outcomes = run_in_turn(chosen(DRILLS | PREPARING_DRILLS)) | slurm.result()
    verdicts = [verdict(outcome) for outcome in outcomes.values()]
    write_table(outcomes)
    passed, left_out = verdicts.count("passed"), verdicts.count(LEFT_OUT)
    sys.stdout.write(f"{passed} of {len(verdicts)} drills passed, {left_out} left out\n")
    return int(passed + left_out < len(verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
