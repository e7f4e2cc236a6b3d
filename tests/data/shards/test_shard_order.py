"""The order: a permutation for every length and window, a pure function of the position."""

from itertools import permutations

import numpy as np
import pytest

from data.shards.order.sample_order import SampleOrder, permute


@pytest.mark.parametrize("length", [*range(1, 40), 255, 256, 257, 8193])
def test_permute_is_a_permutation(length: int) -> None:
    for key in (0, 1, 2**63 + 5):
        assert sorted(permute(np.arange(length), length, key).tolist()) == list(range(length))


def test_permute_reaches_all_permutations_equally() -> None:
    counts = dict.fromkeys(permutations(range(4)), 0)
    for key in range(4800):
        a, b, c, d = permute(np.arange(4), 4, key).tolist()
        counts[a, b, c, d] += 1
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001


@pytest.mark.parametrize("sizes", [[1], [7], [3, 0, 5, 1], [10] * 13, [8192, 1], [5000, 4000, 1, 300]])
@pytest.mark.parametrize("window", [0, 1, 2, 5, 64])
def test_every_epoch_visits_each_sample_once(sizes: list[int], window: int) -> None:
    total = sum(sizes)
    order = SampleOrder(sizes, seed=3, shuffle_window_shards=window)
    epochs = [order.samples_at(range(epoch * total, (epoch + 1) * total)) for epoch in range(3)]
    for samples in epochs:
        assert sorted(samples.tolist()) == list(range(total))
    if total > 20:
        assert np.array_equal(epochs[0], epochs[1]) == (window == 0)


def test_a_position_does_not_depend_on_how_it_is_asked_for() -> None:
    sizes = [9000, 17, 800, 5000]
    everything = SampleOrder(sizes, seed=5, shuffle_window_shards=2).samples_at(range(40_000))
    asked = np.random.default_rng(0).integers(0, 40_000, size=500)
    fresh = SampleOrder(sizes, seed=5, shuffle_window_shards=2)
    assert np.array_equal(fresh.samples_at(asked), everything[asked])
    assert [fresh.samples_at([position])[0] for position in asked[:50]] == everything[asked[:50]].tolist()


def test_a_window_holds_only_its_shards() -> None:
    order = SampleOrder([100] * 20, seed=1, shuffle_window_shards=4)
    shards = order.samples_at(range(2000)) // 100
    windows = [set(shards[start : start + 400].tolist()) for start in range(0, 2000, 400)]
    assert [len(window) for window in windows] == [4] * 5
    assert windows != [set(range(start, start + 4)) for start in range(0, 20, 4)]


def test_a_full_window_shuffles_fully() -> None:
    samples = SampleOrder([500] * 20, seed=2, shuffle_window_shards=20).samples_at(range(10_000))
    assert abs(np.corrcoef(samples, np.arange(10_000))[0, 1]) < 0.03  # three standard deviations of chance
    # Neighbours in the shards are apart in the order: by chance two follow each other once in an epoch.
    assert (np.abs(np.diff(samples)) == 1).sum() < 10


def test_seeds_differ() -> None:
    first, second = (SampleOrder([1000], seed=seed).samples_at(range(1000)) for seed in (0, 1))
    assert (first == second).mean() < 0.02


def test_the_order_of_this_version() -> None:
    """If this fails, ORDER_VERSION has to rise: checkpoints count on the order."""
    order = SampleOrder([6, 5, 9], seed=7, shuffle_window_shards=3)
    assert (
        order.samples_at(range(20, 30)).tolist() == [14, 19, 1, 12, 18, 3, 9, 10, 15, 4]
        and order.version == 1
    )
    order = SampleOrder([6, 5, 9], seed=7, shuffle_window_shards=2)
    assert (
        order.samples_at(range(20, 30)).tolist() == [10, 7, 8, 9, 6, 17, 4, 18, 16, 0] and order.version == 2
    )


def test_refuses() -> None:
    with pytest.raises(ValueError, match="shuffle_window_shards is -1"):
        SampleOrder([3], shuffle_window_shards=-1)
    with pytest.raises(ValueError, match="no sample"):
        SampleOrder([0, 0])
