"""Peak memory of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evaluation.runner.memory import peak_resident_bytes
from tests.helpers.tiny_run import ROOT

MIB = 2**20
CHILD = """
from evaluation.runner.memory import peak_resident_bytes
first = peak_resident_bytes()
large = b"x" * (100 * 2**20)
print(first, peak_resident_bytes() - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_does_not_begin_with_the_peak_of_the_one_that_started_it() -> None:
    before = peak_resident_bytes()
    large = b"x" * (300 * MIB)
    assert peak_resident_bytes() >= before and len(large) == 300 * MIB
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, check=True)
    first, added = map(int, done.stdout.split())
    assert first < 200 * MIB
    assert 95 * MIB < added < 120 * MIB
