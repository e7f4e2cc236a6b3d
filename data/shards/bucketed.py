"""The order of a run's samples: plain, or by buckets of one size."""

import logging

import numpy as np

from data.shards.buckets import AnyOrder, BucketOrder, Buckets, open_buckets
from data.shards.image_sizes import sizes_of
from data.shards.index import ShardSet
from data.shards.order import Int64Array
from data.shards.plan import OrderPlan

_log = logging.getLogger(__name__)


def order_of(
    plan: OrderPlan, shards: ShardSet, buckets: Buckets | None, stored_latents: bool, global_batch_size: int
) -> tuple[AnyOrder | BucketOrder, Int64Array | None]:
    """Which sample stands at which position.

    Args:
        plan: shuffling and weights.
        shards: all that the plan orders.
        buckets: which sizes there are; None for samples of one size.
        stored_latents: whether samples are latents, whose buckets are the sizes that they were stored in.
        global_batch_size: over all ranks; all of it lies in one bucket.

    Returns:
        the order, and, for buckets of pictures, the height and width that each is brought to: (samples, 2).
    """
    if buckets is None:
        return plan.order(), None
    sizes = sizes_of(shards.shards)
    if not stored_latents:
        choices = buckets.sizes()
        bucket_of = open_buckets(sizes, choices, global_batch_size)
        return plan.bucket_order(bucket_of, global_batch_size), np.asarray(choices)[bucket_of]
    _, inverse, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    if counts.min() < global_batch_size:
        _log.warning(
            "Of one size of latents there are only %d samples, fewer than a global batch of %d, so some come twice in it; "
            "write larger sets of that size, or none.",
            counts.min(),
            global_batch_size,
        )
    return plan.bucket_order(inverse.reshape(-1), global_batch_size), None
