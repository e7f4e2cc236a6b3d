"""Runs the drills: python -m tests.drills [WORD ...]   (those whose name holds a word; all of them, some ten minutes).

Writes the table of outcomes to tests/drills/README.md when all were run. Exit code 1 if one came out otherwise than wanted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.drills.drills import DRILLS

README = Path(__file__).parent / "README.md"
HEAD = """# Drills

What is done to a run on a machine with two cores, and what comes of it. Written by `python -m tests.drills`, which needs root
for the unshared disks, and for SLURM Debian 12 with `apt-get install -y --no-install-recommends slurm-wlm slurmctld slurmd
slurm-client munge slurm-wlm-basic-plugins`.

| drill | wanted | got | |
|---|---|---|---|
"""


def main(words: list[str]) -> int:
    """Runs the drills whose name holds one of the words."""
    rows, failed = [], 0
    for name, drill in DRILLS.items():
        if words and not any(word in name for word in words):
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            outcome = drill(Path(work).resolve())
        passed = outcome.wanted == outcome.got
        failed += not passed
        rows.append(f"| {name} | {outcome.wanted} | {outcome.got} | {'passed' if passed else '**FAILED**'} |")
        print(
            f"{'ok  ' if passed else 'FAIL'} {time.monotonic() - start:4.0f} s  {name}: {outcome.got}",
            flush=True,
        )
        if not passed:
            print(f"     wanted: {outcome.wanted}\n{outcome.said}", flush=True)
    if not words:
        README.write_text(HEAD + "\n".join(rows) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
