"""`python -m data.prepare images`: images with captions to shards that trainings read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data.prepare.common.claims import ShardTask
from data.prepare.common.machine import device_of, same_bits
from data.prepare.common.processes import OnProgress
from data.prepare.common.set_folder import LocalFolder, SetFolder
from data.prepare.common.settings_file import begin_or_resume
from data.prepare.common.shard_files import (
    SUMMARY_FILE,
    UNREADABLE,
    LeftOutSample,
    PreparedSample,
    describe,
    make_shard,
    missing_shards,
    read_stats,
    summarise,
    summarise_once,
)
from data.prepare.common.shared_work import SetProgress, workforce
from data.prepare.images.options import ImageOptions, ImageSettings
from data.prepare.images.preparing import PADDED, SamplePreparer, given_folder
from data.prepare.images.sources import FolderSource, ImageSource, SampleFaultError, open_source
from data.shards.tar_headers import BrokenShardError
from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError

SETTINGS_FILE = "images.json"
_NAMES_ONLY = ("source",)
_FORMAT = 1
"""Raised when the same settings would give other shards."""
_REPORT_EVERY = 32


@dataclass(frozen=True)
class ImageSet:
    """A set of image shards."""

    options: ImageOptions
    source_fingerprint: str
    """Fingerprint of the source's names and sizes, not of the files' contents."""
    count: int
    """Samples of the source."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the shards depend on, but for the contents of the source's files."""
        own = {field.name: getattr(self.options, field.name) for field in fields(ImageSettings)}
        if self.options.image_folder is None:
            del own["image_folder"]  # as in sets of versions without it
        return {**own, "source_fingerprint": self.source_fingerprint, "count": self.count, "format": _FORMAT}

    @property
    def shards(self) -> int:
        """Number of shards of the complete set."""
        return -(-self.count // self.options.samples_per_shard)

    def indices(self, shard: int) -> range:
        """The samples of the source that a shard is made of."""
        size = self.options.samples_per_shard
        return range(shard * size, min((shard + 1) * size, self.count))


@dataclass(frozen=True)
class ImageJob:
    """Makes shards of a set of images; a `shared_work.ShardJob`."""

    image_set: ImageSet
    folder: SetFolder
    device: str
    """ "cpu" or "cuda", for a condition that is made by a network."""

    def is_complete(self, shard: int) -> bool:
        return read_stats(self.folder, shard) is not None

    def work(self, process: int, tasks: Iterable[ShardTask], on_progress: OnProgress) -> None:
        options = self.image_set.options
        source = open_source(
            options.source,
            options.image_column,
            options.caption_column,
            options,
            _folder(options.image_folder),
        )
        prepare = SamplePreparer(options, str(device_of(self.device, process)))
        with same_bits(self.device):
            for shard, claim in tasks:
                samples = _samples(source, prepare, self.image_set.indices(shard))
                try:
                    make_shard(self.folder, shard, _reported(samples, on_progress), claim)
                except OSError as error:
                    raise CheckpointNotWritten(
                        f"a shard could not be written to '{self.folder}': {write_failure(error)}."
                    ) from error


def run(options: ImageOptions) -> str:
    """Makes the missing shards of a set and summarises it.

    Raises:
        UserError: for an input that cannot be used.
        CheckpointNotWritten: if a shard cannot be written.
        Interrupted: after Ctrl-C.
    """
    # A network that makes condition images runs on the GPUs; everything else here is work for a CPU.
    network = options.condition is not None and options.condition.startswith("depth:")
    image_set, folder = _open_set(options), options.output
    with workforce(options, network) as workers:
        SamplePreparer(options)  # a condition that cannot be used is refused before anything is written
        if _same_folder(folder, options.source):
            raise UserError(
                f"--out is '{options.out}', the folder of --from; give another folder for the shards."
            )
        begin_or_resume(folder, SETTINGS_FILE, image_set.settings, _NAMES_ONLY)
        before = folder.read(SUMMARY_FILE)
        shards = missing_shards(folder, image_set.shards, options.part)
        started = time.monotonic()
        progress = SetProgress({shard: len(image_set.indices(shard)) for shard in shards}, "images")
        workers.make(ImageJob(image_set, folder, workers.device), shards, progress)
    seconds = time.monotonic() - started
    summary = summarise_once(
        folder,
        before,
        lambda: summarise(folder, image_set.shards, image_set.settings, progress.read, seconds),
    )
    message = (
        f"{progress.read} samples read in {seconds:.1f} s; {describe(folder, image_set.shards, summary)}"
    )
    padded = int(summary.get("sums", {}).get(PADDED, 0))
    if padded:
        message += f"; {padded} have uniform bands around them: download with img2dataset's resize_mode keep_ratio, not border"
    unused = _without_image(image_set)
    if unused:
        message += (
            f"; {len(unused)} condition images have no image of their name in --from, such as {unused[0]}"
        )
    return message


def _same_folder(folder: SetFolder, source: str) -> bool:
    return isinstance(folder, LocalFolder) and folder.path.resolve() == Path(source).resolve()


def _without_image(image_set: ImageSet) -> list[str]:
    """Files of the folder of condition images whose names no image has."""
    given, source = given_folder(image_set.options.condition), image_set.options.source
    if given is None:
        return []
    known = {Path(path).with_suffix("") for path in FolderSource(Path(source)).paths}
    found = (path.relative_to(given) for path in given.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if path.with_suffix("") not in known)


def _open_set(options: ImageOptions) -> ImageSet:
    source = open_source(
        options.source, options.image_column, options.caption_column, options, _folder(options.image_folder)
    )
    if given_folder(options.condition) is not None and not isinstance(source, FolderSource):
        raise UserError(
            f"--condition {options.condition} finds its images by the paths of a folder of images, and --from is none; in "
            "tars they are members of the sample (cond.png)."
        )
    return ImageSet(options, source.fingerprint, len(source))


def _folder(named: str | None) -> Path | None:
    return None if named is None else Path(named).expanduser()


def _samples(
    source: ImageSource, prepare: SamplePreparer, indices: Sequence[int]
) -> Iterator[PreparedSample | LeftOutSample]:
    for index in indices:
        key = f"{index:09d}"
        try:
            sample = source.read(index)
        except SampleFaultError as error:
            yield LeftOutSample(key, UNREADABLE, str(error))
            continue
        except (BrokenShardError, OSError) as error:
            raise UserError(f"--from: {error}") from error
        try:
            yield prepare(key, sample)
        except SampleFaultError as error:
            yield LeftOutSample(key, UNREADABLE, f"{sample.where}: {error}")
        except (OSError, ValueError) as error:
            # Not the sample's fault: a network that makes condition images and cannot be loaded.
            raise UserError(f"--condition: {error}") from error


def _reported(
    samples: Iterator[PreparedSample | LeftOutSample], on_progress: OnProgress
) -> Iterator[PreparedSample | LeftOutSample]:
    """The same samples; reports the progress every few."""
    count = 0
    for count, sample in enumerate(samples, 1):
        yield sample
        if count % _REPORT_EVERY == 0:
            on_progress(_REPORT_EVERY)
    if count % _REPORT_EVERY:
        on_progress(count % _REPORT_EVERY)
