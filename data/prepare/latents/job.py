"""A set of latents as a job for several processes, one a GPU."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from data.prepare.common.machine import device_of, same_bits
from data.prepare.common.processes import OnProgress, available_cores
from data.prepare.common.raw_shards import RawShard
from data.prepare.common.remote import Reach
from data.prepare.common.shard_files import LeftOut, Prepared, make_shard
from data.prepare.latents.preparing import Fitted, fit_sample, pack
from data.prepare.latents.settings import LatentSettings
from data.prepare.latents.vae import Encoder
from data.shards.tar_headers import BrokenShardError
from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError

_One = TypeVar("_One")
_Item = TypeVar("_Item")
_DECODE_THREADS = 8


@dataclass(frozen=True)
class LatentJob:
    """What every process has to know."""

    settings: LatentSettings
    folder: Path
    vae_folder: Path
    bad_samples: float
    """Share of a shard that may be broken; what is more stops the command."""
    device: str
    """ "cpu" or "cuda"."""
    processes: int
    reach: Reach = Reach()

    def work(self, process: int, parts: Sequence[int], told: OnProgress) -> None:
        """Makes shards; see `processes.Job`."""
        shards, store = self.reach.open(self.settings.source).shards, self.reach.store()
        threads = min(_DECODE_THREADS, max(1, available_cores() // self.processes))
        with same_bits(self.device), ThreadPoolExecutor(threads) as pool:
            try:
                encoder = Encoder(self.vae_folder, self.settings.vae_dtype, device_of(self.device, process))
            except (OSError, ValueError) as error:
                raise UserError(f"--model or --vae: {error}") from error
            for shard in parts:
                with RawShard(shards[shard], store) as raw:
                    self._make(shard, _Maker(self, encoder, raw, pool).samples(told))

    def _make(self, shard: int, samples: Iterator[Prepared | LeftOut]) -> None:
        try:
            make_shard(self.folder, shard, samples)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.settings.batch_size} pictures at once do not fit the GPU; remove '{self.folder}' and give a smaller "
                f"--batch-size ({error})."
            ) from error
        except BrokenShardError as error:
            raise UserError(f"--from: {error}") from error
        except OSError as error:
            raise CheckpointNotWritten(
                f"a shard could not be written to '{self.folder}': {write_failure(error)}."
            ) from error


@dataclass
class _Maker:
    """Makes one shard out of another."""

    job: LatentJob
    encoder: Encoder
    raw: RawShard
    pool: ThreadPoolExecutor

    def samples(self, told: OnProgress) -> Iterator[Prepared | LeftOut]:
        """The samples of the new shard: batches of one size in the order in which they fill up.

        Args:
            told: of each batch.

        Raises:
            UserError: where more are broken than may be.
        """
        settings, bad = self.job.settings, 0
        allowed = math.ceil(self.job.bad_samples * len(self.raw))
        waiting: dict[tuple[int, int], list[Fitted]] = {}
        for one in self._fitted():
            if isinstance(one, LeftOut):
                bad += 1
                if bad > allowed:
                    raise UserError(
                        f"{self.raw.index.location}: more than {allowed} of {len(self.raw)} samples are broken, now "
                        f"{one.fault}; look at it with `python -m data.prepare verify`, or raise --bad-samples."
                    )
                yield one
                told(1)
                continue
            batch = waiting.setdefault((one.image.height, one.image.width), [])
            batch.append(one)
            if len(batch) == settings.batch_size:
                yield from self._encoded(batch, told)
                batch.clear()
        for _, batch in sorted(waiting.items()):
            if batch:
                yield from self._encoded(batch, told)

    def _fitted(self) -> Iterator[Fitted | LeftOut]:
        """Decoded and resized by threads, some batches ahead of the encoder."""
        sizes = [(height, width) for height, width in self.job.settings.sizes]
        samples = (self.raw.sample(row) for row in range(len(self.raw)))
        ahead = 2 * self.job.settings.batch_size + _DECODE_THREADS
        return in_order(self.pool, lambda sample: fit_sample(sample, sizes), samples, ahead)

    def _encoded(self, batch: Sequence[Fitted], told: OnProgress) -> Iterator[Prepared | LeftOut]:
        settings = self.job.settings
        posterior = self.encoder([one.image for one in batch])
        for one, mean, logvar in zip(batch, posterior.mean, posterior.logvar, strict=True):
            try:
                yield pack(one, mean, logvar if settings.store == "mean+logvar" else None, settings.dtype)
            except ValueError as error:
                raise UserError(
                    f"{one.where}: {error}; take --vae-dtype float32 or --dtype float32."
                ) from error
        told(len(batch))


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _One], items: Iterable[_Item], ahead: int
) -> Iterator[_One]:
    """As `pool.map`, but never more than `ahead` results before the one that is asked for: a shard's pictures would fill
    the memory.
    """
    waiting: deque[Future[_One]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
