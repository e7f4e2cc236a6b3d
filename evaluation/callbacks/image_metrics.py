"""FID, CLIP score and other metrics of a student during training, under an image protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor

from evaluation.callbacks.score_curve import ScoreCurve
from evaluation.callbacks.student_updates import averaged_student, check_counts
from evaluation.images.generate import ImageMaker, rank_batches
from evaluation.images.prompt_files import read_prompts
from evaluation.images.samples import stacked
from evaluation.metrics.estimates import Estimate
from evaluation.metrics.sampled import SampledMetric
from evaluation.networks.image_steps import apply_steps
from evaluation.protocols.image_protocol import Measurement, hashed_settings, metric_hash
from evaluation.protocols.metric_table import NetworkCache
from evaluation.protocols.names import REFERENCE_METRICS
from evaluation.protocols.protocols import IMAGE_PROTOCOLS
from evaluation.protocols.references import Reference, read_reference
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.stages.distillation.step import OneStepDistillation


class ImageMetrics(ScoreCurve):
    """Metrics of the averaged student every n student updates, under the same hashes as `python -m evaluation.evaluate`.

    All ranks share the samples.

    Args:
        captions: file of prompts, as `--captions` of `python -m evaluation.evaluate`.
        reference: npz of the real images, from `python -m evaluation.reference`; None if no metric needs one.
        every_n_student_updates: measuring interval.
        protocol: an image protocol.
        metrics: None for the protocol's.
        samples: number of images, None for the protocol's; FID depends on it, and the hash changes.
        batch_size: images per call on each device.
        weights: files or folders of metric networks by kind (`inception`, `clip_text`, ...), in place of their usual location.
        at_start: also before the first update.

    Raises:
        UserError: for a toy protocol, or too few captions.
    """

    def __init__(
        self,
        captions: str,
        reference: str | None = None,
        every_n_student_updates: int = 1000,
        protocol: str = "coco2014-30k-256",
        metrics: list[str] | None = None,
        samples: int | None = None,
        batch_size: int = 16,
        weights: dict[str, str] | None = None,
        at_start: bool = False,
    ) -> None:
        super().__init__(every_n_student_updates, at_start)
        check_counts(type(self).__name__, samples=samples, batch_size=batch_size)
        if protocol not in IMAGE_PROTOCOLS:
            raise UserError(
                f"ImageMetrics takes one of {', '.join(IMAGE_PROTOCOLS)}, got '{protocol}'; DistillationMetrics measures "
                "under the toy world's protocols."
            )
        self.protocol = replace(
            IMAGE_PROTOCOLS[protocol], samples=samples or IMAGE_PROTOCOLS[protocol].samples
        )
        self.prompts = read_prompts(captions).selection(self.protocol.samples, captions)
        names = metrics or [one.metric for one in self.protocol.measurements]
        self.measurements = [self.protocol.measurement(name) for name in names]
        self.reference, self.batch_size = reference, batch_size
        self.latest: dict[str, Estimate] = {}
        """Last measurement, with intervals."""
        self._networks = NetworkCache(weights or {})
        self._references: dict[str, Reference] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Loads the networks and the reference, so that missing files are reported before training starts."""
        for one in self.measurements:
            identity = self._networks.identity(one)
            if one.metric not in REFERENCE_METRICS:
                continue
            if self.reference is None or not self.reference.endswith(".npz"):
                raise UserError(
                    f"ImageMetrics: {one.metric} needs `reference`, the npz of `python -m evaluation.reference`, got "
                    f"{self.reference}."
                )
            found = read_reference(Path(self.reference), one, identity)
            count = len(self.prompts.captions)
            self._networks.require_fit(one, count, found.count, found, self.reference)
            self._references[one.metric] = found

    def scores_of(self, trainer: pl.Trainer, module: OneStepDistillation) -> dict[str, float]:
        maker = averaged_student(trainer, module, self.protocol.seed)
        ranks = trainer.global_rank, trainer.world_size
        self.latest = self.estimates(maker, module.device, *ranks)
        return {name: estimate.value for name, estimate in self.latest.items()}

    def estimates(
        self, maker: ImageMaker, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> dict[str, Estimate]:
        """All metrics over all ranks; collective.

        Args:
            maker: generates the images.
            device: device of the networks and metric states.
            rank: rank of this process.
            world_size: number of processes that share the samples.
        """
        metrics = [
            self._networks.metric(one, self._references.get(one.metric)).to(device)
            for one in self.measurements
        ]
        for ids, counting in rank_batches(len(self.prompts.captions), self.batch_size, rank, world_size):
            captions = [self.prompts.captions[number] for number in ids.tolist()]
            images = maker(captions, ids)[:counting]
            add_images(self.measurements, metrics, images, captions[:counting], ids[:counting])
        return {name: value for metric in metrics for name, value in metric.estimates().items()}

    def protocol_id(self) -> dict[str, Any]:
        hashes = {one.metric: self._hash(one) for one in self.measurements}
        estimates = {name: estimate.as_dict() for name, estimate in self.latest.items()}
        return {"protocol": self.protocol.name, "hash": hashes, "estimates": estimates}

    def networks(self) -> list[Any]:
        return self._networks.all()

    def _hash(self, one: Measurement) -> str:
        reference = self._references.get(one.metric)
        return metric_hash(
            hashed_settings(
                self.protocol,
                one,
                self._networks.identity(one),
                len(self.prompts.captions),
                "lossless",
                self.prompts.digest(),
                None if reference is None else reference.digest,
            )
        )


def add_images(
    measurements: Sequence[Measurement],
    metrics: Sequence[SampledMetric],
    images_uint8: Tensor,
    captions: Sequence[str],
    sample_ids: Tensor,
) -> None:
    """Adds images (B,3,H,W) to all metrics; metrics that use one network after the same steps share its output."""
    if len(images_uint8) == 0:
        return
    rows: dict[tuple[int, tuple[str, ...]], Tensor] = {}
    for one, metric in zip(measurements, metrics, strict=True):
        key = (id(metric.source), one.steps)
        if key not in rows:
            rows[key] = metric.measure(stepped(images_uint8, one.steps), captions)
        metric.add(rows[key], sample_ids)


def stepped(images_uint8: Tensor, steps: Sequence[str]) -> Tensor:
    """Applies the steps of a protocol to images (B,3,H,W) uint8; on the same device."""
    if not steps:
        return images_uint8
    frames = images_uint8.permute(0, 2, 3, 1).cpu().numpy()
    return stacked([apply_steps(Image.fromarray(frame), steps) for frame in frames], images_uint8.device)
