"""Detects and names a rank that hangs or has died; without it the others would wait half an hour in a collective."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.core.errors import RankLost, RunStopped

DONE, STOPPED, FAILED = "done", "stopped", "failed"
_OVER = (DONE, STOPPED, FAILED)


class RankMonitor:
    """A thread per rank that writes heartbeats to the process group's store and watches those of the other ranks.

    A rank is lost if its heartbeats stop; they continue during long evaluations and saves. Then every other rank ends with
    exit code 5, and the lowest of them reports the lost rank, its host, and the collective that it was itself waiting in.
    Where a rank alone is stopped by an error that a sentence explains (the base on its disk is another one), the others end
    with that sentence and exit code.

    Args:
        seconds: time without heartbeats after which a rank is lost, and after a rank's end until the others end.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.beat_seconds = min(5.0, seconds / 6)
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Store | None = None
        self._rank, self._count = 0, 1
        self._seen: dict[int, tuple[str, float]] = {}
        self._is_ending: Callable[[], bool] = lambda: False

    def start(self, ranks: Ranks, is_ending: Callable[[], bool]) -> None:
        """Starts watching. A collective; does nothing with a single process, or if it has started.

        Args:
            ranks: of the run.
            is_ending: whether this rank is ending too, and may still be writing a checkpoint.
        """
        if ranks.count == 1 or self._thread is not None:
            return
        self._is_ending = is_ending
        self._rank, self._count = ranks.number, ranks.count
        # A separate connection, since the training's is locked while it waits for a key.
        store: Any = dist.distributed_c10d._get_default_store()
        own = store.clone() if hasattr(store, "clone") else store
        own.set_timeout(timedelta(seconds=max(30.0, self.seconds)))
        self._store = PrefixStore("sdxs/alive", own)
        self._beat(0)
        ranks.wait()  # all have written once
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """Stops watching, and tells the others how this rank ended."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join(self.beat_seconds)
        self._thread = None
        try:
            if isinstance(error, RunStopped):
                assert self._store is not None
                self._store.set(_sentence_key(self._rank), json.dumps([error.exit_code, str(error)]))
            self._write(DONE if error is None else STOPPED if isinstance(error, RunStopped) else FAILED)
        except Exception:
            return  # rank 0, which keeps the store, has ended

    def explain(self, error: BaseException) -> RunStopped | None:
        """Names the ranks that ended or no longer respond after a collective of this rank failed; None if all respond."""
        if self._store is None:
            return None
        first = self._read()
        time.sleep(2.5 * self.beat_seconds)
        second = self._read()
        if first is None or second is None:
            return RankLost(
                f"rank 0, which keeps the store of the process group, no longer answers rank {self._rank} (host "
                f"{socket.gethostname()}): it died or was killed. The collective here ended with: {_first_line(error)}"
            )
        stopped = [rank for rank in second if second[rank].startswith(STOPPED)]
        if stopped:
            code, sentence = self._sentence(stopped[0])
            ended = RunStopped(f"{self._named(stopped[:1], second)} ended: {sentence}")
            ended.exit_code = code
            return ended
        lost = [rank for rank in second if second[rank] == first.get(rank)]
        lost = [rank for rank in lost if not second[rank].startswith(_OVER)]
        lost += [rank for rank in second if second[rank].startswith(FAILED)]
        if not lost:
            return None
        return RankLost(
            f"{self._named(lost, second)} died, was killed or failed; the collective of rank {self._rank} ended with: "
            f"{_first_line(error)}"
        )

    def _watch(self) -> None:
        beat, unreachable_since = 0, None
        while not self._ended.wait(self.beat_seconds):
            beat += 1
            try:
                self._beat(beat)
                values = self._read()
            except Exception:
                values = None
            now = time.monotonic()
            if values is None:
                unreachable_since = unreachable_since or now
                if now - unreachable_since > self.seconds and not self._ended.is_set():
                    self._leave("rank 0, which keeps the store of the process group", "has")
                continue
            unreachable_since = None
            for rank, value in values.items():
                if self._seen.get(rank, ("", 0.0))[0] != value:
                    self._seen[rank] = (value, now)
            # A rank that is ending itself waits for its last checkpoint, not for a rank that has ended.
            expected_over = _OVER if self._is_ending() else DONE
            silent = [
                rank
                for rank, (value, since) in self._seen.items()
                if not value.startswith(expected_over) and rank != self._rank and now - since > self.seconds
            ]
            lost = [rank for rank in silent if not values[rank].startswith(STOPPED)]
            speaks = self._rank == min(rank for rank in range(self._count) if rank not in silent)
            if lost and not self._ended.is_set():
                self._leave(self._named(lost, values), "have" if len(lost) > 1 else "has", speaks)
            elif silent and not self._ended.is_set():
                code, sentence = self._sentence(silent[0])
                self._end(f"{self._named(silent[:1], values)} ended: {sentence}", code, speaks)

    def _leave(self, who: str, has: str, speaks: bool = True) -> None:
        text = f"{who} {has} not answered for {self.seconds:.0f} s: stopped, dead, or cut off."
        self._end(text, RankLost.exit_code, speaks, " All ranks end; resume with --ckpt_path auto.")

    def _end(self, reason: str, exit_code: int, speaks: bool, advice: str = "") -> None:
        if speaks:
            sys.stderr.write(
                f"error: {reason} Rank {self._rank} (host {socket.gethostname()}) waits in {self._waiting_in()}.{advice}\n"
            )
            sys.stderr.flush()
        os._exit(exit_code)

    def _sentence(self, rank: int) -> tuple[int, str]:
        """Exit code and message with which a rank stopped."""
        assert self._store is not None
        code, sentence = json.loads(self._store.get(_sentence_key(rank)))
        return code, sentence

    def _waiting_in(self) -> str:
        """The innermost torch.distributed call in the main thread, and the line of this project that led to it."""
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame is not None else []
        calls = [one for one in stack if f"{os.sep}torch{os.sep}distributed{os.sep}" in one.filename]
        ours = [one for one in stack if any(f"{os.sep}{name}{os.sep}" in one.filename for name in _OURS)]
        where = f"{ours[-1].filename}:{ours[-1].lineno}" if ours else "its own code"
        return f"{calls[-1].name} ({where})" if calls else where

    def _beat(self, number: int) -> None:
        self._write(f"{number}")

    def _write(self, word: str) -> None:
        assert self._store is not None
        self._store.set(str(self._rank), f"{word};{socket.gethostname()};{os.getpid()}")

    def _read(self) -> dict[int, str] | None:
        assert self._store is not None
        try:
            values = self._store.multi_get([str(rank) for rank in range(self._count)])
        except Exception:
            return None
        return {rank: value.decode() for rank, value in enumerate(values)}

    def _named(self, ranks: list[int], values: dict[int, str]) -> str:
        parts = []
        for rank in ranks:
            _, host, pid = values[rank].split(";")
            parts.append(f"rank {rank} (host {host}, process {pid})")
        return ", ".join(parts)


_OURS = ("sdxs_lightning", "data", "evaluation")


def _sentence_key(rank: int) -> str:
    return f"sentence/{rank}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
