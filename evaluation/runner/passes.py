"""A pass of all requested networks over a set of images, distributed over processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.prepare.common.claims import ShardTask
from data.prepare.common.machine import default_processes, device_of, same_bits
from data.prepare.common.processes import OnProgress, run_all
from data.prepare.common.progress import CommandProgress
from data.prepare.common.set_folder import LocalFolder, SetFolder
from data.prepare.common.shared_work import LocalProcesses, SetProgress, Workforce
from evaluation.images.samples import Reader, Samples, is_constant, stacked
from evaluation.images.saved_images import SavedImages
from evaluation.metrics.sampled import SampledMetric
from evaluation.protocols.image_protocol import Measurement
from evaluation.protocols.metric_table import shared_networks
from evaluation.runner.row_store import MeasuredBatch, RowStore
from sdxs_lightning.core.errors import RunStopped, UserError

STEP_THREADS = 4
BATCHES_PER_PROCESS = 4
"""With fewer, loading the networks in another process takes longer than it saves."""


@dataclass(frozen=True)
class MetricPass:
    """One network over a set of images."""

    measurement: Measurement
    """Measurement that names the network."""
    steps: tuple[str, ...]
    """Image steps applied before the network."""
    store: RowStore
    """Store of the network's output."""


@dataclass(frozen=True)
class PassJob:
    """Job whose tasks are batches of images."""

    samples: Samples
    """The images."""
    metric_passes: tuple[MetricPass, ...]
    """One per network and image steps; all stores use the same batches."""
    captions: tuple[str, ...] | None
    """One caption per image."""
    weights: tuple[tuple[str, str], ...]
    """Locations of networks by kind."""
    device: str
    """"cpu" or "cuda"."""
    processes: int
    """Maximum number of processes."""
    kept_images: Path | None = None
    """Folder for PNG files of the first images, for reports."""
    keep_images: int = 0
    """Number of images to keep."""
    real: bool = False
    """Whether the images are reference images."""
    saved: SavedImages | None = None
    """Folder for all generated images; existing ones are read instead of generated again."""

    def missing(self) -> list[int]:
        """Incomplete batches."""
        store = self.metric_passes[0].store
        undone = {batch for metric_pass in self.metric_passes for batch in metric_pass.store.missing()}
        undone |= {
            number // store.batch_size
            for number in range(min(self.keep_images, store.count))
            if not self.kept_image(number).is_file()
        }
        if self.saved is not None:
            undone |= {batch for batch in range(store.batches) if not self.saved.has(store.numbers(batch))}
        return sorted(undone)

    def is_complete(self, batch: int) -> bool:
        """Whether a batch is in all stores, but for those of metrics that failed."""
        numbers = self.metric_passes[0].store.numbers(batch)
        return (
            all(
                one.store.path(batch).is_file() or one.store.failure() is not None
                for one in self.metric_passes
            )
            and all(self.kept_image(number).is_file() for number in numbers if number < self.keep_images)
            and (self.saved is None or self.saved.has(numbers))
        )

    def kept_image(self, number: int) -> Path:
        """Path of an image kept for reports."""
        assert self.kept_images is not None
        return self.kept_images / f"{number:06d}.png"

    def work(self, process: int, tasks: Iterable[int], on_progress: OnProgress) -> None:
        device = device_of(self.device, process)
        with same_bits(self.device):
            try:
                # Loads the model only if some image is not saved.
                make: Callable[[], Reader] = cache(lambda: self.samples.open(device))
                networks = shared_networks(self.weights)
                metrics = [networks.metric(metric_pass.measurement) for metric_pass in self.metric_passes]
                for task, images in self._read(make, tasks):
                    self._measure(task, images, metrics, device)
                    on_progress(len(images))
            except torch.OutOfMemoryError as error:
                size = self.metric_passes[0].store.batch_size
                raise UserError(
                    f"{size} images at once do not fit into GPU memory; give a smaller --batch_size ({error})."
                ) from error
            except (OSError, ValueError) as error:
                raise UserError(str(error)) from error

    def _read(
        self, make: Callable[[], Reader], tasks: Iterable[int]
    ) -> Iterator[tuple[int, list[Image.Image]]]:
        """Yield batches with their images; files of the next batch are decoded while the networks run."""
        numbers = self.metric_passes[0].store.numbers
        if not self.samples.are_files:
            for task in tasks:
                yield task, self._made(make, numbers(task))
            return
        read, tasks = make(), list(tasks)
        with ThreadPoolExecutor(1) as ahead:
            reading = deque([ahead.submit(read, numbers(tasks[0]))])
            for task, following in zip_longest(tasks, tasks[1:]):
                if following is not None:
                    reading.append(ahead.submit(read, numbers(following)))
                yield task, reading.popleft().result()

    def _made(self, make: Callable[[], Reader], numbers: Sequence[int]) -> list[Image.Image]:
        if self.saved is None:
            return make()(numbers)
        if self.saved.has(numbers):
            return self.saved.read(numbers)
        images = make()(numbers)
        for number, image in zip(numbers, images, strict=True):
            self.saved.write(number, image)
        return images

    def _measure(
        self,
        batch: int,
        images: Sequence[Image.Image],
        metrics: Sequence[SampledMetric],
        device: torch.device,
    ) -> None:
        numbers = self.metric_passes[0].store.numbers(batch)
        for number, image in zip(numbers, images, strict=True):
            if number < self.keep_images:
                self.kept_image(number).parent.mkdir(parents=True, exist_ok=True)
                image.save(self.kept_image(number))
        sizes = np.array([image.size for image in images], dtype=np.int64)
        constant = np.array([is_constant(image) for image in images])
        captions = None if self.captions is None else [self.captions[number] for number in numbers]
        for metric_pass, metric in zip(self.metric_passes, metrics, strict=True):
            store = metric_pass.store
            if store.path(batch).is_file() or store.failure() is not None:
                continue
            try:
                if not self.real and metric_pass.measurement.metric == "patch_fid":
                    refuse_smaller_than_patch(images, metric_pass.steps)
                # Pillow releases the GIL while it resizes.
                with ThreadPoolExecutor(STEP_THREADS) as threads:
                    ready = list(
                        threads.map(partial(self.samples.prepare, steps=metric_pass.steps), images, numbers)
                    )
                store.save(batch, MeasuredBatch(rows_of(metric, ready, captions, device), sizes, constant))
            except (torch.OutOfMemoryError, RunStopped, OSError):
                raise
            except Exception as error:  # other metrics continue
                store.fail(
                    f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
                )


@dataclass(frozen=True)
class SharedPass:
    """A pass whose images are generated: commands that use the same work folder share its batches; a `ShardJob`."""

    job: PassJob

    @property
    def folder(self) -> SetFolder:
        """Of the claims."""
        return LocalFolder(self.job.metric_passes[0].store.folder)

    def is_complete(self, shard: int) -> bool:
        return self.job.is_complete(shard)

    def work(self, process: int, tasks: Iterable[ShardTask], on_progress: OnProgress) -> None:
        self.job.work(process, (task.number for task in tasks), on_progress)


def rows_of(
    metric: SampledMetric, images: Sequence[Image.Image], captions: Sequence[str] | None, device: torch.device
) -> Tensor:
    """Rows (B, k) of a metric for images that may differ in size, in order."""
    groups: dict[tuple[int, int], list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(image.size, []).append(position)
    rows: list[Tensor | None] = [None] * len(images)
    for positions in groups.values():
        texts = None if captions is None else [captions[position] for position in positions]
        measured = metric.measure(stacked([images[position] for position in positions], device), texts)
        for position, row in zip(positions, measured.cpu(), strict=True):
            rows[position] = row
    return torch.stack([row for row in rows if row is not None])


def refuse_smaller_than_patch(images: Sequence[Image.Image], steps: Sequence[str]) -> None:
    """Refuse images smaller than the patch of patch FID, which the crop step leaves unchanged (as in DMD2).

    Raises:
        ValueError: for such an image. References such as COCO may contain some and are not checked.
    """
    patch = next((int(step.split()[1]) for step in steps if step.startswith("crop ")), 0)
    small = next((image.size for image in images if min(image.size) < patch), None)
    if small is not None:
        raise ValueError(
            f"patch FID crops {patch} x {patch} pixels out of each image, but an image has {small[0]} x {small[1]}; give "
            "images at full resolution"
        )


def run_pass(job: PassJob, what: str, workers: Workforce | None = None) -> dict[MetricPass, MeasuredBatch]:
    """Measure the missing batches and load all rows.

    Args:
        job: the pass.
        what: label of the progress bar.
        workers: who makes images; None are processes of this machine.

    Returns:
        Rows by network, without failed networks, whose stores have the reason.

    Raises:
        RunStopped: if a process fails.
    """
    for metric_pass in job.metric_passes:
        metric_pass.store.retry()
    missing = job.missing()
    if missing:
        store = job.metric_passes[0].store
        images = {batch: len(store.numbers(batch)) for batch in missing}
        if job.samples.are_files:
            run_all(job, missing, CommandProgress(sum(images.values()), f"{what}: images"))
        else:
            workers = workers or LocalProcesses(job.device, job.processes)
            workers.make(SharedPass(job), missing, SetProgress(images, f"{what}: images"))
    return {
        metric_pass: metric_pass.store.all()
        for metric_pass in job.metric_passes
        if metric_pass.store.failure() is None
    }


def processes_for(wanted: int | None, device: str, batches: int) -> int:
    """Number of processes for `--processes`: None is one per GPU or core, limited by BATCHES_PER_PROCESS."""
    if wanted is not None:
        if wanted < 1:
            raise UserError(f"--processes is {wanted}, but at least 1 is needed.")
        return wanted
    return max(1, min(default_processes(device), batches // BATCHES_PER_PROCESS))


def load_kept_images(job: PassJob) -> Mapping[int, Image.Image]:
    """Load the images kept by a finished pass, by number."""
    found = {}
    for number in range(min(job.keep_images, job.metric_passes[0].store.count)):
        with Image.open(job.kept_image(number), formats=("PNG",)) as opened:
            found[number] = opened.convert("RGB")
    return found
