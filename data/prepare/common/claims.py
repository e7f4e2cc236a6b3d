"""Claims of shards, so that any number of commands, processes and machines share a set without doing anything twice.

A claim is a file `.claims/NAME-GENERATION` in the set, which only one process can create and which names that process. The
claim of a dead process is not removed but superseded, by creating the next generation: of several processes that find the same
dead claim, one succeeds. A process is dead if it does not run any more, or, on another machine, if its claim's heartbeat stops.
A process that was only stopped, and superseded, publishes nothing: it asks `Claim.held` before.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from typing import NamedTuple

from data.prepare.common.owner import Owner
from data.prepare.common.set_folder import SetFolder
from sdxs_lightning.core.errors import CheckpointNotWritten

_log = logging.getLogger(__name__)
FOLDER = ".claims"
BEAT_SECONDS = 10.0
DEAD_SECONDS = 120.0
"""Without a heartbeat for this time, a process of another machine is dead. Timed by the clock of the one that watches."""
POLL_SECONDS = 0.5
"""Between two looks at the claims of others, when nothing else is left to do."""
SILENT_SECONDS = 15.0
"""Of waiting without a line."""


class Claim:
    """A claim that this process has; a context in which its heartbeat goes on, and after which it is released.

    Args:
        folder: of the set.
        name: of what is claimed.
        generation: number of dead claims before it.
        owner: this process.
    """

    def __init__(self, folder: SetFolder, name: str, generation: int, owner: Owner) -> None:
        self._folder, self._name, self._generation, self._owner = folder, name, generation, owner
        self.lost = False
        """Whether `held` was false once."""
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def held(self) -> bool:
        """Whether no other process has superseded it."""
        content = self._folder.read(_file(self._name, self._generation))
        superseded = self._folder.state(_file(self._name, self._generation + 1)) is not None
        self.lost = content is None or _owner(content) != self._owner or superseded
        return not self.lost

    def __enter__(self) -> Claim:
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        # From the first: with a later one gone, an earlier one of a dead process would count.
        for generation in range(self._generation + 1):
            self._folder.remove(_file(self._name, generation))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the next one may arrive
                self._folder.beat(_file(self._name, self._generation), self._owner.content)


class Claims:
    """Claims in one set.

    Args:
        folder: of the set.
    """

    def __init__(self, folder: SetFolder) -> None:
        self._folder = folder
        self._watched: dict[str, tuple[Hashable, float]] = {}
        self._said = time.monotonic()

    def take(self, name: str) -> Claim | None:
        """Claims something, unless a process has it that is alive, or may be.

        Raises:
            CheckpointNotWritten: if the set's folder cannot be written to.
        """
        try:
            return self._take(name)
        except OSError as error:
            from sdxs_lightning.callbacks.checkpoint_folder import write_failure  # imports torch

            raise CheckpointNotWritten(
                f"a shard could not be claimed in '{self._folder}': {write_failure(error)}."
            ) from error

    def _take(self, name: str) -> Claim | None:
        owner = Owner.new()
        generation, dead = 0, None
        while not self._folder.create(_file(name, generation), owner.content):
            state = self._folder.state(_file(name, generation + 1))
            dead = self._dead(name, generation)
            if state is None and dead is None:
                return None
            generation += 1
        claim = Claim(self._folder, name, generation, owner)
        # While its files are removed, one after another, an earlier generation can be created.
        if self._folder.state(_file(name, generation + 1)) is not None:
            self._folder.remove(_file(name, generation))
            return None
        if dead is not None:
            _log.warning("'%s' was claimed by %s, which is dead; it is made here.", name, dead)
        return claim

    def wait_for(self, name: str) -> Claim:
        """Claims something, as soon as no other process has it."""
        self._said = time.monotonic()
        while (claim := self.take(name)) is None:
            self.wait([name])
        return claim

    def wait(self, names: Sequence[str], progressed: bool = False) -> None:
        """Sleeps until others may have released one of these claims; says from time to time whose they are.

        Args:
            names: of what is claimed.
            progressed: whether anything happened since the last call.
        """
        now = time.monotonic()
        if progressed:
            self._said = now
        elif now - self._said >= SILENT_SECONDS:
            self._said = now
            owners = sorted({str(owner) for name in names if (owner := self._latest_owner(name)) is not None})
            if owners:
                _log.warning(
                    "Waiting for %s, claimed by %s. A process of another machine whose heartbeat stops counts as dead after "
                    "%.0f s.",
                    ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else ""),
                    " and ".join(owners[:3]) + (" and others" if len(owners) > 3 else ""),
                    DEAD_SECONDS,
                )
        time.sleep(POLL_SECONDS)

    def _latest_owner(self, name: str) -> Owner | None:
        generation, found = 0, None
        while (content := self._folder.read(_file(name, generation))) is not None:
            generation, found = generation + 1, _owner(content)
        return found

    def tidy(self) -> None:
        """Removes the folder of the claims if there is none."""
        self._folder.remove(FOLDER)

    def _dead(self, name: str, generation: int) -> str | None:
        """The process of a claim if it is dead, otherwise None."""
        file = _file(name, generation)
        state, now = self._folder.state(file), time.monotonic()
        content = self._folder.read(file)
        if state is None or content is None:  # just released; the next look will find it free
            return None
        owner = _owner(content)
        running = None if owner is None else owner.is_running()
        if running is None:
            seen, since = self._watched.get(file, (None, now))
            if seen != state:
                self._watched[file] = state, now
                return None
            running = now - since < DEAD_SECONDS
        return None if running else str(owner or "a process")


class ShardTask(NamedTuple):
    """A shard to make."""

    number: int
    claim: Claim


class ShardEnd(NamedTuple):
    """A shard that is complete now."""

    number: int
    here: bool
    """Whether this process made it."""


def shard_name(shard: int) -> str:
    """Name of a shard's claim and, with `.tar`, of its file."""
    return f"{shard:05d}"


def claimed(
    claims: Claims,
    shards: Iterable[int],
    is_complete: Callable[[int], bool],
    on_end: Callable[[ShardEnd], None],
) -> Generator[ShardTask]:
    """The shards that this process has to make, each claimed until the next one is asked for.

    Ends when all shards are complete, whoever made them; waits for those that others are making, and takes over those of dead
    processes.

    Args:
        claims: of the set.
        shards: that were missing.
        is_complete: whether one is complete by now.
        on_end: called once for each.
    """
    waiting = list(shards)
    while waiting:
        busy: list[int] = []
        for shard in waiting:
            task = try_task(claims, shard, is_complete)
            if task is None:
                busy.append(shard)
            elif task == shard:
                on_end(ShardEnd(shard, here=False))
            else:
                assert isinstance(task, ShardTask)
                with task.claim:
                    yield task
                if task.claim.lost:
                    busy.append(shard)
                else:
                    on_end(ShardEnd(shard, here=True))
        if busy:
            claims.wait([shard_name(shard) for shard in busy], progressed=len(busy) < len(waiting))
        waiting = busy


def try_task(claims: Claims, shard: int, is_complete: Callable[[int], bool]) -> ShardTask | int | None:
    """Claims a shard; its number if it is complete, None if another process is making it."""
    if is_complete(shard):
        return shard
    claim = claims.take(shard_name(shard))
    if claim is None:
        return None
    if is_complete(shard):  # another process released it in between
        with claim:
            return shard
    return ShardTask(shard, claim)


def _file(name: str, generation: int) -> str:
    return f"{FOLDER}/{name}-{generation}"


def _owner(content: bytes) -> Owner | None:
    """Of a claim; a heartbeat at a URL is a second line."""
    return Owner.parse(content.partition(b"\n")[0])
