"""The order of a run: one data set or a mixture, with or without buckets."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards.order.buckets import AnyOrder, BucketOrder, Buckets, open_buckets
from data.shards.order.mixture import MixedOrder, integer_weights
from data.shards.order.sample_order import Int64Array, SampleOrder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OrderSpec:
    """Settings of an order, except for the buckets."""

    sizes: list[list[int]]
    """Number of samples in each shard of each source; samples are numbered source after source."""
    weights: list[float]
    """Weight of each source."""
    seed: int = 0
    shuffle_window_shards: int = 64

    def order(self) -> AnyOrder:
        """The order without buckets.

        Raises:
            ValueError: for a source without samples, or invalid settings.
        """
        return self._order_of([np.asarray(sizes) for sizes in self.sizes], self.weights)

    def bucketed(
        self, buckets: Buckets, sample_sizes: Int64Array, stored_latents: bool, global_batch_size: int
    ) -> tuple[BucketOrder, NDArray[np.integer[Any]]]:
        """The order with buckets.

        Args:
            buckets: bucket sizes for images.
            sample_sizes: (samples, 2), height and width of each sample as stored.
            stored_latents: whether the samples are latents, whose buckets are their stored sizes.
            global_batch_size: samples per batch over all ranks, all of one bucket.

        Returns:
            the order, and the height and width of each sample in its batch, (samples, 2).
        """
        if not stored_latents:
            choices = buckets.sizes()
            bucket_of = open_buckets(sample_sizes, choices, global_batch_size)
            return self.bucket_order(bucket_of, global_batch_size), np.asarray(choices, dtype=np.int32)[
                bucket_of
            ]
        _, inverse, counts = np.unique(sample_sizes, axis=0, return_inverse=True, return_counts=True)
        if counts.min() < global_batch_size:
            _log.warning(
                "One size of latents has only %d samples, fewer than a global batch of %d, so some occur twice in it; "
                "write larger sets of that size, or none.",
                counts.min(),
                global_batch_size,
            )
        return self.bucket_order(inverse.reshape(-1), global_batch_size), sample_sizes.astype(np.int32)

    def bucket_order(self, bucket_of: Int64Array, global_batch_size: int) -> BucketOrder:
        """The order for a given assignment to buckets.

        Args:
            bucket_of: (samples,), int64.
            global_batch_size: samples per batch over all ranks.
        """
        shards = np.repeat(
            np.arange(sum(map(len, self.sizes))), [size for sizes in self.sizes for size in sizes]
        )
        ends = np.cumsum([len(sizes) for sizes in self.sizes])
        orders, samples, weights = [], [], []
        for bucket in np.unique(bucket_of).tolist():
            here = np.flatnonzero(bucket_of == bucket)
            counts = np.split(np.bincount(shards[here], minlength=int(ends[-1])), ends[:-1])
            share = [
                weight * count.sum() / sum(sizes)
                for weight, count, sizes in zip(self.weights, counts, self.sizes, strict=True)
            ]
            orders.append(self._order_of(counts, share))
            samples.append(here)
            weights.append(sum(share))
        # For one data set use the counts themselves, so that every sample is visited exactly equally often.
        integers = [len(here) for here in samples] if len(self.sizes) == 1 else integer_weights(weights)
        return BucketOrder(orders, samples, integers, global_batch_size)

    def _order_of(self, sizes: Sequence[Int64Array], weights: Sequence[float]) -> AnyOrder:
        present = [i for i, counts in enumerate(sizes) if counts.sum() or len(self.sizes) == 1]
        orders = [SampleOrder(sizes[i].tolist(), self.seed, self.shuffle_window_shards) for i in present]
        if len(orders) == 1:
            return orders[0]
        totals = [len(order) for order in orders]
        offsets = (np.cumsum(totals) - totals).tolist()
        return MixedOrder(orders, integer_weights([weights[i] for i in present]), offsets)
