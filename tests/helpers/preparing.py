"""What the tests of `python -m data.prepare` share: a run that is killed, a refusal, the files that every run makes alike."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.prepare.__main__ import main
from data.prepare.common.claims import ShardEnd
from data.prepare.common.progress import CommandProgress
from data.prepare.common.shared_work import SetProgress
from tests.helpers import faulty_store


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


def shared_command(
    arguments: list[str], work: Path, count: int, killed: Sequence[int], store: str = ""
) -> int:
    """The command as one of `count` that start at the same moment (for `in_ranks`).

    Args:
        arguments: the command line.
        work: for files by which they wait for each other.
        count: number of commands.
        killed: those that SIGKILL hits within their second shard.
        store: root folder of `faulty://` URLs, if there are any.
    """
    rank = int(os.environ["LOCAL_RANK"])
    if store:
        faulty_store.register(Path(store))
    counted, seen = SetProgress.__call__, 0

    def call(self: SetProgress, content: int | ShardEnd) -> None:
        nonlocal seen
        counted(self, content)
        if isinstance(content, int):
            seen += 1
            if rank in killed and seen == 2:
                (work / f"killed-{rank}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            # The others keep their first shard until then, or one that is starved would find nothing left to do.
            while rank not in killed and len(list(work.glob("killed-*"))) < len(killed):
                time.sleep(0.02)
            time.sleep(0.1)  # so that none of them is done before another has begun

    SetProgress.__call__ = call  # type: ignore[method-assign]
    (work / f"ready-{rank}").touch()
    while len(list(work.glob("ready-*"))) < count:
        time.sleep(0.02)
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
