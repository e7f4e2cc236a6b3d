"""The order of a run: of one data set or a mixture, with buckets or without."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.shards.buckets import AnyOrder, BucketOrder
from data.shards.mixture import MixedOrder, whole_weights
from data.shards.order import Int64Array, SampleOrder


@dataclass(frozen=True)
class OrderPlan:
    """What an order depends on besides the buckets."""

    sizes: list[list[int]]
    """For each source the samples in each of its shards; samples are numbered source after source."""
    weights: list[float]
    """Of each source."""
    seed: int = 0
    shuffle_window_shards: int = 64

    def order(self) -> AnyOrder:
        """Without buckets.

        Raises:
            ValueError: for a source without samples, or settings that an order refuses.
        """
        return self._order_of([np.asarray(sizes) for sizes in self.sizes], self.weights)

    def bucket_order(self, bucket_of: Int64Array, global_batch_size: int) -> BucketOrder:
        """With buckets.

        Args:
            bucket_of: (samples,), int64.
            global_batch_size: samples of a batch over all ranks.
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
        # Of one data set the counts themselves: then every sample comes equally often, exactly.
        whole = [len(here) for here in samples] if len(self.sizes) == 1 else whole_weights(weights)
        return BucketOrder(orders, samples, whole, global_batch_size)

    def _order_of(self, sizes: Sequence[Int64Array], weights: Sequence[float]) -> AnyOrder:
        present = [i for i, counts in enumerate(sizes) if counts.sum() or len(self.sizes) == 1]
        orders = [SampleOrder(sizes[i].tolist(), self.seed, self.shuffle_window_shards) for i in present]
        if len(orders) == 1:
            return orders[0]
        totals = [len(order) for order in orders]
        offsets = (np.cumsum(totals) - totals).tolist()
        return MixedOrder(orders, whole_weights([weights[i] for i in present]), offsets)
