"""A set of images as a job for several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.prepare.common.machine import device_of, same_bits
from data.prepare.common.processes import OnProgress
from data.prepare.common.remote import Reach
from data.prepare.common.shard_files import LeftOut, Prepared, make_shard
from data.prepare.images.preparing import Preparer
from data.prepare.images.settings import ImageSettings
from data.prepare.images.source_sample import SampleFaultError
from data.prepare.images.sources import Columns, ImageSource, open_source
from data.shards.tar_headers import BrokenShardError
from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError

UNREADABLE = "unreadable"
_TOLD_EVERY = 32


@dataclass(frozen=True)
class ImageJob:
    """What every process has to know."""

    settings: ImageSettings
    folder: Path
    device: str
    """ "cpu" or "cuda", for a condition that is made by a network."""
    processes: int
    reach: Reach = Reach()

    def work(self, process: int, parts: Sequence[int], told: OnProgress) -> None:
        """Makes shards; see `processes.Job`."""
        settings = self.settings
        source = open_source(
            settings.source, Columns(settings.image_column, settings.caption_column), self.reach
        )
        prepare = Preparer(settings, str(device_of(self.device, process)))
        with same_bits(self.device):
            for shard in parts:
                indices = settings.indices(shard)
                try:
                    make_shard(self.folder, shard, _heard(_samples(source, prepare, indices), told))
                except OSError as error:
                    raise CheckpointNotWritten(
                        f"a shard could not be written to '{self.folder}': {write_failure(error)}."
                    ) from error


def _samples(source: ImageSource, prepare: Preparer, indices: Sequence[int]) -> Iterator[Prepared | LeftOut]:
    for index in indices:
        key = f"{index:09d}"
        try:
            sample = source.read(index)
        except SampleFaultError as error:
            yield LeftOut(key, UNREADABLE, str(error))
            continue
        except (BrokenShardError, OSError) as error:
            raise UserError(f"--from: {error}") from error
        try:
            yield prepare(key, sample)
        except SampleFaultError as error:
            yield LeftOut(key, UNREADABLE, f"{sample.where}: {error}")
        except (OSError, ValueError) as error:
            # Not the sample's doing: a network that makes condition images and cannot be loaded.
            raise UserError(f"--condition: {error}") from error


def _heard(samples: Iterator[Prepared | LeftOut], told: OnProgress) -> Iterator[Prepared | LeftOut]:
    """The same samples, told of now and then."""
    count = 0
    for count, sample in enumerate(samples, 1):
        yield sample
        if count % _TOLD_EVERY == 0:
            told(_TOLD_EVERY)
    if count % _TOLD_EVERY:
        told(count % _TOLD_EVERY)
