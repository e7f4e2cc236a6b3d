"""Pairs (noise, latents) of a target sampler, from three sources: memory, the batch, or sampled in the step.

What the student descends on them is said elsewhere (`Regression`, `FeatureMatching`), how long by the curriculum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sdxs_lightning.batch import Conditioning, TrainingBatch
from sdxs_lightning.families import Family
from sdxs_lightning.latents import scale
from sdxs_lightning.pair_noise import pair_noise
from sdxs_lightning.seeding import Stream, integers, normal
from sdxs_lightning.teacher.denoiser import Denoiser
from sdxs_lightning.teacher.frozen import Frozen
from sdxs_lightning.teacher.scheduler_sampler import SchedulerSampler, check_scheduler
from sdxs_lightning.teacher.target_sampler import TargetSampler, make_sampler
from sdxs_lightning.timesteps import Spacing

Source = Literal["memory", "batch", "on_the_fly"]


@runtime_checkable
class CaptionSource(Protocol):
    """A DataModule that can name prompts of the training split, always the same ones."""

    def train_captions(self, count: int) -> list[str]:
        """The first `count` captions in stored order, or all if there are fewer."""


@dataclass(frozen=True)
class Pairs:
    """Where the pairs come from, and how their targets are sampled."""

    source: Source = "memory"
    """"memory": `count` pairs are sampled when the fit starts, on prompts of the training data. "batch": the loader's
    stored pairs, made by `python -m data.prepare pairs`. "on_the_fly": the target sampler runs in every step, on the batch's
    prompts and on the noise that the student gets there anyway."""
    count: int = 2048
    """Number of pairs in memory; each costs `sampler_steps` guided calls."""
    sampler_steps: int = 15
    """Steps of the target sampler."""
    guidance_scale: float = 3.0
    """Guidance of the target sampler; 1 means none."""
    spacing: Spacing = "trailing"
    """Timesteps of the target sampler; "trailing" begins where the student's noise is."""
    scheduler: str | None = None
    """Class name of a deterministic scheduler of diffusers; null is DDIM."""
    weights: str | None = None
    """U-Net or pipeline folder or hub id of another target sampler, such as a few-step finetune; null is the base."""
    sampler_batch_size: int = 64
    """Pairs in memory that are sampled at once, on each device."""

    def __post_init__(self) -> None:
        if self.source not in ("memory", "batch", "on_the_fly"):
            raise ValueError(
                f"pairs.source is '{self.source}', accepted are 'memory', 'batch' and 'on_the_fly'."
            )
        for name in ("count", "sampler_steps", "sampler_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"pairs.{name} must be 1 or more, got {getattr(self, name)}.")
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.source == "batch" and self.weights is not None:
            raise ValueError(
                f"pairs.weights is '{self.weights}', but pairs.source 'batch' samples nothing; set pairs.weights to null, or "
                "name the checkpoint to `python -m data.prepare pairs`."
            )

    @property
    def samples(self) -> bool:
        """Whether a network is needed."""
        return self.source != "batch"

    @property
    def samples_real_score(self) -> bool:
        """Whether that network is the base, which the stage holds as its real score."""
        return self.samples and self.weights is None


class PickedPairs(NamedTuple):
    """One pair per sample of a micro-batch."""

    noise: Tensor
    """(B, C, h, w), float32, N(0, 1): what the student is given."""
    conditioning: Conditioning
    """Of the pairs' prompts, unconditional twin included."""
    target: Tensor
    """(B, C, h, w), float32, scaled latents: what the target sampler made of the same noise and prompts."""


class TargetPairs:
    """The pairs of a run, whatever their source; holds no module that Lightning would see.

    In this order: `build` (configure_model), `to` (on_fit_start), `start` (on_train_start), `pick` (training_step).

    Args:
        settings: source and sampler.
        seed: of the run.
    """

    def __init__(self, settings: Pairs, seed: int) -> None:
        self.settings = settings
        self.own: Frozen[Denoiser] | None = None
        """The target sampler's network, where it is not the real score: to be sharded and planned like that one."""
        self._seed = seed
        self._family: Family | None = None
        self._sampler: TargetSampler | SchedulerSampler | None = None
        self._stored: StoredPairs | None = None

    def build(self, family: Family, dtype: torch.dtype = torch.float32) -> None:
        """Loads the network of `weights`, if there is one.

        Args:
            family: the base.
            dtype: of the frozen networks.
        """
        self._family = family
        if self.settings.weights is not None:
            unet = family.load_unet(self.settings.weights)
            own = Denoiser(unet, family.schedule, family.prediction_type)
            self.own = Frozen(own).to(dtype=dtype)

    def to(self, device: torch.device) -> None:
        """Moves the network of `weights`, if there is one."""
        if self.own is not None:
            self.own.to(device)

    def start(self, real_score: Denoiser | None, datamodule: object) -> None:
        """Makes the sampler, and the pairs in memory; every rank has to call it, once per fit, also of a resumed run.

        Args:
            real_score: the frozen base, with gradients off where it is shared; unused where `weights` are set.
            datamodule: of the Trainer; its captions are the prompts of pairs in memory.

        Raises:
            TypeError: for pairs in memory, with a DataModule that cannot name captions.
            ValueError: for pairs in memory, without captions; for a scheduler that cannot sample this base.
        """
        assert self._family is not None
        self._sampler = self._make_sampler(real_score, self.settings.sampler_steps)
        if self.settings.source == "memory" and self._stored is None:
            assert self._sampler is not None
            captions = _captions(datamodule, self.settings.count)
            rank_zero_info(
                f"Making {self.settings.count} pairs with {self.settings.sampler_steps} steps of the "
                f"{'base' if self.own is None else 'target sampler'}."
            )
            self._stored = sample_pairs(self.settings, captions, self._family, self._sampler, self._seed)

    def plan(self, real_score: Denoiser | None) -> bool:
        """Stands in for `start` in a memory plan: one step of the sampler, and room for what `start` would keep.

        Returns:
            Whether there was anything to do before the first step.
        """
        assert self._family is not None
        self._sampler = self._make_sampler(real_score, 1, scheduler=False)
        if self.settings.source != "memory":
            return False
        assert self._sampler is not None
        self._stored = planned_pairs(self.settings, self._family, self._sampler)
        return True

    def forget(self) -> None:
        """Gives the memory back, when the last update that needs pairs is over."""
        self._stored, self._sampler = None, None

    def pick(self, batch: TrainingBatch) -> PickedPairs:
        """The pairs of this micro-batch, without graph.

        Args:
            batch: of pairs in memory only its positions count; of "on_the_fly" also its captions; of "batch" its captions,
                latents and pair_noise_seeds, and original sizes and crops where it has them.

        Raises:
            ValueError: for "batch", where the batch holds no pairs of this base.
        """
        match self.settings.source:
            case "memory":
                assert self._stored is not None, "start() comes first"
                return self._stored.pick(batch.positions)
            case "batch":
                return self._from_batch(batch)
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
        return PickedPairs(
            noise=pair_noise(batch.pair_noise_seeds, shape),
            conditioning=self._family.encode_prompts(batch.captions, batch.original_sizes, batch.crops),
            target=scale(batch.latents, self._family.scaling_factor),
        )

    def _sampled(self, batch: TrainingBatch) -> PickedPairs:
        assert self._family is not None and self._sampler is not None, "start() comes first"
        noise = normal(self._seed, Stream.STUDENT_NOISE, batch.positions, self._family.latent_shape())
        conditioning = self._family.encode_prompts(batch.captions)
        return PickedPairs(noise, conditioning, self._sampler(noise, conditioning))

    def _make_sampler(
        self, real_score: Denoiser | None, steps: int, scheduler: bool = True
    ) -> TargetSampler | SchedulerSampler | None:
        if not self.settings.samples:
            return None
        denoiser = real_score if self.own is None else self.own.module
        assert denoiser is not None, "pairs of the base need the real score"
        settings = self.settings
        name = settings.scheduler if scheduler else None
        return make_sampler(denoiser, steps, settings.guidance_scale, settings.spacing, name)


class StoredPairs:
    """Pairs in memory: prompts and target latents; the noise is made anew from each pair's index.

    Prompt embeddings stay on the device, so that a batch is picked there without waiting for it: 2048 pairs are 0.5 GB
    for SD in float32.

    Args:
        conditioning: of n prompts; its unconditional twin has one row, which serves them all.
        targets: (n, C, h, w), scaled latents.
        seed: of the run.
    """

    def __init__(self, conditioning: Conditioning, twin: Conditioning, targets: Tensor, seed: int) -> None:
        self.conditioning = conditioning
        self.targets = targets
        self._twin = twin
        self._seed = seed

    def __len__(self) -> int:
        return len(self.targets)

    def pick(self, positions: Tensor) -> PickedPairs:
        """The pairs that stand at these positions of the run."""
        # Drawn with replacement: a function of the position alone needs no state of a shuffle. The stream is the one that
        # would make the student's noise at these positions, which the pair brings along here.
        chosen = integers(self._seed, Stream.STUDENT_NOISE, positions, 0, len(self))
        noise = normal(self._seed, Stream.PAIRS, chosen, tuple(self.targets.shape[1:]))
        return PickedPairs(noise, self._conditioning_of(chosen), self.targets[chosen])

    def _conditioning_of(self, chosen: Tensor) -> Conditioning:
        values = {entry.name: getattr(self.conditioning, entry.name) for entry in fields(Conditioning)}
        rows = {name: value[chosen] for name, value in values.items() if isinstance(value, Tensor)}
        twin = {
            f"negative_{name}": getattr(self._twin, name).expand_as(rows[name])
            for name in ("prompt_embeds", "pooled_prompt_embeds")
            if getattr(self._twin, name) is not None
        }
        return replace(self.conditioning, **rows, **twin)


@torch.no_grad()
def sample_pairs(
    settings: Pairs,
    captions: Sequence[str],
    family: Family,
    sampler: TargetSampler | SchedulerSampler,
    seed: int,
) -> StoredPairs:
    """Samples the target of every caption; ranks share the work and each gets all pairs.

    Args:
        settings: how many, and how many at once.
        captions: prompts; used again from the start when there are fewer than pairs.
        family: encodes them.
        sampler: makes the targets.
        seed: of the run; with a pair's index it determines the pair's noise.

    Returns:
        The same pairs on every rank, and after a resume.

    Raises:
        ValueError: without captions.
    """
    if not captions:
        raise ValueError("pairs in memory need captions and the training data has none.")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Rounded up to whole batches on every rank: a sharded network needs all ranks in every call.
    share = -(-settings.count // world_size)
    batches = []
    for start in range(0, share, settings.sampler_batch_size):
        count = min(settings.sampler_batch_size, share - start)
        first = rank * share + start
        index = torch.arange(first, first + count, device=family.schedule.alpha.device)
        prompts = [captions[i % len(captions)] for i in range(first, first + count)]
        noise = normal(seed, Stream.PAIRS, index, family.latent_shape())
        batches.append(sampler(noise, family.encode_prompts(prompts)))
        if len(batches) % 4 == 0:
            rank_zero_info(f"pairs: {world_size * (start + count)} of {world_size * share}")
    targets = _gather(torch.cat(batches), world_size)[: settings.count]
    prompts = [captions[i % len(captions)] for i in range(settings.count)]
    return StoredPairs(*_encode(family, prompts, settings.sampler_batch_size), targets, seed)


@torch.no_grad()
def planned_pairs(settings: Pairs, family: Family, sampler: TargetSampler | SchedulerSampler) -> StoredPairs:
    """What `sample_pairs` holds, and at most holds for a moment, for the memory plan.

    Args:
        settings: how many pairs, and how many are sampled at once.
        family: one without weights.
        sampler: of one step, on the meta device.
    """
    device = family.schedule.alpha.device
    count = min(settings.count, settings.sampler_batch_size)
    noise = torch.empty(count, *family.latent_shape(), device=device)
    sampler(noise, family.encode_prompts([""] * count))
    targets = torch.empty(settings.count, *family.latent_shape(), device=device)
    return StoredPairs(*_encode(family, [""] * settings.count, settings.sampler_batch_size), targets, 0)


def _encode(family: Family, prompts: list[str], batch_size: int) -> tuple[Conditioning, Conditioning]:
    """Conditioning of all prompts without its unconditional twin, and one row of the twin: it is the same for all."""
    parts = [family.encode_prompts(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    kept = {
        entry.name: torch.cat([getattr(part, entry.name) for part in parts])
        for entry in fields(Conditioning)
        if isinstance(getattr(parts[0], entry.name), Tensor) and not entry.name.startswith("negative_")
    }
    # Cloned: a view of one row would keep the whole batch.
    twin = parts[0][:1].unconditional()
    row = {
        entry.name: value.clone()
        for entry in fields(Conditioning)
        if isinstance(value := getattr(twin, entry.name), Tensor)
    }
    return Conditioning(**kept), Conditioning(**row)


def _gather(share: Tensor, world_size: int) -> Tensor:
    """The ranks' shares one after another, on every rank."""
    if world_size == 1:
        return share
    everything = share.new_empty((world_size * len(share), *share.shape[1:]))
    dist.all_gather_into_tensor(everything, share.contiguous())
    return everything


def _captions(datamodule: object, count: int) -> list[str]:
    if not isinstance(datamodule, CaptionSource):
        raise TypeError(
            f"pairs.source 'memory' takes its prompts from data.train_captions(count), which {type(datamodule).__name__} does "
            "not have; use another pairs.source, or a DataModule that has it."
        )
    return datamodule.train_captions(count)
