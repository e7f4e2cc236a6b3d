"""Section `tests`: everything that is marked `gpu`."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

from evaluation.benchmarks.gpu.section import SectionRun

OUTCOME = re.compile(r"^(PASSED|FAILED|ERROR|SKIPPED)\s+(?:\[\d+\]\s+)?(\S+)", re.MULTILINE)


def run(run: SectionRun) -> None:
    """One row a test; on a machine without GPU they are skipped, which the row says."""
    if importlib.util.find_spec("pytest") is None:
        run.add(test="all", outcome="not run: pytest is not installed")
        return
    # Without the options of pyproject, which need plugins.
    arguments = [
        "-m",
        "gpu",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-rA",
        "-q",
        "--no-header",
        "--strict-markers",
    ]
    tests = ["tests/core/test_seeding.py"] if run.tiny else ["tests"]
    # If pytest runs this command, its worker's variables would make this one a worker too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *tests],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    outcomes = OUTCOME.findall(ended.stdout)
    for outcome, test in outcomes:
        run.add(test=test, outcome=outcome.lower())
    if not outcomes:
        run.add(
            test="all",
            outcome=f"pytest ended with {ended.returncode}: {ended.stdout[-300:]}{ended.stderr[-300:]}",
        )
