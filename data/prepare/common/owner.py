"""Which process a claim or a temporary folder belongs to, and whether it is still running."""

from __future__ import annotations

import json
import os
import socket
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process of some machine."""

    host: str
    machine: str
    """Boot and PID namespace: process numbers are comparable only where both are the same."""
    pid: int
    started: str
    """Start of the process in clock ticks, as numbers are used again; "" where the system does not say."""
    token: str
    """Unique among all owners."""

    @classmethod
    def new(cls) -> Owner:
        """This process, with a token of its own."""
        return cls(
            socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()) or "", uuid.uuid4().hex
        )

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """What `content` returned; None for other bytes."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return None

    @property
    def content(self) -> bytes:
        """As a file."""
        return json.dumps(asdict(self)).encode()

    def is_running(self) -> bool | None:
        """Whether the process runs; None if it belongs to another machine."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return None
        return _start_of(self.pid) == self.started if self.started else _exists(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}"


@cache
def _machine() -> str:
    found = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            found.append(read())
        except OSError:  # not Linux
            found.append("")
    return " ".join(found)


def _start_of(pid: int) -> str | None:
    """Start of a process in clock ticks; None if it does not run, or on a system without /proc."""
    try:
        # The name, in brackets, may hold blanks and brackets itself.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state[0] in ("Z", "X") else state[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
