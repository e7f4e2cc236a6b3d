"""A set of latents, and the job that writes its shards in several processes, one per GPU."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from data.prepare.common.claims import ShardTask
from data.prepare.common.machine import device_of, same_bits
from data.prepare.common.processes import OnProgress, available_cores
from data.prepare.common.raw_shards import RawShard, open_shards, shard_store
from data.prepare.common.set_folder import SetFolder
from data.prepare.common.shard_files import LeftOutSample, PreparedSample, make_shard, read_stats
from data.prepare.latents.options import LatentOptions, LatentSettings
from data.prepare.latents.samples import FittedSample, fit_sample, pack
from data.prepare.latents.vae import VaeEncoder
from data.shards.order.buckets import Size
from data.shards.tar_headers import BrokenShardError
from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")
_DECODE_THREADS = 8
_FORMAT = 1
"""Raised when the same settings would give other shards."""


@dataclass(frozen=True)
class LatentSet:
    """A set of latent shards."""

    options: LatentOptions
    source_fingerprint: str
    """Fingerprint of the shards' index."""
    vae_fingerprint: str
    """Fingerprint of the VAE's config and weights."""
    shards: int
    """Number of shards, as in the source."""
    sizes: tuple[Size, ...]
    """Height and width in pixels; an image goes to the one with the nearest aspect ratio."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the shards depend on, but for the machine."""
        own = {field.name: getattr(self.options, field.name) for field in fields(LatentSettings)}
        return {
            **own,
            "source_fingerprint": self.source_fingerprint,
            "vae_fingerprint": self.vae_fingerprint,
            "shards": self.shards,
            "sizes": [list(size) for size in self.sizes],
            "format": _FORMAT,
        }


@dataclass(frozen=True)
class LatentJob:
    """Makes shards of latents; a `shared_work.ShardJob`."""

    latent_set: LatentSet
    folder: SetFolder
    vae_folder: Path
    device: str
    """ "cpu" or "cuda"."""
    processes: int
    """That share a machine, and its cores for decoding images."""

    def is_complete(self, shard: int) -> bool:
        return read_stats(self.folder, shard) is not None

    def work(self, process: int, tasks: Iterable[ShardTask], on_progress: OnProgress) -> None:
        options = self.latent_set.options
        shards, store = open_shards(options.source, options).shards, shard_store(options)
        threads = min(_DECODE_THREADS, max(1, available_cores() // self.processes))
        with same_bits(self.device), ThreadPoolExecutor(threads) as pool:
            try:
                encoder = VaeEncoder(self.vae_folder, options.vae_dtype, device_of(self.device, process))
            except (OSError, ValueError) as error:
                raise UserError(f"--model or --vae: {error}") from error
            for task in tasks:
                with RawShard(shards[task.number], store) as raw:
                    self._make(task, _ShardEncoder(self.latent_set, encoder, raw, pool).samples(on_progress))

    def _make(self, task: ShardTask, samples: Iterator[PreparedSample | LeftOutSample]) -> None:
        options = self.latent_set.options
        try:
            make_shard(self.folder, task.number, samples, task.claim)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{options.batch_size} images at once do not fit the GPU; remove '{options.out}' and give a smaller "
                f"--batch_size ({error})."
            ) from error
        except BrokenShardError as error:
            raise UserError(f"--from: {error}") from error
        except OSError as error:
            raise CheckpointNotWritten(
                f"a shard could not be written to '{options.out}': {write_failure(error)}."
            ) from error


@dataclass
class _ShardEncoder:
    """Encodes one shard of images."""

    latent_set: LatentSet
    encoder: VaeEncoder
    raw: RawShard
    pool: ThreadPoolExecutor

    def samples(self, on_progress: OnProgress) -> Iterator[PreparedSample | LeftOutSample]:
        """The samples of the new shard: batches of one size in the order in which they fill up.

        Args:
            on_progress: called after each batch.

        Raises:
            UserError: if more samples are broken than allowed.
        """
        options, bad = self.latent_set.options, 0
        allowed = math.ceil(options.bad_samples * len(self.raw))
        waiting: dict[tuple[int, int], list[FittedSample]] = {}
        for one in self._fitted():
            if isinstance(one, LeftOutSample):
                bad += 1
                if bad > allowed:
                    raise UserError(
                        f"{self.raw.index.location}: more than {allowed} of {len(self.raw)} samples are broken, the last: "
                        f"{one.fault}; check it with `python -m data.prepare verify`, or raise --bad_samples."
                    )
                yield one
                on_progress(1)
                continue
            batch = waiting.setdefault((one.image.height, one.image.width), [])
            batch.append(one)
            if len(batch) == options.batch_size:
                yield from self._encoded(batch, on_progress)
                batch.clear()
        for _, batch in sorted(waiting.items()):
            if batch:
                yield from self._encoded(batch, on_progress)

    def _fitted(self) -> Iterator[FittedSample | LeftOutSample]:
        """Decoded and resized by threads, some batches ahead of the encoder."""
        samples = (self.raw.sample(row) for row in range(len(self.raw)))
        ahead = 2 * self.latent_set.options.batch_size + _DECODE_THREADS
        return map_ahead(self.pool, lambda sample: fit_sample(sample, self.latent_set.sizes), samples, ahead)

    def _encoded(
        self, batch: Sequence[FittedSample], on_progress: OnProgress
    ) -> Iterator[PreparedSample | LeftOutSample]:
        options = self.latent_set.options
        posterior = self.encoder([one.image for one in batch])
        for one, mean, logvar in zip(batch, posterior.mean, posterior.logvar, strict=True):
            try:
                yield pack(one, mean, logvar if options.store == "mean+logvar" else None, options.dtype)
            except ValueError as error:
                raise UserError(
                    f"{one.where}: {error}; give --vae_dtype float32 or --dtype float32."
                ) from error
        on_progress(len(batch))


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """`pool.map` that computes at most `ahead` results in advance: all images of a shard would fill the memory."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
