"""Resident memory of this process."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far.

    From /proc where there is one: `ru_maxrss` survives exec, so that a process begins with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found is not None:
        return 1024 * int(found[1])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, Linux KiB
