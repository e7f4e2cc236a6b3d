"""Mixtures and buckets: shares, completeness, sizes, and the same batches for any ranks."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.shards.datamodule import ShardDataModule
from data.shards.order.buckets import BucketOrder, Buckets, nearest_bucket, open_buckets
from data.shards.order.mixture import MixedOrder, Schedule, Source, integer_weights
from data.shards.order.run_order import OrderSpec
from data.shards.writer import ShardWriter, encode_latents


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [1, 3], [5, 3, 2], [1, 2, 3, 4], [997, 1, 500, 2]])
def test_a_schedule_deals_everything_out_by_weight(weights: list[int]) -> None:
    count = 3 * sum(weights)
    choices, counts = Schedule(weights).at(np.arange(count))
    for choice, weight in enumerate(weights):
        here = counts[choices == choice]
        assert here.tolist() == list(range(len(here)))  # none twice, none left out
        shares = np.cumsum(choices == choice) - np.arange(1, count + 1) * weight / sum(weights)
        assert np.abs(shares).max() <= 2
    assert abs((choices == 0).sum() - 3 * weights[0]) == 0
    asked = np.random.default_rng(0).integers(0, count, 50)
    again = Schedule(weights).at(asked)
    assert np.array_equal(again[0], choices[asked]) and np.array_equal(again[1], counts[asked])


def test_a_schedule_far_into_a_run() -> None:
    start = 10**12
    choices, counts = Schedule([7, 2, 1]).at(np.arange(start, start + 1000))
    assert [(choices == choice).sum() for choice in range(3)] == [700, 200, 100]
    assert abs(counts[choices == 0][0] - 0.7 * start) <= 2


def test_integer_weights() -> None:
    assert integer_weights([0.5, 0.25, 0.25]) == [2, 1, 1]
    assert integer_weights([1, 0.1]) == [10, 1]
    near = integer_weights([2**0.5, 1])
    assert near[0] / near[1] == pytest.approx(2**0.5, rel=1e-5)
    with pytest.raises(ValueError, match="below a millionth"):
        integer_weights([1, 1e-9])
    with pytest.raises(ValueError, match=r"data\.sources: the weight of 'a' is 0"):
        Source("a", 0)


def test_a_mixture_goes_through_each_source_in_its_own_epochs() -> None:
    order = OrderSpec([[50, 30], [20]], [1, 1], seed=3).order()
    assert isinstance(order, MixedOrder) and len(order) == 100
    samples = order.samples_at(range(320))
    for low, high in ((0, 80), (80, 100)):
        own = samples[(samples >= low) & (samples < high)]
        size = high - low
        assert len(own) == 160
        for start in range(0, 160 - size + 1, size):
            assert sorted(own[start : start + size].tolist()) == list(range(low, high))
    for sample in (0, 79, 80, 99):
        stand_in = order.replacement(sample, 0)
        assert (stand_in < 80) == (sample < 80) and stand_in != sample


def test_bucket_sizes() -> None:
    sizes = Buckets(1024, 64, 2.0).sizes()
    assert (1024, 1024) in sizes and (704, 1408) in sizes and (1408, 704) in sizes
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024**2 and max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert all(h * w > 0.85 * 1024**2 for h, w in sizes)
    assert sizes == sorted(sizes, key=lambda size: size[0] / size[1]) and len(set(sizes)) == len(sizes)
    assert Buckets(512, 64, 1.0).sizes() == [(512, 512)]
    with pytest.raises(ValueError, match=r"data\.buckets\.side_px is 1000 and step_px 64"):
        Buckets(1000)
    with pytest.raises(ValueError, match=r"data\.buckets\.max_aspect is 0\.5"):
        Buckets(1024, 64, 0.5)


def test_images_go_to_the_nearest_bucket_that_is_open() -> None:
    sizes = [(32, 64), (64, 64), (64, 32)]
    images = np.array([[10, 100], [30, 50], [100, 90], [50, 30], [500, 100]])
    assert nearest_bucket(images, sizes).tolist() == [0, 0, 1, 2, 2]
    many = np.repeat(images, [1, 1, 9, 4, 4], axis=0)
    assert np.bincount(open_buckets(many, sizes, 2), minlength=3).tolist() == [2, 9, 8]
    assert np.bincount(open_buckets(many, sizes, 4), minlength=3).tolist() == [0, 11, 8]
    assert np.bincount(open_buckets(many, sizes, 12), minlength=3).tolist() in ([0, 19, 0], [19, 0, 0])
    with pytest.raises(ValueError, match="hold 19 samples, fewer than one global batch of 20"):
        open_buckets(many, sizes, 20)


@pytest.mark.parametrize("sources", [1, 2])
def test_a_batch_lies_in_one_bucket_and_all_samples_come(sources: int) -> None:
    sizes, batch = [[40, 17, 43], [50, 30]][:sources], 6
    total = sum(map(sum, sizes))
    bucket_of = np.random.default_rng(0).choice(3, size=total, p=[0.6, 0.3, 0.1])
    order = OrderSpec(sizes, [1.0, 80 / 100][:sources], seed=1, shuffle_window_shards=2).bucket_order(
        bucket_of, batch
    )
    assert isinstance(order, BucketOrder) and len(order) == total
    samples = order.samples_at(range(total * batch)).reshape(-1, batch)
    assert (bucket_of[samples] == bucket_of[samples[:, :1]]).all()
    counts = np.bincount(samples.ravel(), minlength=total)
    # B epochs of N samples are B N positions: each sample comes B times, but for what a schedule rounds.
    assert counts.min() >= batch - 1 and counts.max() <= batch + 1
    if sources == 1:
        assert abs(counts - batch).sum() <= 2 * batch
    for sample in range(0, total, 7):
        assert bucket_of[order.replacement(sample, 0)] == bucket_of[sample]


def encoded_image(height: int, width: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


SHAPES = [(40, 40)] * 14 + [(30, 60)] * 9 + [(60, 30)] * 8 + [(64, 44)] * 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    shapes = [SHAPES[i] for i in np.random.default_rng(1).permutation(len(SHAPES))]
    with ShardWriter(folder, samples_per_shard=9) as writer:
        for i, shape in enumerate(shapes):
            latents = encode_latents(torch.full((4, shape[0] // 10, shape[1] // 10), float(i)))
            writer.write(
                {
                    "png": encoded_image(shape[0], shape[1], i),
                    "txt": f"{shape}",
                    "latent.safetensors": latents,
                }
            )
    return folder


def batches(
    folder: Path, world_size: int, count: int, **options: Any
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Per batch of four over all ranks: ids, and the shape of what was read."""
    data = ShardDataModule(str(folder), 4, seed=2, **options)
    data.setup()
    assert data.dataset is not None
    found = []
    for g in range(count):
        rows: list[tuple[str, tuple[int, ...]]] = []
        for rank in range(world_size):
            share = 4 // world_size
            batch = data.dataset.batch(range(4 * g + rank * share, 4 * g + (rank + 1) * share))
            held = batch.latents if batch.latents is not None else batch.images
            assert held is not None
            rows += [
                (sample_id, tuple(row.shape[1:]))
                for sample_id, row in zip(batch.sample_ids, held, strict=True)
            ]
        found.append(rows)
    return found


@pytest.mark.parametrize("content", ["images", "latents"])
def test_batches_of_one_size_from_shards(images: Path, content: Any) -> None:
    options: dict[str, Any] = {"contents": [content], "buckets": Buckets(32, 8, 2.0)}
    seen = batches(images, 1, 34, **options)
    shapes = [{shape for _, shape in batch} for batch in seen]
    assert all(len(shape) == 1 for shape in shapes)
    distinct = set[tuple[int, ...]]().union(*shapes)
    if content == "latents":
        assert distinct == {(4, 4), (3, 6), (6, 3), (6, 4)}
    else:
        assert {(32, 32), (24, 40), (40, 24)} <= distinct <= set(Buckets(32, 8, 2.0).sizes())
    assert batches(images, 4, 34, **options) == seen == batches(images, 2, 34, **options)
    ids = [sample_id for batch in seen for sample_id, _ in batch]
    counts = [ids.count(sample_id) for sample_id in set(ids)]
    assert len(counts) == 34 and sum(counts) == 136
    if content == "images":
        assert set(counts) <= {3, 4, 5}


def test_sizes_come_from_img2dataset_where_it_left_them(images: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "00000.tar").write_bytes((images / "00000.tar").read_bytes())
    table = {
        "key": [f"{i:09d}" for i in range(9)],
        "height": [16 * (i + 1) for i in range(9)],
        "width": [32] * 9,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "00000.parquet")
    data = ShardDataModule(str(tmp_path), 1, contents=["images"], buckets=Buckets(32, 8))
    data.setup()
    assert data.dataset is not None
    found = data.dataset.shards.shards[0].image_sizes
    assert found is not None and found.tolist() == [[16 * (i + 1), 32] for i in range(9)]


def test_a_mixture_from_shards(images: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for i in range(10):
            writer.write({"json": json.dumps({"caption": f"other {i}"}), "txt": f"other {i}"})
    sources = [Source(str(images), 3.0), Source(str(tmp_path))]
    data = ShardDataModule([], 8, contents=[], sources=sources)
    data.setup()
    assert data.dataset is not None and len(data.dataset) == 44
    for g in range(10):
        captions = data.dataset.batch(range(8 * g, 8 * g + 8)).captions
        assert sum(caption.startswith("other") for caption in captions) == 2
    state = data.state_dict()
    other = ShardDataModule([], 8, contents=[], sources=[sources[0], Source(str(tmp_path), 2.0)])
    with pytest.raises(ValueError, match=r"written with weights \[3.0, 1.0\], but this run has \[3.0, 2.0\]"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="either one data set or a mixture"):
        ShardDataModule([], 8)
    with pytest.raises(ValueError, match="exclude each other"):
        ShardDataModule(str(images), 8, resolution=32, buckets=Buckets())
