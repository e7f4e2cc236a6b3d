"""Options that several commands of `python -m data.prepare` share. Imported before torch: keep it light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from sdxs_lightning.command_line import Option
from sdxs_lightning.trust import Trust

Count = Annotated[int, Option(at_least=1)]


class SetPart(NamedTuple):
    """One of several interleaved parts of a set's shards."""

    number: int
    """Counted from 0."""
    parts: int

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"

    @classmethod
    def parse(cls, text: str) -> SetPart:
        """The second of four parts of "1/4".

        Raises:
            ValueError: for other text.
        """
        number, slash, parts = text.partition("/")
        if not (slash and number.isdigit() and parts.isdigit() and int(number) < int(parts)):
            raise ValueError("must be I/N with I below N; 0/4 is the first of four parts, 3/4 the last")
        return cls(int(number), int(parts))


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where a set is written, and which of its shards."""

    out: Path
    """Folder of the shards; it is created, or resumed if the same command began it."""
    part: Annotated[SetPart, Option(parse=SetPart.parse, metavar="I/N")] = SetPart(0, 1)
    """Make only the I-th of N parts, counted from 0: one command per machine, all with the same --out."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Hardware of this machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPUs if there are any."""
    processes: Count | None = None
    """Number of processes; by default one per GPU, or without GPUs one per core (at most 8)."""


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """Access to shards that may be remote."""

    cache_folder: str | None = None
    """For shards that are URLs or pipe: commands: folder that caches them and their indexes. Without it they are read by byte
    ranges, and --index_folder is required."""
    cache_gb: Count = 100
    """Size limit of --cache_folder, 10^9 bytes."""
    index_folder: str | None = None
    """Folder of the indexes, if neither beside the shards nor in the cache; as data.index_folder of a training."""
    remote_timeout_s: Annotated[float, Option(at_least=0.001)] = 30.0
    """Seconds that the server of a URL has for each answer."""
    remote_retry_s: Annotated[float, Option(at_least=0)] = 600.0
    """Seconds over which its failures are retried, before the shard counts as unreadable."""
    trust: tuple[Literal["pipe:"], ...] = ()
    """Allow shard locations that are shell commands, `pipe:COMMAND`: they run."""

    def check_locations(self, shards: str | Sequence[str]) -> None:
        """Refuses commands that are not trusted.

        Raises:
            UserError: for one.
        """
        Trust(self.trust).check_locations([shards] if isinstance(shards, str) else shards)

    @property
    def indexes(self) -> str | None:
        """Folder of the indexes; None: beside the shards."""
        return self.index_folder or self.cache_folder
