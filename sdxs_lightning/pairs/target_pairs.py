"""Pairs (noise, latents) of a target sampler: from memory, from the batch, or sampled in the step; or of the data.

They are used by terms with `needs_pairs` (`Regression`, `FeatureMatching`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.core.guidance_scale import read_guidance_scale
from sdxs_lightning.core.pair_noise import pair_noise
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.pairs.ode_schedulers import check_scheduler
from sdxs_lightning.pairs.scheduler_sampler import SchedulerSampler
from sdxs_lightning.pairs.stored_pairs import (
    Extract,
    Guide,
    PickedPairs,
    StoredPairs,
    planned_pairs,
    sample_pairs,
)
from sdxs_lightning.pairs.target_sampler import TargetSampler, make_sampler

PairSource = Literal["memory", "batch", "on_the_fly", "data"]


@runtime_checkable
class CaptionSource(Protocol):
    """A DataModule that provides a fixed list of prompts of the training split."""

    def train_captions(self, count: int) -> list[str]:
        """Returns the first `count` captions in stored order, or all if there are fewer."""


@dataclass(frozen=True)
class PairSettings:
    """PairSource of the pairs, and settings of the target sampler."""

    source: PairSource = "memory"
    """"memory": `count` pairs are sampled at the start of the fit, for prompts of the training data. "batch": stored pairs from
    the loader, made by `python -m data.prepare pairs`; a GAN in the same run then treats their targets as real data.
    "on_the_fly": the target sampler runs in every step, for the batch's prompts and the student's noise. "data": the batch's
    own latents, with noise that has nothing to do with them; only for the stage `controlnet`, whose condition images say what
    the noise then cannot."""
    count: int = 2048
    """Number of pairs in memory; each costs `sampler_steps` guided network calls."""
    every_nth_sample: int = 1
    """After the warm-up, every n-th sample of a micro-batch is from a pair, for the terms that need pairs; the others have the
    batch's prompts and noise of their own, and terms without pairs get both, as in DMD (arXiv:2311.18828, algorithm 1). With 1
    no term sees another noise or prompt than the pairs'."""
    sampler_steps: int = 15
    """Number of steps of the target sampler."""
    guidance_scale: float | None = 3.0
    """Guidance scale of the target sampler; 1 means none. Null, for a student with `student.guidance`, gives each pair a scale
    and a negative prompt as `student.guidance` draws them: the student learns what they do from the sampler's images."""
    spacing: Spacing = "trailing"
    """Timestep spacing of the target sampler; "trailing" starts at the noise level of the student's input."""
    scheduler: str | None = None
    """Class name of a deterministic diffusers scheduler; null is DDIM."""
    weights: str | None = None
    """U-Net or pipeline folder, or hub id, of another target sampler, such as a few-step fine-tune; null uses the base."""
    sampler_batch_size: int = 64
    """Batch size per device for sampling pairs into memory."""

    def __post_init__(self) -> None:
        if self.source not in get_args(PairSource):
            raise ValueError(
                f"pairs.source is '{self.source}', accepted are {', '.join(get_args(PairSource))}."
            )
        if self.guidance_scale is not None:
            scale = read_guidance_scale("pairs.guidance_scale", self.guidance_scale)
            object.__setattr__(self, "guidance_scale", scale)
        elif not self.samples:
            raise ValueError(
                f"pairs.guidance_scale is null, but the pairs of pairs.source '{self.source}' are ready: give the scale that "
                "they were made with, or set pairs.source to memory or on_the_fly."
            )
        for name in ("count", "every_nth_sample", "sampler_steps", "sampler_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"pairs.{name} must be 1 or more, got {getattr(self, name)}.")
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if not self.samples and self.weights is not None:
            raise ValueError(
                f"pairs.weights is '{self.weights}', but pairs.source '{self.source}' samples nothing; set pairs.weights to "
                "null, or name the checkpoint to `python -m data.prepare pairs`."
            )

    @property
    def samples(self) -> bool:
        """Whether the source runs a target sampler."""
        return self.source not in ("batch", "data")

    @property
    def samples_real_score(self) -> bool:
        """Whether the target sampler runs the base, which the stage holds as its real score."""
        return self.samples and self.weights is None


class TargetPairs:
    """Provides the pairs of a run, from any source; registers no module with Lightning.

    Call order: `build` (configure_model), `to` (on_fit_start), `start` (on_train_start), `pick` (training_step).

    Args:
        settings: source and sampler.
        seed: seed of the run.
    """

    def __init__(self, settings: PairSettings, seed: int) -> None:
        self.settings = settings
        self.own: Frozen[Denoiser] | None = None
        """The target sampler's network if it is not the real score; sharded and planned like it."""
        self.extract: Extract | None = None
        """Makes condition images of the targets' images, for pairs in memory; set by the stage `controlnet`."""
        self.guide: Guide | None = None
        """Gives each pair its guidance scale and negative prompt; set by the stage if `settings.guidance_scale` is None."""
        self._seed = seed
        self._family: Family | None = None
        self._sampler: TargetSampler | SchedulerSampler | None = None
        self._stored: StoredPairs | None = None
        self._planned = False

    def build(self, family: Family) -> None:
        """Loads the network of `weights`, if set."""
        self._family = family
        if self.settings.weights is not None:
            unet = family.load_unet(self.settings.weights, "pairs.weights")
            own = Denoiser(unet, family.schedule, family.prediction_type)
            self.own = Frozen(own)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.own is not None:
            self.own.to(device, dtype)

    def frozen_networks(self) -> dict[str, nn.Module]:
        """The network of `weights`, if set, by name, for the memory plan."""
        return {} if self.own is None else {"target_sampler": self.own.module}

    def start(self, real_score: Denoiser | None, datamodule: object) -> None:
        """Builds the sampler, and samples the pairs in memory. Every rank must call it once per fit, also when resuming.

        Args:
            real_score: the frozen base; unused if `weights` is set.
            datamodule: the Trainer's DataModule, whose captions are the prompts of pairs in memory.

        Raises:
            TypeError: for pairs in memory, if the DataModule is no `CaptionSource`.
            ValueError: for pairs in memory, if there are no captions; if the scheduler cannot sample this base.
        """
        assert self._family is not None
        settings = self.settings
        self._sampler = self._make_sampler(real_score, settings.sampler_steps)
        if settings.source == "memory" and self._stored is None:
            assert self._sampler is not None
            captions = _captions(datamodule, settings.count)
            rank_zero_info(
                f"Making {settings.count} pairs with {settings.sampler_steps} steps of the "
                f"{'base' if self.own is None else 'target sampler'}."
            )
            self._stored = sample_pairs(
                settings.count,
                settings.sampler_batch_size,
                captions,
                self._family,
                self._sampler,
                self._seed,
                self.extract,
                self.guide,
            )

    def plan(self, real_score: Denoiser | None) -> bool:
        """Replaces `start` in the memory plan: runs one sampler step, and allocates what `start` would store.

        Returns:
            Whether pairs are sampled before the first training step.
        """
        assert self._family is not None
        self._planned = True
        self._sampler = self._make_sampler(real_score, 1, scheduler=False)
        if self.settings.source != "memory":
            return False
        assert self._sampler is not None
        self._stored = planned_pairs(
            self.settings.count,
            self.settings.sampler_batch_size,
            self._family,
            self._sampler,
            self.extract is not None,
            self.guide,
        )
        return True

    @property
    def in_memory(self) -> bool:
        """Whether pairs are held in memory."""
        return self._stored is not None

    def forget(self) -> None:
        """Frees pairs and sampler; called after the last update that needs them."""
        self._stored, self._sampler, self._planned = None, None, False

    def part(self, batch: TrainingBatch) -> TrainingBatch:
        """The part of a batch after the warm-up whose samples are from pairs; in the memory plan all of it.

        Raises:
            ValueError: if `every_nth_sample` does not divide its size; ranks would have parts of different sizes.
        """
        if self._planned:  # an upper bound, at any batch size
            return batch
        return batch.every(self.settings.every_nth_sample, "pairs.every_nth_sample")

    def pick(self, batch: TrainingBatch) -> PickedPairs:
        """Returns one pair per sample of the micro-batch, detached.

        Args:
            batch: "memory" reads its positions, "on_the_fly" its positions and captions, "batch" its captions, latents,
                pair_noise_seeds, and original sizes and crops if present; "data" the same, but positions for the seeds.

        Raises:
            ValueError: for "batch", if the batch holds no pairs of this base; for "data", if it holds no latents of it.
        """
        match self.settings.source:
            case "memory":
                assert self._stored is not None, "start() comes first"
                return self._stored.pick(batch.positions)
            case "batch":
                return self._from_batch(batch)
            case "data":
                return self._from_data(batch)
        return self._sampled(batch)

    def _from_batch(self, batch: TrainingBatch) -> PickedPairs:
        assert self._family is not None
        shape = self._family.latent_shape()
        if batch.latents is None or batch.pair_noise_seeds is None or tuple(batch.latents.shape[1:]) != shape:
            latents = "no latents" if batch.latents is None else f"latents {tuple(batch.latents.shape[1:])}"
            seeds = "no pair_noise_seeds" if batch.pair_noise_seeds is None else "pair_noise_seeds"
            raise ValueError(
                f"pairs.source 'batch' needs latents {shape} and pair_noise_seeds in every batch and got {latents} and "
                f"{seeds}; point data.shards at what `python -m data.prepare pairs` wrote for this base and set "
                "data.contents to [latents, noise_seeds]."
            )
        return self._with_latents(batch, batch.latents, pair_noise(batch.pair_noise_seeds, shape))

    def _from_data(self, batch: TrainingBatch) -> PickedPairs:
        assert self._family is not None
        shape = self._family.latent_shape()
        if batch.latents is None or tuple(batch.latents.shape[1:]) != shape:
            found = "none" if batch.latents is None else str(tuple(batch.latents.shape[1:]))
            raise ValueError(
                f"pairs.source 'data' needs latents {shape} in every batch and got {found}; point data.shards at latent shards "
                "made with this base's VAE and let data.contents name latents, or take another pairs.source."
            )
        noise = normal(self._seed, Stream.STUDENT_NOISE, batch.positions, shape)
        return self._with_latents(batch, batch.latents, noise)

    def _with_latents(self, batch: TrainingBatch, latents: Tensor, noise: Tensor) -> PickedPairs:
        assert self._family is not None
        conditioning = self._family.encode_prompts(batch.captions, batch.original_sizes, batch.crops)
        return PickedPairs(noise, conditioning, self._family.scale_latents(latents))

    def _sampled(self, batch: TrainingBatch) -> PickedPairs:
        assert self._family is not None and self._sampler is not None, "start() comes first"
        noise = normal(self._seed, Stream.STUDENT_NOISE, batch.positions, self._family.latent_shape())
        conditioning = self._family.encode_prompts(batch.captions)
        if self.guide is not None:
            conditioning = self.guide(conditioning, batch.positions)
        return PickedPairs(noise, conditioning, self._sampler(noise, conditioning))

    def _make_sampler(
        self, real_score: Denoiser | None, steps: int, scheduler: bool = True
    ) -> TargetSampler | SchedulerSampler | None:
        if not self.settings.samples:
            return None
        denoiser = real_score if self.own is None else self.own.module
        assert denoiser is not None, "pairs of the base need the real score"
        settings = self.settings
        if settings.guidance_scale is None and denoiser.unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "pairs.guidance_scale is null, and the target sampler's network takes the guidance scale as an input "
                "(time_cond_proj_dim), as LCMs do, and is not to be guided: take what it was distilled from, or a number."
            )
        name = settings.scheduler if scheduler else None
        # Each pair's own scale goes before the sampler's.
        return make_sampler(denoiser, steps, settings.guidance_scale or 1.0, settings.spacing, name)


def _captions(datamodule: object, count: int) -> list[str]:
    if not isinstance(datamodule, CaptionSource):
        raise TypeError(
            f"pairs.source 'memory' takes its prompts from data.train_captions(count), which {type(datamodule).__name__} does "
            "not have; use another pairs.source, or a DataModule that has it."
        )
    return datamodule.train_captions(count)
