"""LightningDataModule of shards: the same global batches for any number of ranks and workers, exactly resumable."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.distributed import _InfiniteBarrier

from data.shards.dataset import ShardDataset
from data.shards.faults import Faults, Quarantine
from data.shards.image_sizes import sizes_of
from data.shards.images import Fitting
from data.shards.index import ShardSet, discard_outdated
from data.shards.layout import Content, EmptyCaptions
from data.shards.loader import Pass, ShardLoader
from data.shards.locations import is_remote
from data.shards.order.buckets import AnyOrder, BucketOrder, Buckets
from data.shards.order.mixture import Source
from data.shards.order.run_order import OrderSpec
from data.shards.remote.patience import Patience
from data.shards.remote.shard_cache import ShardCache
from data.shards.sample_decoder import Reading
from data.shards.sources import joined, open_sources, require_window, upcoming_shards
from data.shards.store import ShardStore
from sdxs_lightning.core.image_condition import ImageCondition

_ADVICE = {
    "shards": "point data.shards at the shards that the run began with, unchanged",
    "global_batch_size": "choose data.batch_size so that batch_size x devices is the same",
    "seed": "set data.seed back",
    "shuffle_window_shards": "set data.shuffle_window_shards back",
    "order_version": "use the version of this project that began the run",
    "weights": "set the weights of data.sources back",
    "buckets": "set data.buckets back",
}


_SETTINGS_FILES = ("images.json", "latents.json", "pairs.json")
"""Names of the settings of prepared sets."""


@dataclass(frozen=True)
class ShardSettings:
    """The options of `data` in YAML, as they were given.

    Raises:
        ValueError: for a value out of range, or two options that exclude each other.
    """

    shards: str | list[str]
    """A folder, a glob, a brace pattern such as `set/{00000..00127}.tar`, URLs that fsspec knows, `pipe:` and a command, or a
    list of these; [] with `sources`."""
    batch_size: int
    """Samples of a micro-batch on each device."""
    contents: list[Content] | None = None
    """Contents of a batch in addition to captions: latents, images, control_images, noise_seeds, sizes (original size and crop
    of latents, for SDXL); by default latents, and [] for captions alone."""
    num_workers: int = 0
    """Reading processes per device; the batches do not depend on it."""
    seed: int = 0
    """Seed of the order and of the random draws for each sample."""
    shuffle_window_shards: int = 64
    """Number of shards whose samples are shuffled together; 0 keeps the stored order."""
    resolution: int | None = None
    """Side of the square to which images are resized and cropped; None takes them unchanged."""
    empty_captions: EmptyCaptions = "refuse"
    """"refuse" treats a sample with an empty caption as a fault, "keep" trains on it."""
    index_folder: str | None = None
    """Folder of the indexes; by default they are next to the shards."""
    pin_memory: bool | None = None
    """Page-locked batches; by default on CUDA."""
    condition: ImageCondition | None = None
    """Computes control_images from the images on reading; None reads cond.png members."""
    sources: list[Source] | None = None
    """A mixture of data sets with weights, in place of `shards`."""
    buckets: Buckets | None = None
    """Aspect-ratio buckets for images; latents are batched by their stored size."""
    crop: Literal["center", "random"] = "center"
    """"random" draws a crop for each visit."""
    flip: bool = False
    """Mirror half of the visits."""
    caption_fields: list[str] | None = None
    """Fields of the json member, one of which is drawn for each visit; by default the text member, else the field `caption`."""
    faults: Faults | None = None
    """Replace bad samples within a budget; by default the first one stops the run."""
    cache_folder: str | None = None
    """Cache folder for remote shards; without it they are read by range requests each time."""
    cache_gb: float = 100.0
    """Maximum size of the cache in 10^9 bytes."""
    remote_timeout_s: float = 30.0
    """Seconds that a server of remote shards has for each answer."""
    remote_retry_s: float = 600.0
    """Seconds over which failures of that server are retried, before they count as a fault of the data."""
    fetch_ahead_windows: float = 1.0
    """Shuffle windows whose remote shards are fetched into the cache before they are read, as far as it has room; 0 fetches
    each shard when it is first read."""
    val_shards: str | list[str] | None = None
    """A validation set, for modules with a validation_step: read in the stored order, neither mirrored nor cropped at random;
    samples beyond the last complete global batch are left out."""
    draw_latents: bool = False
    """Draw latents from the VAE's posterior at each visit instead of taking its mean; for shards that
    `python -m data.prepare latents --store mean+logvar` wrote."""

    def __post_init__(self) -> None:
        _ = self._patience  # refuses limits out of range
        if self.batch_size < 1:
            raise ValueError(
                f"data.batch_size is {self.batch_size}, but a batch holds at least one sample on each device."
            )
        if self.num_workers < 0:
            raise ValueError(
                f"data.num_workers is {self.num_workers}, but it must be a number of processes: 0 or more."
            )
        if not self.fetch_ahead_windows >= 0:
            raise ValueError(
                f"data.fetch_ahead_windows is {self.fetch_ahead_windows}, but it must be a number of windows: 0 or more."
            )
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(
                f"data.resolution is {self.resolution}, but it must be a number of pixels: 1 or more."
            )
        if bool(self.shards) == bool(self.sources):
            raise ValueError(
                f"data.shards is {self.shards} and data.sources {self.sources}, but a run reads either one data set or a "
                "mixture."
            )
        if self.buckets is not None and self.resolution is not None:
            raise ValueError(
                f"data.buckets and data.resolution {self.resolution} exclude each other; the buckets' sizes come from side_px."
            )
        if self.buckets is not None and self.val_shards is not None:
            raise ValueError(
                "data.val_shards is read at one size and data.buckets makes many; set one of them to null."
            )

    @property
    def mixture(self) -> list[Source]:
        """The sources; a single one for a run with one data set."""
        return list(self.sources) if self.sources else [Source(self.shards)]

    @property
    def kept_indexes(self) -> str | None:
        """Folder of the indexes; None: next to the shards."""
        return self.index_folder or self.cache_folder

    @property
    def reading(self) -> Reading:
        return Reading(
            resolution=self.resolution,
            empty_captions=self.empty_captions,
            caption_fields=tuple(self.caption_fields or ()),
            condition=self.condition,
            fitting=Fitting(self.seed, self.crop == "random", self.flip),
            draw_latents=self.draw_latents,
        )

    def store(self) -> ShardStore:
        """A store for this process."""
        folder, patience = self.cache_folder, self._patience
        return ShardStore(None if folder is None else ShardCache(folder, self.cache_gb, patience), patience)

    @property
    def _patience(self) -> Patience:
        return Patience(self.remote_timeout_s, self.remote_retry_s)


class ShardDataModule(pl.LightningDataModule):
    """Training data from WebDataset tars."""

    settings: ShardSettings
    """All options."""

    def __init__(self, shards: str | list[str], batch_size: int, **settings: Any) -> None:
        """Store the settings; files are only opened in `prepare_data` and `setup`.

        Args:
            shards: a folder, a glob, a brace pattern such as `set/{00000..00127}.tar`, URLs that fsspec knows, `pipe:` and a
                command, or a list of these; [] with `sources`.
            batch_size: samples of a micro-batch on each device.
            settings: the other fields of `ShardSettings`.
        """
        super().__init__()
        self.settings = ShardSettings(shards, batch_size, **settings)
        self.batch_size = batch_size  # read by Lightning's tuner and logger
        self.contents: list[Content] = (
            ["latents"] if self.settings.contents is None else self.settings.contents
        )
        self.dataset: ShardDataset | None = None
        self._opened: list[ShardSet] | None = None
        self._loader: ShardLoader | None = None
        self._val_loader: ShardLoader | None = None
        if self.settings.val_shards is not None:
            # Only with val_shards: Lightning warns for every module that has the method and no validation_step.
            self.val_dataloader = self._open_val_loader  # type: ignore[method-assign]

    def prepare_data(self) -> None:
        """Compare the index with the shards, once per node for all ranks, and set the fault file of an earlier run aside.

        Shards without an index are indexed in `setup`, where all ranks share the work.
        """
        settings = self.settings
        if self._is_distributed:
            for source in settings.mixture:
                discard_outdated(
                    source.shards,
                    settings.kept_indexes,
                    settings.store(),
                    settings.faults is not None,
                    self._sized,
                )
        else:
            self._open()
        if settings.faults is not None and self.trainer is not None and self.trainer.ckpt_path is None:
            self._quarantine(settings.faults).set_aside()

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes and check that every sample has the required members."""
        if self.dataset is not None:
            return
        store = self.settings.store()
        sets = joined(self._open(store))
        if stage is not None and self._is_distributed:  # called by the Trainer, on all ranks
            # Nodes without a shared folder take different times to index, which may be longer than the time-out of a
            # collective.
            with _InfiniteBarrier():
                pass
        order, reading = self._order(sets)
        if store.cache is not None:
            require_window(store.cache, sets, self.settings.shuffle_window_shards)
        faults = self.settings.faults
        quarantine = None if faults is None else self._quarantine(faults, [sets])
        self.dataset = ShardDataset(
            sets,
            order,
            self.contents,
            reading=reading,
            store=store,
            quarantine=quarantine,
            upcoming=upcoming_shards(
                self._open(),
                order,
                store.cache,
                self.settings.shuffle_window_shards,
                self.settings.fetch_ahead_windows,
            ),
        )

    def _order(self, shards: ShardSet) -> tuple[AnyOrder | BucketOrder, Reading]:
        """Order of the run, and decoding settings."""
        settings, sets = self.settings, self._open()
        spec = OrderSpec(
            [one.sizes for one in sets],
            [source.weight for source in settings.mixture],
            settings.seed,
            settings.shuffle_window_shards,
        )
        if settings.buckets is None:
            return spec.order(), settings.reading
        stored_latents = "latents" in self.contents
        order, sizes = spec.bucketed(
            settings.buckets, sizes_of(shards.table), stored_latents, self._global_batch_size()
        )
        if stored_latents:
            return order, replace(settings.reading, latent_sizes=sizes)
        return order, replace(settings.reading, sizes=sizes)

    def _quarantine(self, faults: Faults, sets: list[ShardSet] | None = None) -> Quarantine:
        folder = "." if self.trainer is None else self.trainer.default_root_dir
        shards = None if sets is None else [place for found in sets for place in found.table.locations]
        return Quarantine(faults, folder, shards)

    def train_dataloader(self) -> ShardLoader:
        """This rank's loader.

        Raises:
            ValueError: if there are fewer samples than one global batch, or with
                Trainer(overfit_batches=...).
        """
        self.setup()
        assert self.dataset is not None
        if self.trainer is not None and getattr(self.trainer, "overfit_batches", False):
            raise ValueError(
                "trainer.overfit_batches has no meaning for a loader that continues through the epochs; point "
                "data.shards at a single small shard instead."
            )
        self._loader = self._loader_of(self.dataset, None if self.trainer is None else self._next_pass)
        return self._loader

    def _open_val_loader(self) -> ShardLoader:
        """This rank's loader of `val_shards`; every pass starts at the first sample."""
        settings = self.settings
        assert settings.val_shards is not None
        store = settings.store()
        tolerant = settings.faults is not None
        sets = open_sources([Source(settings.val_shards)], settings.kept_indexes, store, tolerant)
        order = OrderSpec([sets[0].sizes], [1.0], settings.seed, shuffle_window_shards=0).order()
        reading = replace(settings.reading, fitting=Fitting(settings.seed), draw_latents=False)
        quarantine = None if settings.faults is None else self._quarantine(settings.faults, sets)
        dataset = ShardDataset(
            joined(sets), order, self.contents, reading=reading, store=store, quarantine=quarantine
        )
        self._val_loader = self._loader_of(dataset, lambda batches: Pass(0, batches))
        return self._val_loader

    def _loader_of(self, dataset: ShardDataset, next_pass: Callable[[int], Pass] | None) -> ShardLoader:
        rank, world_size = self._rank_and_world_size()
        pin_memory = self.settings.pin_memory
        if pin_memory is None:
            pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return ShardLoader(
            dataset, self.batch_size, rank, world_size, self.settings.num_workers, pin_memory, next_pass
        )

    def teardown(self, stage: str | None = None) -> None:
        """Stop the workers and close the shards."""
        for loader in (self._loader, self._val_loader):
            if loader is not None:
                loader.close()
        self._loader = self._val_loader = None

    def train_captions(self, count: int) -> list[str]:
        """Captions of the first `count` samples in stored order, or of all if there are fewer."""
        self.setup()
        assert self.dataset is not None
        return self.dataset.captions(count)

    def state_dict(self) -> dict[str, Any]:
        """Settings that determine the sample at a position; the position itself is in the Trainer's counters."""
        return self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume if positions of the checkpoint would map to other samples.

        Raises:
            ValueError: if shards, seed, shuffle window, global batch, weights or buckets differ from the
                checkpoint's.
        """
        for name, now in self._identity().items():
            if state_dict.get(name, now) != now:
                advice = _ADVICE.get(name, _ADVICE["shards"])  # a fingerprint of them
                raise ValueError(
                    f"The checkpoint was written with {name} {state_dict[name]}, but this run has {now}: its "
                    f"position would mean other samples. To resume, {advice}; otherwise start a new run from the weights."
                )

    def _identity(self) -> dict[str, Any]:
        self.setup()
        assert self.dataset is not None
        return {
            "shards": self.dataset.shards.fingerprint,
            "global_batch_size": self._global_batch_size(),
            "seed": self.settings.seed,
            "shuffle_window_shards": self.settings.shuffle_window_shards,
            "order_version": self.dataset.order.version,
            "weights": [source.weight for source in self.settings.mixture],
            "buckets": None if self.settings.buckets is None else repr(self.settings.buckets),
            **self._made_with(),
        }

    def _made_with(self) -> dict[str, str]:
        """Fingerprints of what the shards were made from, such as the VAE, from the settings that `prepare` keeps beside them.

        Latents of another VAE have the same sizes, and so do not change the fingerprint of the shards.
        """
        found: dict[str, str] = {}
        for number, opened in enumerate(self._open()):
            location = opened.table.locations[0]
            for name in () if is_remote(location) else _SETTINGS_FILES:
                try:
                    settings = json.loads(Path(location).with_name(name).read_text())
                    kept = {key: str(one) for key, one in settings.items() if key.endswith("_fingerprint")}
                except (OSError, ValueError, AttributeError):  # none there, or not of prepare
                    continue
                found |= {f"{key} (set {number})": one for key, one in kept.items()}
        return found

    def _open(self, store: ShardStore | None = None) -> list[ShardSet]:
        settings = self.settings
        if self._opened is None:
            self._opened = open_sources(
                settings.mixture,
                settings.kept_indexes,
                store or settings.store(),
                settings.faults is not None,
                self._sized,
                checked=self._is_distributed and self.prepare_data_per_node,
            )
        return self._opened

    @property
    def _sized(self) -> str | None:
        """Sizes that the buckets need."""
        if self.settings.buckets is None:
            return None
        return "latents" if "latents" in self.contents else "images"

    @property
    def _is_distributed(self) -> bool:
        return self.trainer is not None and self.trainer.world_size > 1

    def _global_batch_size(self) -> int:
        return self.batch_size * self._rank_and_world_size()[1]

    def _rank_and_world_size(self) -> tuple[int, int]:
        # As for Lightning's own sampler: under tensor parallelism there are fewer data ranks than processes.
        layout = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (layout["rank"], layout["num_replicas"]) if layout else (0, 1)

    def _next_pass(self, batches_per_epoch: int) -> Pass:
        """The rest of the epoch after the batches completed so far, from the Trainer's counters."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        # `completed`, not `ready`, which also counts a batch in which a run was interrupted.
        limit = min(batches_per_epoch, self.trainer.num_training_batches)
        return Pass(progress.total.completed, int(limit) - progress.current.completed)
