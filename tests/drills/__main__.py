"""Runs the drills: python -m tests.drills [WORD ...]   (those whose name holds a word; all of them, a quarter of an hour).

Writes their rows in the table of configs/CLUSTER.md. Exit code 1 if one came out otherwise than wanted; what this machine
cannot run is left out, and said. Each runs in a process of its own that is ended after a quarter of an hour.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Mapping

from tests.drills.attempt import Drills, run_beside
from tests.drills.drills import DRILLS
from tests.drills.preparing import PREPARING_DRILLS
from tests.drills.runs import FAILED, LEFT_OUT, Outcome, verdict
from tests.drills.slurm_drills import SLURM_DRILLS
from tests.helpers.tiny_run import ROOT

PAGE = ROOT / "configs" / "CLUSTER.md"
HEAD = "| drill | wanted | got | |\n|---|---|---|---|\n"
"""Of the table, with which the page ends."""
SLOW = 60.0
"""Seconds to import torch and Lightning (5 on two idle cores) beyond which the drills would not fit into their minutes."""


def say(name: str, outcome: Outcome, seconds: float) -> None:
    """Tells what came of an attempt."""
    sys.stdout.write(f"{verdict(outcome).strip('*'):8} {seconds:4.0f} s  {name}: {outcome.got}\n")
    if verdict(outcome) == FAILED:
        sys.stdout.write(f"     wanted: {outcome.wanted}\n{outcome.said}\n")
    sys.stdout.flush()


def write_table(outcomes: Mapping[str, Outcome]) -> None:
    """Writes the rows of these drills; those of others that there still are stay, and what was left out changes none."""
    text, _, table = PAGE.read_text().partition(HEAD)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines(keepends=True)}
    for name, one in outcomes.items():
        if verdict(one) != LEFT_OUT:
            rows[name] = f"| {name} | {one.wanted} | {one.got} | {verdict(one)} |\n"
    every = [*DRILLS, *PREPARING_DRILLS, *SLURM_DRILLS]
    PAGE.write_text(text + HEAD + "".join(rows[name] for name in every if name in rows))


def too_slow() -> bool:
    """Whether a run starts so slowly here that the drills, each of some starts, take hours."""
    try:
        subprocess.run([sys.executable, "-c", "import lightning, torch"], check=True, timeout=SLOW)
    except subprocess.TimeoutExpired:
        return True
    return False


def main(arguments: list[str]) -> int:
    """Runs the drills whose name holds one of the words; those of SLURM, which mostly wait, beside the others."""
    parser = argparse.ArgumentParser(prog="python -m tests.drills")
    parser.add_argument("words", nargs="*", help="drills whose name holds one of them; all without")
    parser.add_argument("--minutes", type=float, default=math.inf, help="what does not fit is left out")
    parser.add_argument("--tries", type=int, default=1, help="so often one is run that fails")
    parser.add_argument("--no_table", action="store_true", help="leave the table of the page as it is")
    given = parser.parse_args(arguments)
    start = time.monotonic()

    def chosen(drills: Drills) -> Drills:
        return {
            name: drill
            for name, drill in drills.items()
            if not given.words or any(word in name for word in given.words)
        }

    if given.minutes < math.inf and too_slow():
        sys.stdout.write(f"all drills left out: importing torch takes longer than {SLOW:.0f} s here\n")
        return 0
    lanes = [chosen(DRILLS | PREPARING_DRILLS), chosen(SLURM_DRILLS)]
    outcomes = run_beside(lanes, say, start + 60 * given.minutes, given.tries)
    if not given.no_table:
        write_table(outcomes)
    verdicts = [verdict(outcome) for outcome in outcomes.values()]
    sys.stdout.write(
        f"{verdicts.count('passed')} of {len(verdicts)} drills passed, {verdicts.count(LEFT_OUT)} left out "
        f"({time.monotonic() - start:.0f} s)\n"
    )
    return int(FAILED in verdicts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
