"""Shards as a LightningDataModule: the same global batches for any ranks and workers, exactly resumed."""

from typing import Any

import lightning.pytorch as pl

from data.shards.dataset import Content, EmptyCaptions, ShardDataset
from data.shards.image_condition import ImageCondition
from data.shards.index import ShardSet, find_shards, index_shard
from data.shards.loader import Pass, ShardLoader
from data.shards.order import ORDER_VERSION, SampleOrder


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
    ) -> None:
        """Keep the settings; files are looked at in `prepare_data` and `setup`.

        Args:
            shards: a folder, a glob, a brace pattern such as `set/{00000..00127}.tar`, or a list of these.
            batch_size: samples of a micro-batch on each device.
            contents: what a batch holds besides captions: latents, images, control_images, noise_seeds, sizes
                (original size and crop of latents, for SDXL); by default latents, and [] for captions alone.
            num_workers: reading processes per device; the batches do not depend on it.
            seed: of the order.
            shuffle_window_shards: shards whose samples are mixed with each other; 0 keeps the written order.
            resolution: side of the centred square that images are resized and cropped to; None takes them as
                they are.
            empty_captions: "refuse" stops at a sample without words, "keep" trains on it.
            index_folder: where indexes are kept if not beside the shards.
            pin_memory: page-locked batches; by default where the run is on CUDA.
            condition: makes control_images from the pictures while they are read; None reads cond.png members.

        Raises:
            ValueError: unless batch_size is at least 1 and num_workers at least 0.
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
        self.shards = shards
        self.batch_size = batch_size
        self.contents: list[Content] = ["latents"] if contents is None else contents
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle_window_shards = shuffle_window_shards
        self.resolution = resolution
        self.empty_captions: EmptyCaptions = empty_captions
        self.index_folder = index_folder
        self.pin_memory = pin_memory
        self.condition = condition
        self.dataset: ShardDataset | None = None
        self._loader: ShardLoader | None = None

    def prepare_data(self) -> None:
        """Index the shards once a node, so that the ranks find the indexes made."""
        for path in find_shards(self.shards):
            index_shard(path, self.index_folder)

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes and check that every sample has what will be read."""
        if self.dataset is not None:
            return
        shard_set = ShardSet.open(self.shards, self.index_folder)
        order = SampleOrder(shard_set.sizes, self.seed, self.shuffle_window_shards)
        self.dataset = ShardDataset(
            shard_set, order, self.contents, self.resolution, self.empty_captions, self.condition
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
        rank, world_size = self._rank_and_world_size()
        pin_memory = self.pin_memory
        if pin_memory is None:
            pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        next_pass = None if self.trainer is None else self._next_pass
        self._loader = ShardLoader(
            self.dataset, self.batch_size, rank, world_size, self.num_workers, pin_memory, next_pass
        )
        return self._loader

    def teardown(self, stage: str | None = None) -> None:
        """End the reading processes and close the shards."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

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
            ValueError: if shards, seed, shuffle window or global batch differ from the checkpoint's.
        """
        advice = {
            "shards": "point data.shards at the shards that the run began with, unchanged",
            "global_batch_size": "choose data.batch_size so that batch_size x devices is the same",
            "seed": "set data.seed back",
            "shuffle_window_shards": "set data.shuffle_window_shards back",
            "order_version": "use the version of this project that began the run",
        }
        for name, now in self._identity().items():
            if state_dict.get(name, now) != now:
                raise ValueError(
                    f"The checkpoint was written with {name} {state_dict[name]}, but this run has {now}: its "
                    f"position would mean other samples. To resume, {advice[name]}; otherwise start a new "
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
            "order_version": ORDER_VERSION,
        }

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
