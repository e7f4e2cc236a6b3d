"""Aspect-ratio buckets: every global batch contains images, or latents, of one size.

The bucket of a batch is given by the same schedule as for mixtures, weighted by the number of samples in each bucket: batch g
is the k-th of its bucket and contains the bucket's positions [k B, (k + 1) B). So all ranks have the same size at each step,
nothing is dropped or padded, and a run still resumes from one integer. Each bucket has its own epochs, which end at about the
same time.

Source of the sizes: SDXL, arXiv:2307.01952, section 2.3 and appendix I.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.shards.order.mixture import MixedOrder, Schedule
from data.shards.order.sample_order import Int64Array, SampleOrder

Size = tuple[int, int]
"""Height, width in pixels."""
AnyOrder = SampleOrder | MixedOrder


@dataclass(frozen=True)
class Buckets:
    """Image sizes with about the area of a given square."""

    side_px: int = 1024
    """Side of the square whose area is the maximum of every size."""
    step_px: int = 64
    """Heights and widths are multiples of this."""
    max_aspect: float = 2.0
    """Maximum ratio of the longer to the shorter side."""

    def __post_init__(self) -> None:
        if self.step_px < 1 or self.side_px < self.step_px or self.side_px % self.step_px:
            raise ValueError(
                f"data.buckets.side_px is {self.side_px} and step_px {self.step_px}, but the side must be a multiple of "
                "the step."
            )
        if self.max_aspect < 1:
            raise ValueError(f"data.buckets.max_aspect is {self.max_aspect}, but it must be 1 or more.")

    def sizes(self) -> list[Size]:
        """(height, width) of every bucket, from the widest to the tallest."""
        found: dict[Size, None] = {}
        longest = int(self.side_px * self.max_aspect**0.5) // self.step_px * self.step_px
        for side in range(self.step_px, longest + 1, self.step_px):
            other = min(self.side_px**2 // side // self.step_px * self.step_px, longest)
            if side <= other <= side * self.max_aspect:
                found |= {(side, other): None, (other, side): None}
        return sorted(found, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(image_sizes: Int64Array, sizes: Sequence[Size]) -> Int64Array:
    """The bucket with the nearest aspect ratio for each image, measured by the ratio of ratios.

    Args:
        image_sizes: (n, 2), heights and widths, positive.
        sizes: (height, width) of the buckets.

    Returns:
        (n,), int64, indices into `sizes`.
    """
    ratios = np.log([height / width for height, width in sizes])
    by_ratio = np.argsort(ratios, kind="stable")
    edges = (ratios[by_ratio][1:] + ratios[by_ratio][:-1]) / 2
    own = np.log(image_sizes[:, 0] / image_sizes[:, 1])
    nearest: Int64Array = by_ratio[np.searchsorted(edges, own)]
    return nearest


def open_buckets(image_sizes: Int64Array, sizes: Sequence[Size], global_batch_size: int) -> Int64Array:
    """Like `nearest_bucket`, among buckets that fill a global batch; smaller ones would repeat images within a batch.

    Raises:
        ValueError: if there are fewer images than a global batch.
    """
    if len(image_sizes) < global_batch_size:
        raise ValueError(
            f"The shards hold {len(image_sizes)} samples, fewer than one global batch of {global_batch_size}; lower "
            "data.batch_size or add shards."
        )
    places = list(range(len(sizes)))
    while True:
        chosen: Int64Array = np.array(places)[nearest_bucket(image_sizes, [sizes[place] for place in places])]
        counts = np.bincount(chosen, minlength=len(sizes))
        places = [place for place in places if counts[place]]
        smallest = min(places, key=lambda place: int(counts[place]))
        if counts[smallest] >= global_batch_size:
            return chosen
        places.remove(smallest)  # one at a time: its images may fill a neighbour


class BucketOrder:
    """Maps positions to samples so that each global batch is from one bucket."""

    def __init__(
        self,
        orders: Sequence[AnyOrder],
        samples: Sequence[Int64Array],
        weights: Sequence[int],
        global_batch_size: int,
    ) -> None:
        """Store the parts.

        Args:
            orders: order of the samples within each bucket.
            samples: sample numbers of each bucket, ascending.
            weights: integer weight of each bucket, its share of the batches.
            global_batch_size: samples per batch over all ranks.
        """
        total = sum(map(len, samples))
        # Every rank holds these, of as many entries as the set has samples: the smallest types that do.
        self.orders, self.samples = (
            tuple(orders),
            tuple(one.astype(np.min_scalar_type(total)) for one in samples),
        )
        self.global_batch_size = global_batch_size
        self.schedule = Schedule(weights)
        self._bucket_of = np.empty(total, dtype=np.min_scalar_type(len(samples)))
        for bucket, numbers in enumerate(samples):
            self._bucket_of[numbers] = bucket

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._bucket_of)

    @property
    def version(self) -> int:
        return max(order.version for order in self.orders)

    def replacement(self, sample: int, attempt: int) -> int:
        """A replacement from the same bucket."""
        bucket = int(self._bucket_of[sample])
        own = int(np.searchsorted(self.samples[bucket], sample))
        return int(self.samples[bucket][self.orders[bucket].replacement(own, attempt)])

    def samples_at(self, positions: Sequence[int] | Int64Array) -> Int64Array:
        """Sample numbers at the given positions."""
        batches, places = np.divmod(np.asarray(positions, dtype=np.int64), self.global_batch_size)
        buckets, counts = self.schedule.at(batches)
        within = counts * self.global_batch_size + places
        samples = np.empty_like(within)
        for bucket in set(buckets.tolist()):
            here = buckets == bucket
            samples[here] = self.samples[bucket][self.orders[bucket].samples_at(within[here])]
        return samples
