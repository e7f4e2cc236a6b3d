"""One pass over a set of images, in which every requested network measures each of them; shared among processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.prepare.common.machine import default_processes, device_of, same_bits
from data.prepare.common.processes import OnProgress, run_all
from data.prepare.common.progress import ProgressBar
from evaluation.images.samples import Reader, Samples, stacked
from evaluation.metrics.sampled import SampledMetric
from evaluation.protocols.image_protocol import Measurement
from evaluation.protocols.metric_table import shared_networks
from evaluation.runner.row_store import MeasuredBatch, RowStore
from sdxs_lightning.core.errors import UserError

STEP_THREADS = 4
BATCHES_PER_PROCESS = 4
"""With fewer, loading the networks once more takes longer than the work that it saves."""


@dataclass(frozen=True)
class MetricPass:
    """One network measuring a set of images."""

    measurement: Measurement
    """Names the network."""
    steps: tuple[str, ...]
    """What happens to an image first."""
    store: RowStore
    """Takes what it says."""


@dataclass(frozen=True)
class PassJob:
    """A job for processes; its parts are batches."""

    samples: Samples
    """The images."""
    metric_passes: tuple[MetricPass, ...]
    """One per network and image steps; all stores have the same batches."""
    captions: tuple[str, ...] | None
    """One an image."""
    weights: tuple[tuple[str, str], ...]
    """Where networks are, by kind."""
    device: str
    """ "cpu" or "cuda"."""
    processes: int
    """At most so many."""
    one_size: bool
    """Refuses images of different sizes, which no generator makes."""
    kept_images: Path | None = None
    """Takes the first images as PNG files, for reports."""
    keep_images: int = 0
    """How many."""

    def missing(self) -> list[int]:
        """Batches that are not done."""
        store = self.metric_passes[0].store
        undone = {batch for metric_pass in self.metric_passes for batch in metric_pass.store.missing()}
        undone |= {
            number // store.batch_size
            for number in range(min(self.keep_images, store.count))
            if not self.kept_image(number).is_file()
        }
        return sorted(undone)

    def kept_image(self, number: int) -> Path:
        """Where a picture is kept."""
        assert self.kept_images is not None
        return self.kept_images / f"{number:06d}.png"

    def work(self, process: int, parts: Sequence[int], told: OnProgress) -> None:
        """See data/prepare/processes.py."""
        device = device_of(self.device, process)
        with same_bits(self.device):
            try:
                read = self.samples.open(device)
                networks = shared_networks(self.weights)
                metrics = [networks.metric(metric_pass.measurement) for metric_pass in self.metric_passes]
                for part, images in self._read(read, parts):
                    self._measure(part, images, metrics, device)
                    told(len(images))
            except torch.OutOfMemoryError as error:
                size = self.metric_passes[0].store.batch_size
                raise UserError(
                    f"{size} images at once do not fit the GPU; give a smaller --batch_size ({error})."
                ) from error
            except (OSError, ValueError) as error:
                raise UserError(str(error)) from error

    def _read(self, read: Reader, parts: Sequence[int]) -> Iterator[tuple[int, list[Image.Image]]]:
        """The batches with their images; files of the next one are decoded while the networks measure this one."""
        numbers = self.metric_passes[0].store.numbers
        if not self.samples.are_files:
            for part in parts:
                yield part, read(numbers(part))
            return
        with ThreadPoolExecutor(1) as ahead:
            reading = deque([ahead.submit(read, numbers(parts[0]))])
            for part, following in zip_longest(parts, parts[1:]):
                if following is not None:
                    reading.append(ahead.submit(read, numbers(following)))
                yield part, reading.popleft().result()

    def _measure(
        self,
        batch: int,
        images: Sequence[Image.Image],
        metrics: Sequence[SampledMetric],
        device: torch.device,
    ) -> None:
        numbers = self.metric_passes[0].store.numbers(batch)
        sizes = np.array([image.size for image in images], dtype=np.int64)
        if self.one_size:
            refuse_mixed_sizes(sizes, numbers[0])
        for number, image in zip(numbers, images, strict=True):
            if number < self.keep_images:
                self.kept_image(number).parent.mkdir(parents=True, exist_ok=True)
                image.save(self.kept_image(number))
        captions = None if self.captions is None else [self.captions[number] for number in numbers]
        for metric_pass, metric in zip(self.metric_passes, metrics, strict=True):
            if metric_pass.store.path(batch).is_file():
                continue
            with ThreadPoolExecutor(
                STEP_THREADS
            ) as threads:  # Pillow lets go of the interpreter while it resizes
                ready = list(
                    threads.map(partial(self.samples.prepare, steps=metric_pass.steps), images, numbers)
                )
            metric_pass.store.save(batch, MeasuredBatch(rows_of(metric, ready, captions, device), sizes))


def rows_of(
    metric: SampledMetric, images: Sequence[Image.Image], captions: Sequence[str] | None, device: torch.device
) -> Tensor:
    """What a metric keeps of images that may differ in size: (B, k), in their order."""
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


def refuse_mixed_sizes(sizes: np.ndarray[Any, Any], first: int) -> None:
    """Checks (n, 2) widths and heights of the images from number `first` on.

    Raises:
        UserError: if they differ.
    """
    other = np.flatnonzero((sizes != sizes[0]).any(axis=1))
    if len(other):
        (width, height), (other_width, other_height) = sizes[0].tolist(), sizes[other[0]].tolist()
        raise UserError(
            f"the images are of different sizes: number {first} has {width} x {height} pixels, number "
            f"{first + int(other[0])} has {other_width} x {other_height}; one model makes images of one size, so give its "
            "images alone."
        )


def run_pass(job: PassJob, what: str) -> dict[MetricPass, MeasuredBatch]:
    """Measures what is missing, and reads all of it.

    Args:
        job: the pass.
        what: is measured, for the progress bar.

    Raises:
        RunStopped: if a process cannot go on.
    """
    missing = job.missing()
    if missing:
        store = job.metric_passes[0].store
        told = ProgressBar(sum(len(store.numbers(batch)) for batch in missing), f"{what}: images")
        run_all(job, missing, told)
    parts = {metric_pass: metric_pass.store.all() for metric_pass in job.metric_passes}
    if job.one_size:
        refuse_mixed_sizes(next(iter(parts.values())).sizes, 0)
    return parts


def processes_for(asked: int | None, device: str, batches: int) -> int:
    """What `--processes` means: None is one a GPU or core, but no more than are worth loading the networks for."""
    if asked is not None:
        if asked < 1:
            raise UserError(f"--processes is {asked}, but at least 1 is needed.")
        return asked
    return max(1, min(default_processes(device), batches // BATCHES_PER_PROCESS))


def load_kept_images(job: PassJob) -> Mapping[int, Image.Image]:
    """The pictures that a finished pass has kept, by number."""
    found = {}
    for number in range(min(job.keep_images, job.metric_passes[0].store.count)):
        with Image.open(job.kept_image(number)) as opened:
            found[number] = opened.convert("RGB")
    return found
