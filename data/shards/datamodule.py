"""Shards as a LightningDataModule: the same global batches for any ranks and workers, exactly resumed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl

from data.shards.bucketed import order_of
from data.shards.buckets import Buckets
from data.shards.dataset import Content, EmptyCaptions, Reading, ShardDataset
from data.shards.faults import Faults, Quarantine
from data.shards.image_condition import ImageCondition
from data.shards.images import Fitting
from data.shards.index import ShardSet
from data.shards.loader import Pass, ShardLoader
from data.shards.mixture import Source
from data.shards.plan import OrderPlan
from data.shards.shard_cache import ShardCache
from data.shards.sources import joined, open_sources, require_window
from data.shards.store import ShardStore

_ADVICE = {
    "shards": "point data.shards at the shards that the run began with, unchanged",
    "global_batch_size": "choose data.batch_size so that batch_size x devices is the same",
    "seed": "set data.seed back",
    "shuffle_window_shards": "set data.shuffle_window_shards back",
    "order_version": "use the version of this project that began the run",
    "weights": "set the weights of data.sources back",
    "buckets": "set data.buckets back",
}


class ShardDataModule(pl.LightningDataModule):
    """Training data from WebDataset tars."""

    def __init__(
        self,
        shards: str | list[str],
        batch_size: int,
        contents: list[Content] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_window_shards: int = 64,
        resolution: int | None = None,
        empty_captions: EmptyCaptions = "refuse",
        index_folder: str | None = None,
        pin_memory: bool | None = None,
        condition: ImageCondition | None = None,
        sources: list[Source] | None = None,
        buckets: Buckets | None = None,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        caption_fields: list[str] | None = None,
        faults: Faults | None = None,
        cache_folder: str | None = None,
        cache_gb: float = 100.0,
        val_shards: str | list[str] | None = None,
        draw_latents: bool = False,
    ) -> None:
        """Keep the settings; files are looked at in `prepare_data` and `setup`.

        Args:
            shards: a folder, a glob, a brace pattern such as `set/{00000..00127}.tar`, URLs that fsspec knows,
                `pipe:` and a command, or a list of these; [] with `sources`.
            batch_size: samples of a micro-batch on each device.
            contents: what a batch holds besides captions: latents, images, control_images, noise_seeds, sizes
                (original size and crop of latents, for SDXL); by default latents, and [] for captions alone.
            num_workers: reading processes per device; the batches do not depend on it.
            seed: of the order, and of what is drawn for each sample.
            shuffle_window_shards: shards whose samples are mixed with each other; 0 keeps the written order.
            resolution: side of the square that images are resized and cropped to; None takes them as they are.
            empty_captions: "refuse" stops at a sample without words, "keep" trains on it.
            index_folder: where indexes are kept if not beside the shards.
            pin_memory: page-locked batches; by default where the run is on CUDA.
            condition: makes control_images from the pictures while they are read; None reads cond.png members.
            sources: a mixture of data sets with weights, in place of `shards`.
            buckets: sizes of many aspects for images; latents are put together by the size they were stored in.
            crop: "random" draws a place for each visit.
            flip: mirror half of the visits.
            caption_fields: fields of the json member of which one is drawn for each visit; by default the text
                member, else the field `caption`.
            faults: replace bad samples within a budget; by default the first one stops the run.
            cache_folder: where remote shards are kept; without it they are read by ranges each time.
            cache_gb: 10^9 bytes that the cache may hold.
            val_shards: of a validation set, for modules with a validation_step: read in the written order, neither
                mirrored nor cropped at random; samples beyond the last whole global batch are left out.
            draw_latents: draw latents from the VAE's posterior at each visit instead of taking its mean; for shards that
                `python -m data.prepare latents --store mean+logvar` wrote.

        Raises:
            ValueError: for a setting that cannot be, or two that exclude each other.
        """
        super().__init__()
        if batch_size < 1:
            raise ValueError(
                f"data.batch_size is {batch_size}, but a batch holds at least one sample on each device."
            )
        if num_workers < 0:
            raise ValueError(
                f"data.num_workers is {num_workers}, but it is a number of processes: 0 or more."
            )
        if bool(shards) == bool(sources):
            raise ValueError(
                f"data.shards is {shards} and data.sources {sources}, but a run reads either one data set or a mixture."
            )
        if buckets is not None and resolution is not None:
            raise ValueError(
                f"data.buckets and data.resolution {resolution} exclude each other; the buckets' sizes come from side_px."
            )
        if buckets is not None and val_shards is not None:
            raise ValueError(
                "data.val_shards is read at one size and data.buckets makes many; set one of them to null."
            )
        self.sources = list(sources) if sources else [Source(shards or [])]
        self.shards = shards
        self.batch_size = batch_size
        self.contents: list[Content] = ["latents"] if contents is None else contents
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle_window_shards = shuffle_window_shards
        self.index_folder = index_folder or cache_folder
        self.pin_memory = pin_memory
        self.buckets = buckets
        self.faults = faults
        self.dataset: ShardDataset | None = None
        self._reading = Reading(
            resolution=resolution,
            empty_captions=empty_captions,
            caption_fields=tuple(caption_fields or ()),
            condition=condition,
            fitting=Fitting(seed, crop == "random", flip),
            draw_latents=draw_latents,
        )
        self._cache = None if cache_folder is None else (cache_folder, cache_gb)
        self._opened: list[ShardSet] | None = None
        self._loader: ShardLoader | None = None
        self._val_loader: ShardLoader | None = None
        self.val_shards = val_shards
        if val_shards is not None:
            # Only then: Lightning warns in every training that has the method and no validation_step.
            self.val_dataloader = self._open_val_loader  # type: ignore[method-assign]

    def prepare_data(self) -> None:
        """Index the shards once a node, so that the ranks find the indexes made."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes and check that every sample has what will be read."""
        if self.dataset is not None:
            return
        store = self._store()
        sets = self._open(store)
        plan = OrderPlan(
            [shards.sizes for shards in sets],
            [source.weight for source in self.sources],
            self.seed,
            self.shuffle_window_shards,
        )
        global_batch_size = self.batch_size * self._rank_and_world_size()[1]
        order, sizes = order_of(
            plan, joined(sets), self.buckets, "latents" in self.contents, global_batch_size
        )
        if store.cache is not None:
            require_window(store.cache, joined(sets), self.shuffle_window_shards)
        self.dataset = ShardDataset(
            joined(sets),
            order,
            self.contents,
            reading=replace(self._reading, sizes=sizes),
            store=store,
            quarantine=None if self.faults is None else Quarantine(self.faults),
        )

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
                "trainer.overfit_batches has no meaning for a loader that goes on through the epochs; point "
                "data.shards at a single small shard instead."
            )
        self._loader = self._loader_of(self.dataset, None if self.trainer is None else self._next_pass)
        return self._loader

    def _open_val_loader(self) -> ShardLoader:
        """This rank's loader of `val_shards`; every pass begins at the first sample."""
        assert self.val_shards is not None
        store = self._store()
        sets = open_sources([Source(self.val_shards)], self.index_folder, store, False, None)
        order = OrderPlan([sets[0].sizes], [1.0], self.seed, shuffle_window_shards=0).order()
        reading = replace(self._reading, fitting=Fitting(self.seed), draw_latents=False)
        dataset = ShardDataset(joined(sets), order, self.contents, reading=reading, store=store)
        self._val_loader = self._loader_of(dataset, lambda batches: Pass(0, batches))
        return self._val_loader

    def _loader_of(self, dataset: ShardDataset, next_pass: Callable[[int], Pass] | None) -> ShardLoader:
        rank, world_size = self._rank_and_world_size()
        pin_memory = self.pin_memory
        if pin_memory is None:
            pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return ShardLoader(
            dataset, self.batch_size, rank, world_size, self.num_workers, pin_memory, next_pass
        )

    def teardown(self, stage: str | None = None) -> None:
        """End the reading processes and close the shards."""
        for loader in (self._loader, self._val_loader):
            if loader is not None:
                loader.close()
        self._loader = self._val_loader = None

    def train_captions(self, count: int) -> list[str]:
        """The captions of the first `count` samples in stored order, or of all if there are fewer."""
        self.setup()
        assert self.dataset is not None
        return self.dataset.captions(count)

    def state_dict(self) -> dict[str, Any]:
        """What the meaning of a position depends on; the position itself is in the Trainer's counters."""
        return self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on where the counters of the checkpoint would point at other samples.

        Raises:
            ValueError: if shards, seed, shuffle window, global batch, weights or buckets differ from the
                checkpoint's.
        """
        for name, now in self._identity().items():
            if state_dict.get(name, now) != now:
                raise ValueError(
                    f"The checkpoint was written with {name} {state_dict[name]}, but this run has {now}: its "
                    f"position would mean other samples. To resume, {_ADVICE[name]}; otherwise start a new "
                    "run from the weights."
                )

    def _identity(self) -> dict[str, Any]:
        self.setup()
        assert self.dataset is not None
        return {
            "shards": self.dataset.shards.fingerprint,
            "global_batch_size": self.batch_size * self._rank_and_world_size()[1],
            "seed": self.seed,
            "shuffle_window_shards": self.shuffle_window_shards,
            "order_version": self.dataset.order.version,
            "weights": [source.weight for source in self.sources],
            "buckets": None if self.buckets is None else repr(self.buckets),
        }

    def _open(self, store: ShardStore | None = None) -> list[ShardSet]:
        if self._opened is None:
            sized = None
            if self.buckets is not None:
                sized = "latents" if "latents" in self.contents else "images"
            self._opened = open_sources(
                self.sources, self.index_folder, store or self._store(), self.faults is not None, sized
            )
        return self._opened

    def _store(self) -> ShardStore:
        return ShardStore(None if self._cache is None else ShardCache(*self._cache))

    def _rank_and_world_size(self) -> tuple[int, int]:
        # As Lightning would tell its own sampler: under tensor parallelism fewer data ranks than processes.
        layout = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (layout["rank"], layout["num_replicas"]) if layout else (0, 1)

    def _next_pass(self, batches_per_epoch: int) -> Pass:
        """By the Trainer's counters: after all batches that the run completed, those left of this epoch."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        # `completed`, not `ready`: the latter also counts a batch in which a run was cut off.
        limit = min(batches_per_epoch, self.trainer.num_training_batches)
        return Pass(progress.total.completed, int(limit) - progress.current.completed)
