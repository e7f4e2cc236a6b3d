"""What the tests of `python -m data.prepare` share: a run that is killed, a refusal, the files that every run makes alike."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.prepare.__main__ import main
from data.prepare.common.progress import CommandProgress


def killed_in_its_second_shard(arguments: list[str], out: Path) -> None:
    """The command, in a process of its own, which kills itself once the first shard is there."""
    told = CommandProgress.__call__

    def call(self: CommandProgress, count: int) -> None:
        told(self, count)
        if (out / "00000.tar").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    CommandProgress.__call__ = call  # type: ignore[method-assign]
    main(arguments)


def files(folder: Path) -> dict[str, bytes]:
    """Everything that is the same in every run."""
    kinds = ("*.tar", "*.parquet", "*_stats.json", "SHA256SUMS")
    paths = [path for kind in kinds for path in folder.glob(kind)]
    return {path.name: path.read_bytes() for path in sorted(paths)}


def refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one sentence with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    told = capsys.readouterr()
    assert (end.value.code, told.out) == (code, "")
    assert "Traceback" not in told.err
    (sentence,) = [line for line in told.err.splitlines() if line.startswith("prepare ")]
    return sentence
