"""Options that several commands of `python -m data.prepare` share. Imported before torch: keep it light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from sdxs_lightning.command_line import Option
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.option_bounds import MOST_PROCESSES, MOST_SECONDS
from sdxs_lightning.trust import Trust

if TYPE_CHECKING:
    from data.prepare.common.set_folder import SetFolder
    from data.shards.remote.patience import Patience

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
class PatienceOptions:
    """How long servers are waited for."""

    remote_timeout_s: Annotated[float, Option(at_least=0.001, at_most=MOST_SECONDS)] = 30.0
    """Seconds that the server of a URL has for each answer."""
    remote_retry_s: Annotated[float, Option(at_least=0, at_most=MOST_SECONDS)] = 600.0
    """Seconds over which its failures are retried, before the command stops or a shard counts as unreadable."""

    @property
    def patience(self) -> Patience:
        """The same for `data.shards`."""
        from data.shards.remote.patience import Patience

        return Patience(self.remote_timeout_s, self.remote_retry_s)


@dataclass(frozen=True, kw_only=True)
class OutputOptions(PatienceOptions):
    """Where a set is written, and which of its shards."""

    out: Annotated[str, Option(metavar="PATH|URL")]
    """Folder of the shards, or a URL of anything that fsspec writes (s3://bucket/set); it is created, or resumed if the same
    command began it. Commands with the same --out at the same time share the work."""
    part: Annotated[SetPart, Option(parse=SetPart.parse, metavar="I/N")] = SetPart(0, 1)
    """Make only the I-th of N parts, counted from 0. Not needed for several machines: without it they share all shards."""

    @property
    def output(self) -> SetFolder:
        """The folder of `out`.

        Raises:
            UserError: for a URL of an unknown kind.
        """
        from data.prepare.common.set_folder import open_set_folder

        try:
            return open_set_folder(self.out, self.patience)
        except ValueError as error:
            raise UserError(f"--out: {error}") from error


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Hardware of this machine, or of a Ray cluster."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPUs if there are any."""
    processes: Annotated[int | None, Option(at_least=1, at_most=MOST_PROCESSES)] = None
    """Number of processes; by default one per GPU, or without GPUs one per core (at most 8)."""
    ray: Annotated[str | None, Option(const="auto", metavar="ADDRESS")] = None
    """Make the shards in tasks of a Ray cluster; without an address in the one of RAY_ADDRESS or of this machine, or else in a
    new one on this machine. Needs the extra ray, and the same files at the same paths on all nodes."""
    gpus_per_task: Annotated[float | None, Option(at_least=0)] = None
    """GPUs that each task asks Ray for, such as 0.5 for two tasks per GPU; by default 1 if the cluster has any."""

    def check_ray(self) -> None:
        """Refuses options that exclude one another.

        Raises:
            ValueError: for some that do.
        """
        if self.ray is None and self.gpus_per_task is not None:
            raise ValueError("--gpus_per_task needs --ray, whose tasks ask for them.")
        if self.ray is not None and self.processes is not None:
            raise ValueError(
                "--processes is for one machine, and --ray starts as many tasks as the cluster has room for."
            )
        if self.gpus_per_task and self.device == "cpu":
            raise ValueError(f"--gpus_per_task {self.gpus_per_task:g} and --device cpu exclude one another.")


@dataclass(frozen=True, kw_only=True)
class RemoteOptions(PatienceOptions):
    """Access to shards that may be remote."""

    cache_folder: str | None = None
    """For shards that are URLs or pipe: commands: folder that caches them and their indexes. Without it they are read by byte
    ranges, and --index_folder is required."""
    cache_gb: Count = 100
    """Size limit of --cache_folder, 10^9 bytes."""
    index_folder: str | None = None
    """Folder of the indexes, if neither beside the shards nor in the cache; as data.index_folder of a training."""
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
