"""The writer: the same bytes every time, whole shards only, read alike by the webdataset package."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from data.shards.dataset import ShardDataset
from data.shards.index import ShardSet
from data.shards.order.sample_order import SampleOrder
from data.shards.writer import Member, ShardWriter, encode_latents


def write_shards(folder: Path, count: int = 10, samples_per_shard: int = 4, **options: bool) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, "toy-", samples_per_shard, **options) as writer:
        for number in range(count):
            latents = torch.randn(4, 8, 8, generator=generator)
            members: dict[str, Member] = {
                "latent.safetensors": encode_latents(latents),
                "txt": f"größe {number}",
                "json": {"b": 1, "a": number},
            }
            assert writer.write(members) == f"{number:09d}"
    return writer.paths


def test_bytes_are_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_shards(tmp_path / "one")
    monkeypatch.setattr("time.time", lambda: 2e9)
    second = write_shards(tmp_path / "two")
    assert [path.name for path in first] == ["toy-00000.tar", "toy-00001.tar", "toy-00002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with tarfile.open(first[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    shards = ShardSet.open(tmp_path)
    ours = ShardDataset(shards, SampleOrder(shards.sizes, shuffle_window_shards=0)).batch(range(10))
    theirs = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert [
        f"toy-{number // 4:05d}/{sample['__key__']}" for number, sample in enumerate(theirs)
    ] == ours.sample_ids
    assert [sample["txt"].decode() for sample in theirs] == ours.captions == [f"größe {i}" for i in range(10)]
    assert [sample["json"] for sample in theirs] == [b'{"a": %d, "b": 1}' % number for number in range(10)]
    assert ours.latents is not None
    for sample, latents in zip(theirs, ours.latents, strict=True):
        assert sample["latent.safetensors"] == encode_latents(latents)


def test_latents_come_back_in_half_precision(tmp_path: Path) -> None:
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)) * 30
    with ShardWriter(tmp_path) as writer:
        writer.write({"latent.safetensors": encode_latents(latents), "txt": "tensor"})
        writer.write({"latent.safetensors": encode_latents(latents.numpy()), "txt": "array"})
    shards = ShardSet.open(tmp_path)
    batch = ShardDataset(shards, SampleOrder(shards.sizes, shuffle_window_shards=0)).batch([0, 1])
    assert batch.latents is not None and batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents, latents.half().float().expand(2, -1, -1, -1))


def test_an_interrupted_writer_leaves_whole_shards_only(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, samples_per_shard=2) as writer:
            for _ in range(3):
                writer.write({"txt": "a"})
            assert (tmp_path / "00001.tar.partial").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]
    assert len(ShardSet.open(tmp_path).shards[0]) == 2


def test_existing_shards_are_kept_or_replaced_as_a_whole(tmp_path: Path) -> None:
    write_shards(tmp_path)
    ShardSet.open(tmp_path)
    with pytest.raises(FileExistsError, match=r"already holds 3 shards named 'toy-\*\.tar'"):
        write_shards(tmp_path)
    write_shards(tmp_path, count=5, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy-00000.tar", "toy-00001.tar"]
    assert ShardSet.open(tmp_path).sizes == [4, 1]


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        ShardWriter(tmp_path, samples_per_shard=0)
    writer = ShardWriter(tmp_path)
    with pytest.raises(ValueError, match=r"'a\.b' cannot be a sample's key"):
        writer.write({"txt": "a"}, key="a.b")
    with pytest.raises(ValueError, match="has the members pkl, pth, but a shard holds jpg"):
        writer.write({"txt": "a", "pkl": b"", "pth": b""})
    with pytest.raises(ValueError, match="has no member"):
        writer.write({})
    writer.write({"txt": "a"}, key="a")
    with pytest.raises(ValueError, match=r"key 'a' is already in 00000\.tar"):
        writer.write({"txt": "a"}, key="a")
    with pytest.raises(ValueError, match=r"shape \(4, h, w\), but these have \(4, 8\)"):
        encode_latents(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="not finite in float16"):
        encode_latents(np.full((4, 2, 2), 1e5))
