"""Scores of the many-step teacher under a protocol, measured once and looked up afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from data.toy.world import captions
from evaluation.images.generate import ImageMaker, RealImages, Reconstructions, SampledImages
from evaluation.protocols.protocols import Protocol
from evaluation.reports.result_file import read_result, write_result
from evaluation.runner.machine import milliseconds_per_image, where
from sdxs_lightning.core.model_hash import hash_model, hash_weights
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.pairs.target_sampler import TargetSampler

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


GUIDANCE_SCALE = 1.5
STEPS = (50, 25, 8, 4, 1)
RESULTS = Path(__file__).parents[1] / "results" / "toy_teacher.json"

Entry = dict[str, Any]


@dataclass(frozen=True)
class Teacher:
    """A base model, sampled in few or many steps.

    The cost of n steps is reported as nfe n, although guidance doubles the batch of each step.
    """

    family: Family
    """The base model."""
    device: torch.device
    """Device of the sampling, to which the family has been moved."""
    guidance_scale: float = GUIDANCE_SCALE
    """1 means none."""
    spacing: Spacing = "trailing"
    """Spacing of the timesteps; "leading" starts below the noisiest ones, which degrades few-step sampling."""
    seed: int = 0
    """Seed of the noise, as in the protocol."""

    def images(
        self, steps: int, guidance_scale: float | None = None, denoiser: Denoiser | None = None
    ) -> SampledImages:
        """Image maker with the given number of steps, for the base's network or another denoiser."""
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        sampler = TargetSampler(denoiser or self._denoiser, steps, guidance_scale, self.spacing)
        return SampledImages(sampler, self.family, self.device, self.seed)

    def key(self) -> dict[str, Any]:
        """Everything that the scores depend on besides the protocol."""
        return {
            "base_sha256": hash_weights(self.family.folder),
            "base_files_sha256": hash_model(
                self.family.folder
            ),  # includes scheduler and other configurations
            "guidance_scale": self.guidance_scale,
            "spacing": self.spacing,
        }

    @cached_property
    def _denoiser(self) -> Denoiser:
        unet = self.family.load_unet().eval().requires_grad_(False)
        return Denoiser(unet, self.family.schedule, self.family.prediction_type).to(self.device)


def stored_entry(file: Path, protocol: Protocol) -> Entry | None:
    """A file's entry for a protocol; None if there is no file, or no entry in it.

    Raises:
        ValueError: if the file, or the entry, is none of `python -m evaluation.benchmarks.tables teacher`.
    """
    entry = read_result(file).get(protocol.name) if file.is_file() else None
    if entry is None:
        return None
    parts = [entry.get(name) for name in ("protocol", "teacher")] if isinstance(entry, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            f"{file}: its entry '{protocol.name}' is none of `python -m evaluation.benchmarks.tables teacher`; remove it, or "
            "name another file."
        )
    return dict(entry)


def look_up(files: Sequence[Path], protocol: Protocol, teacher: Teacher) -> Entry:
    """Stored measurements for this protocol and teacher; an empty entry if there are none."""
    fingerprint, key = protocol.fingerprint(), teacher.key()
    entry: Entry = {"protocol": protocol.describe(), "base": teacher.family.base, **key, "teacher": {}}
    for file in files:
        stored = stored_entry(file, protocol)
        if stored is None:
            continue
        same = stored["protocol"].get("fingerprint") == fingerprint
        if same and all(stored.get(name) == key[name] for name in key):
            entry = {**entry, **stored, "teacher": {**entry["teacher"], **stored["teacher"]}}
        else:
            rank_zero_warn(
                f"{file} holds measurements of another base or protocol {protocol.name!r}; they are not used"
            )
    return entry


def measure_missing(
    entry: Entry,
    protocol: Protocol,
    teacher: Teacher,
    steps: Sequence[int],
    measure_images: Callable[[str, ImageMaker, Sequence[str]], dict[str, float]],
    with_real: bool = True,
    keep: Callable[[Entry], None] = lambda entry: None,
) -> Entry:
    """Complete an entry with the missing measurements.

    Args:
        entry: entry from `look_up`.
        protocol: as in `look_up`.
        teacher: as in `look_up`.
        steps: numbers of teacher steps.
        measure_images: maps (label, maker, captions) to scores; handles progress, ranks and batch size.
        with_real: whether to measure real images and their reconstructions too.
        keep: gets the entry after each measurement.
    """
    prompts, fresh = protocol.captions(), captions(protocol.fresh_split, protocol.samples)
    real = RealImages(protocol.fresh_split, teacher.device)
    entry = {**entry, "teacher": dict(entry["teacher"])}
    if with_real and "real_vs_real" not in entry:
        entry["real_vs_real"] = measure_images("real images", real, fresh)
        keep(entry)
    if with_real and "vae_floor" not in entry:
        vae: AutoencoderKL = teacher.family.load_vae().to(teacher.device).eval()
        entry["vae_floor"] = measure_images("reconstructions", Reconstructions(real, vae), fresh)
        keep(entry)
    for count in steps:
        if str(count) not in entry["teacher"]:
            scores = measure_images(f"{count} steps", teacher.images(count), prompts)
            entry["teacher"][str(count)] = {"nfe": count, **scores}
            keep(entry)
    return entry


def add_timings(entry: Entry, teacher: Teacher, caption: str) -> Entry:
    """Add `ms_per_image` of each row on this machine, and of one call without guidance (the cost of a student)."""
    rows = {
        steps: {**row, "ms_per_image": milliseconds_per_image(teacher.images(int(steps)), caption)}
        for steps, row in entry["teacher"].items()
    }
    one_call = milliseconds_per_image(teacher.images(1, guidance_scale=1.0), caption)
    ratio = {steps: row["ms_per_image"] / one_call for steps, row in rows.items()}
    timings = {"one_call_ms_per_image": one_call, "latency_ratio": ratio, "latency_batch_size": 1}
    return {**entry, "teacher": rows, **timings, **where(teacher.device)}


def store(file: Path, name: str, entry: Entry) -> None:
    """Store an entry in a JSON file, keeping those of other protocols."""
    stored = read_result(file) if file.is_file() else {}
    write_result(file, stored | {name: entry})
