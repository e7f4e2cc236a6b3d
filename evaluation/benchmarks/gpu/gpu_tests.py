"""Section `tests`: everything that is marked `gpu`."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation.benchmarks.gpu.section import SectionRun

ROOT = Path(__file__).resolve().parents[3]


def run(run: SectionRun) -> None:
    """One row a test, as soon as it ended; on a machine without GPU they are skipped, which the row says."""
    if importlib.util.find_spec("pytest") is None:
        run.add({"test": "all"}, outcome="not run", error="pytest is not installed")
        return
    import pytest

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    os.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[
            name
        ]  # if pytest runs this command, its worker's variables would make this one a worker too
    tests = ["tests/core/test_seeding.py"] if run.tiny else files_with_gpu_tests()
    passed = [row["labels"]["test"] for row in run.known if row.get("outcome") == "passed"]
    code = pytest.main([*OPTIONS, *(f"--deselect={test}" for test in passed), *tests], plugins=[Rows(run)])
    if code not in (0, 1, 5):  # passed, failed, all of them deselected
        raise RuntimeError(f"pytest ended with {code}; see the log above.")


OPTIONS = [
    "-m",
    "gpu",
    "-o",
    "addopts=",
    "-p",
    "no:cacheprovider",
    "--continue-on-collection-errors",
    "--tb=short",
    "-q",
]
"""Without those of pyproject, which need plugins."""


def files_with_gpu_tests() -> list[str]:
    """Test files that have the mark: collecting all others would take longer than the tests."""
    files = (ROOT / "tests").rglob("test_*.py")
    return sorted(file.relative_to(ROOT).as_posix() for file in files if "mark.gpu" in file.read_text())


@dataclass(eq=False)
class Rows:
    """A pytest plugin: a row for each test, and for each file that could not be imported."""

    run: SectionRun

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Outcome and seconds; of a failed test the end of its report."""
        if report.when == "call" or not report.passed:
            failed = {"error": report.longreprtext[-1500:]} if report.failed else {}
            seconds = round(report.duration, 2)
            self.run.add({"test": report.nodeid}, outcome=report.outcome, seconds=seconds, **failed)

    def pytest_collectreport(self, report: Any) -> None:
        """Collecting goes on with the other files."""
        if report.failed:
            self.run.add({"test": report.nodeid}, outcome="not collected", error=report.longreprtext[-1500:])
