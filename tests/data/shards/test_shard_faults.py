"""Every fault is found, written down with shard and key, and replaced without moving any other sample."""

import io
import itertools
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from lightning.pytorch import Trainer
from PIL import Image

from data.shards.datamodule import ShardDataModule
from data.shards.decoders import BadSampleError, decode
from data.shards.faults import Faults, Quarantine, TooManyFaultsError
from data.shards.index import index_shard, save_index, scan_shard
from data.shards.order.sample_order import SampleOrder
from data.shards.tar_headers import BrokenShardError, tar_members
from data.shards.writer import Member, ShardWriter
from sdxs_lightning.core.errors import UserError

SHARDS, PER_SHARD = 4, 10
TOTAL = SHARDS * PER_SHARD
Members = dict[str, bytes]


def float16(latents: Any) -> bytes:
    return safetensors.numpy.save({"latents": latents.astype(np.float16)})


def png(seed: int, size: tuple[int, int] = (6, 6)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def samples_of(shard: int) -> dict[str, Members]:
    numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
    return {
        f"{number:04d}": {
            "latent.safetensors": safetensors.numpy.save(
                {"latents": np.full((4, 2, 2), number, dtype=np.float16)}
            ),
            "png": png(number),
            "txt": f"caption {number}".encode(),
        }
        for number in numbers
    }


def write(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def flat(samples: dict[str, Members]) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.{kind}", content) for key, members in samples.items() for kind, content in members.items()
    ]


def whole_set(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        write(folder / f"{shard:05d}.tar", flat(samples_of(shard)))
    return folder


def module(folder: Path, budget: int = 100, **options: Any) -> ShardDataModule:
    faults = Faults(budget, str(folder.parent / "quarantine.jsonl"))
    options = {"contents": ["latents", "images"], "faults": faults, **options}
    return ShardDataModule(str(folder), 4, **options)


def epoch(data: ShardDataModule) -> list[str]:
    """The samples' ids in order of their positions; what is emitted is whole and belongs together."""
    data.setup()
    assert data.dataset is not None
    ids: list[str] = []
    for start in range(0, len(data.dataset), 4):
        batch = data.dataset.batch(range(start, start + 4))
        assert batch.latents is not None and batch.images is not None
        for i, sample_id in enumerate(batch.sample_ids):
            number = int(sample_id[-4:])
            assert batch.captions[i] == f"caption {number}"
            assert (batch.latents[i] == number).all()
            expected = torch.from_numpy(np.asarray(decode("png", png(number), ""))).permute(2, 0, 1)
            assert torch.allclose(batch.images[i], expected / 127.5 - 1, atol=1e-6)
        ids += batch.sample_ids
    return ids


def written_down(folder: Path) -> set[tuple[str, str]]:
    lines = (folder.parent / "quarantine.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert all(entry["reason"] for entry in entries)
    return {(Path(entry["shard"]).name, entry["key"]) for entry in entries}


def replace_sample(folder: Path, key: str, change: Callable[[Members], Any]) -> None:
    shard = int(key) // PER_SHARD
    samples = samples_of(shard)
    change(samples[key])
    write(folder / f"{shard:05d}.tar", flat(samples))


def member_fault(**changes: bytes | None) -> Callable[[Path], set[str]]:
    """Changes members of the samples 0007 and 0023; None leaves one out."""

    def damage(folder: Path) -> set[str]:
        for key in ("0007", "0023"):

            def change(members: Members) -> None:
                for kind, content in changes.items():
                    kind = kind.replace("_", ".")
                    members.pop(kind)
                    if content is not None:
                        members[kind] = content

            replace_sample(folder, key, change)
        return {"0007", "0023"}

    return damage


def apart(folder: Path) -> set[str]:
    members = flat(samples_of(0))
    write(folder / "00000.tar", [*members[1:], members[0]])
    return {"0000"}


def twice(folder: Path) -> set[str]:
    members = flat(samples_of(0))
    write(folder / "00000.tar", [*members[:2], *members])
    return {"0000"}


def flipped_content(folder: Path) -> set[str]:
    """A bit of the latents: nothing but a checksum can tell."""
    path = folder / "00001.tar"
    index, status = index_shard(path), path.stat()
    content = path.read_bytes()
    checksums = [
        [zlib.crc32(content[offset : offset + size]) for offset, size in zip(*row, strict=True)]
        for row in zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)
    ]
    save_index(replace(index, checksums=np.array(checksums, dtype=np.uint32)), None)
    column = index.column("latent.safetensors")
    assert column is not None
    data = bytearray(path.read_bytes())
    data[int(index.offsets[3, column] + index.sizes[3, column]) - 1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rot on a disk, which no clock notices
    return {"0013"}


FAULTS: dict[str, Callable[[Path], set[str]]] = {
    "missing member": member_fault(txt=None),
    "missing image": member_fault(png=None),
    "undecodable image": member_fault(png=b"<html>404</html>"),
    "image cut short": member_fault(png=png(3)[:-30]),
    "empty member": member_fault(latent_safetensors=b""),
    "latents cut short": member_fault(latent_safetensors=samples_of(0)["0003"]["latent.safetensors"][:-2]),
    "not finite": member_fault(
        latent_safetensors=safetensors.numpy.save({"latents": np.full((4, 2, 2), np.nan, np.float16)})
    ),
    "latents of another size": member_fault(latent_safetensors=float16(np.zeros((4, 2, 3)))),
    "latents on their side": member_fault(latent_safetensors=float16(np.zeros((2, 4, 2)))),
    "latents of more channels": member_fault(latent_safetensors=float16(np.zeros((16, 2, 2)))),
    "an image of another size": member_fault(png=png(3, (6, 7))),
    "half a caption": member_fault(txt=b"caption" + bytes(9)),
    "empty caption": member_fault(txt=b" \n"),
    "caption of no text": member_fault(txt=b"\xff\xfe\x00"),
    "members apart": apart,
    "member twice": twice,
    "a flipped bit": flipped_content,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_sample_is_replaced_in_its_place(tmp_path: Path, name: str) -> None:
    folder = whole_set(tmp_path / "set")
    clean = epoch(module(folder))
    bad = FAULTS[name](folder)
    ids = epoch(module(folder))
    assert len(ids) == len(clean) == TOTAL
    for expected, got in zip(clean, ids, strict=True):
        assert got[-4:] not in bad and (got == expected or expected[-4:] in bad)
    assert {key for _, key in written_down(folder)} == bad
    assert {shard for shard, _ in written_down(folder)} == {f"{int(key) // 10:05d}.tar" for key in bad}
    # The same again, from another process's view; nothing is written twice.
    lines = (tmp_path / "quarantine.jsonl").read_text()
    assert epoch(module(folder)) == ids and (tmp_path / "quarantine.jsonl").read_text() == lines
    # Without a budget the same fault stops the run.
    (tmp_path / "quarantine.jsonl").unlink()
    with pytest.raises((BadSampleError, BrokenShardError)):
        epoch(module(folder, faults=None))
    with pytest.raises(TooManyFaultsError, match=r"more than data\.faults\.budget 0; the last: .*All are in"):
        epoch(module(folder, budget=0))


def test_a_truncated_shard_keeps_what_is_whole(tmp_path: Path) -> None:
    """First seen cut: the sample at the cut is dropped even where it looks complete."""
    folder = whole_set(tmp_path / "set")
    path = folder / "00002.tar"
    members = list(tar_members(path))
    whole = path.read_bytes()
    for cut, last in ((members[14].offset + 20, "0024"), (members[14].offset + 512, "0024"), (700, "0020")):
        path.write_bytes(whole[:cut])
        for sidecar in tmp_path.rglob("*.npz"):
            sidecar.unlink()
        (tmp_path / "quarantine.jsonl").unlink(missing_ok=True)
        data = module(folder)
        ids = epoch(data)
        assert written_down(folder) == {("00002.tar", last)}
        kept = {f"{number:04d}" for number in [*range(int(last)), *range(30, 40)]}
        assert {sample_id[-4:] for sample_id in ids} <= kept
        with pytest.raises(BrokenShardError, match=r"00002\.tar is truncated"):
            module(folder, faults=None).setup()


@pytest.mark.parametrize("how", ["cut", "gone", "empty"])
def test_a_shard_that_was_whole_when_it_was_indexed(tmp_path: Path, how: str) -> None:
    """Its sidecar remembers the samples, so every position stays; what cannot be read is replaced."""
    folder = whole_set(tmp_path / "set")
    clean, fingerprint = epoch(module(folder)), module(folder)._identity()
    path = folder / "00002.tar"
    cut = list(tar_members(path))[14].offset + 3
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: cut if how == "cut" else 0])
    assert module(folder)._identity() == fingerprint  # a checkpoint still fits
    ids = epoch(module(folder))
    bad = {f"{number:04d}" for number in range(24 if how == "cut" else 20, 30)}
    assert [got for got in ids if got[-4:] in bad] == []
    assert all(got == expected for got, expected in zip(ids, clean, strict=True) if expected[-4:] not in bad)
    # The shard as a whole is one entry (its key is empty, or that of the sample at the cut), and every sample is one.
    assert {key for _, key in written_down(folder)} - {""} == bad
    assert epoch(module(folder)) == ids
    if how == "gone":
        strict = module(folder, faults=None)
        strict.setup()
        assert strict.dataset is not None and len(strict.dataset) == TOTAL - PER_SHARD
    else:
        with pytest.raises(BrokenShardError, match=r"00002\.tar is (truncated|empty)"):
            module(folder, faults=None).setup()


def test_a_shard_that_vanishes_while_it_is_read(tmp_path: Path) -> None:
    folder = whole_set(tmp_path / "set")
    clean = epoch(module(folder))
    data = module(folder)
    data.setup()
    (folder / "00001.tar").unlink()
    ids = epoch(data)
    lost = {f"{number:04d}" for number in range(10, 20)}
    assert {key for _, key in written_down(folder)} == lost
    assert all(got == expected for got, expected in zip(ids, clean, strict=True) if expected[-4:] not in lost)
    strict = module(whole_set(folder), faults=None)
    strict.setup()
    (folder / "00001.tar").unlink()
    with pytest.raises(FileNotFoundError):
        epoch(strict)


FIELDS = {"noise_seed": 3, "original_height": 64, "original_width": 64, "crop_top": 0, "crop_left": 0}
SAMPLE_FAULTS: dict[str, tuple[str, bytes]] = {
    **{
        f"{name} {value!r:.20}": ("json", json.dumps(FIELDS | {"caption": "a", name: value}).encode())
        for name, value in [
            ("noise_seed", 1e30),
            ("noise_seed", 10**30),
            ("noise_seed", -1),
            ("noise_seed", 1 << 63),
            ("noise_seed", True),
            ("noise_seed", [1]),
            ("noise_seed", "1"),
            ("original_width", -5),
            ("original_height", 0),
            ("original_height", 10**9),
            ("original_width", 64.0),
            ("crop_top", -1),
            ("crop_left", None),
            ("caption", "\ud800"),
            ("caption", "a\0b"),
            ("caption", 5),
            ("caption", "  "),
            ("more", "\udfff"),
        ]
    },
    "deep json": ("json", b'{"a":' * 500 + b"1" + b"}" * 500),
    "logvar of another shape": (
        "latent.safetensors",
        safetensors.numpy.save({"latents": np.zeros((4, 2, 2), "f2"), "logvar": np.zeros((4, 1, 2), "f2")}),
    ),
    "logvar that overflows": (
        "latent.safetensors",
        safetensors.numpy.save(
            {"latents": np.zeros((4, 2, 2), "f2"), "logvar": np.full((4, 2, 2), 300, "f2")}
        ),
    ),
    "no logvar": ("latent.safetensors", float16(np.zeros((4, 2, 2)))),
    "an elongated image": ("png", png(0, (1, 60_000))),
    "a condition image of other proportions": ("cond.png", png(0, (6, 8))),
    "an image that is no image": ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
}


def picky(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if (image == image[0, 0]).all():
        raise ZeroDivisionError("an image of one colour")
    return image


@pytest.mark.parametrize("name", SAMPLE_FAULTS)
def test_whatever_one_sample_does_is_inside_the_budget(tmp_path: Path, name: str) -> None:
    """Shard, key and reason are written down, the others are read; without a budget it is one sentence."""
    extension, content = SAMPLE_FAULTS[name]
    mean = {"latents": np.ones((4, 2, 2), np.float16), "logvar": np.zeros((4, 2, 2), np.float16)}
    with ShardWriter(tmp_path / "set") as writer:
        for number in range(6):
            members: dict[str, Member] = {
                "latent.safetensors": safetensors.numpy.save(mean),
                "json": FIELDS | {"caption": "a"},
                "png": png(number),
                "cond.png": png(number),
            }
            if number == 4:
                members[extension] = content
            writer.write(members)
    options: dict[str, Any] = {
        "contents": ["latents", "noise_seeds", "sizes", "images", "control_images"],
        "draw_latents": True,
        "resolution": 600 if "elongated" in name else 6,
    }
    faults = Faults(1, str(tmp_path / "quarantine.jsonl"))
    data = ShardDataModule(str(tmp_path / "set"), 3, faults=faults, **options)
    loader = data.train_dataloader()
    batches = list(itertools.chain.from_iterable(itertools.repeat(loader, 2)))
    assert len(batches) == 4
    (entry,) = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert entry["shard"].endswith("00000.tar") and entry["key"] == "000000004" and len(entry["reason"]) < 500
    with pytest.raises(BadSampleError, match=r"00000\.tar, key '000000004': ") as refused:
        list(ShardDataModule(str(tmp_path / "set"), 3, **options).train_dataloader())
    assert "\n" not in str(refused.value)


def test_a_condition_that_fails_on_one_image(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set") as writer:
        for number in range(6):
            even = io.BytesIO()
            Image.new("RGB", (6, 6), "red").save(even, "PNG")
            writer.write({"txt": "a", "png": even.getvalue() if number == 4 else png(number)})
    options: dict[str, Any] = {"contents": ["images", "control_images"], "condition": picky}
    faults = Faults(1, str(tmp_path / "quarantine.jsonl"))
    data = ShardDataModule(str(tmp_path / "set"), 3, faults=faults, **options)
    assert len(list(data.train_dataloader())) == 2
    assert "ZeroDivisionError: an image of one colour" in (tmp_path / "quarantine.jsonl").read_text()
    flat = ShardDataModule(
        str(tmp_path / "set"),
        3,
        faults=faults,
        contents=options["contents"],
        condition=lambda image: image[..., :1],
    )
    with pytest.raises(
        UserError, match=r"data\.condition made uint8 \(6, 6, 1\) from an image of \(6, 6, 3\)"
    ):
        list(flat.train_dataloader())


def test_only_faults_of_this_run_count(tmp_path: Path) -> None:
    """Its folder, its shards, and since it began."""
    folder = whole_set(tmp_path / "set")
    member_fault(png=b"")(folder)
    other = tmp_path / "run" / "quarantine.jsonl"
    other.parent.mkdir()
    lines = [json.dumps({"shard": f"elsewhere/{n}.tar", "key": str(n), "reason": "bad"}) for n in range(50)]
    other.write_text("".join(f"{line}\n" for line in lines))
    reached = Quarantine(Faults(2), other.parent, [str(folder / f"0000{n}.tar") for n in range(SHARDS)])
    reached.record(str(folder / "00000.tar"), "0007", "bad")
    reached.record(str(folder / "00002.tar"), "0023", "bad")
    with pytest.raises(TooManyFaultsError, match="3 samples"):
        reached.record(str(folder / "00001.tar"), "0011", "bad")
    reached.set_aside()
    assert not other.exists() and (other.parent / "quarantine.1.jsonl").exists()
    again = Quarantine(Faults(2), other.parent)
    again.set_aside()  # nothing to do
    again.record("\udcff.tar", "\ud800", "half a character \ud800")  # names may hold any bytes
    again.record("\udcff.tar", "\ud800", "again")
    assert len(other.read_text().splitlines()) == 1
    again.set_aside()
    assert (other.parent / "quarantine.2.jsonl").exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_resumes_keeps_its_count(tmp_path: Path, resumed: bool) -> None:
    folder = whole_set(tmp_path / "set")
    trainer = Trainer(default_root_dir=tmp_path / "run", logger=False, accelerator="cpu")
    trainer.ckpt_path = str(tmp_path / "last.ckpt") if resumed else None
    data = ShardDataModule(str(folder), 4, contents=["latents"], faults=Faults(5))
    data.trainer = trainer
    path = tmp_path / "run" / "quarantine.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"shard": str(folder / "00000.tar"), "key": "0001", "reason": "bad"}) + "\n")
    data.prepare_data()
    data.setup()
    assert path.exists() == resumed
    assert data.dataset is not None and data.dataset._quarantine is not None
    assert data.dataset._quarantine.path == path


def test_the_budget_is_that_of_all_processes_and_starts(tmp_path: Path) -> None:
    path = str(tmp_path / "folder" / "quarantine.jsonl")
    first, second = Quarantine(Faults(2, path)), Quarantine(Faults(2, path))
    first.record("a.tar", "1", "bad")
    second.record("a.tar", "1", "bad")
    second.record("b.tar", "1", "bad")
    with pytest.raises(TooManyFaultsError, match="3 samples or shards cannot be read, more than"):
        first.record("a.tar", "2", "bad again.")
    assert len(Path(path).read_text().splitlines()) == 3
    with open(path, "a") as file:
        file.write('{"shard": "c.t')  # a process died here
    again = Quarantine(Faults(3, path))
    again.record("a.tar", "2", "bad")
    with pytest.raises(ValueError, match=r"data\.faults\.budget is -1"):
        Faults(-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_beyond_the_budget_the_run_stops_with_one_sentence(tmp_path: Path, workers: int) -> None:
    folder = whole_set(tmp_path / "set")
    member_fault(png=b"")(folder)
    loader = module(folder, budget=1, num_workers=workers).train_dataloader()
    with pytest.raises(TooManyFaultsError) as stopped:
        list(itertools.chain.from_iterable(itertools.repeat(loader, 2)))
    assert str(stopped.value).startswith("2 samples or shards cannot be read") and "\n" not in str(
        stopped.value
    )
    assert stopped.value.exit_code == 2
    loader.close()


def test_when_nothing_can_be_read(tmp_path: Path) -> None:
    folder = whole_set(tmp_path / "set")
    data = module(folder, budget=1000)
    data.setup()
    for path in folder.glob("*.tar"):
        path.unlink()
    assert data.dataset is not None
    with pytest.raises(
        UserError, match=r"cannot be read either \(the last: .*No such file.*; is the storage"
    ):
        data.dataset.batch([0])


@pytest.mark.parametrize("sizes", [[2], [3, 4], [1, 0, 6]])
def test_replacements_are_others_and_reach_all(sizes: list[int]) -> None:
    order = SampleOrder(sizes, seed=1)
    for sample in range(sum(sizes)):
        chosen = [order.replacement(sample, attempt) for attempt in range(80)]
        assert set(chosen) == set(range(sum(sizes))) - {sample}
        assert chosen == [SampleOrder(sizes, seed=1).replacement(sample, attempt) for attempt in range(80)]


@pytest.mark.parametrize("key", ["../../etc/cron", "/etc/passwd", "a/../../b", "a\x1bb"])
def test_path_tricks_are_refused(tmp_path: Path, key: str) -> None:
    folder = whole_set(tmp_path / "set")
    members = [
        *flat(samples_of(0)),
        *[(f"{key}.{kind}", content) for kind, content in samples_of(0)["0000"].items()],
    ]
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(BrokenShardError, match="leads out of its folder or holds control characters"):
        module(folder, faults=None).setup()
    data = module(folder)
    data.setup()
    assert data.dataset is not None and len(data.dataset) == TOTAL + 1
    ids = [
        sample_id
        for start in range(0, TOTAL, 4)
        for sample_id in data.dataset.batch(range(start, start + 4)).sample_ids
    ]
    assert all(
        ".." not in sample_id and "passwd" not in sample_id and "\x1b" not in sample_id for sample_id in ids
    )


def test_links_have_no_content(tmp_path: Path) -> None:
    """Two files of one inode are written by tar as one file and one link; the second sample would be lost without a word."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("0.txt", tarfile.SYMTYPE),
            ("0.png", tarfile.LNKTYPE),
            ("0.json", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert [(one.name, one.size, one.without_content) for one in tar_members(path)] == [
        ("0.txt", 0, "symbolic link"),
        ("0.png", 0, "hard link"),
    ]
    with pytest.raises(BrokenShardError, match=r"the member 'txt' of '0' is a symbolic link, which has no"):
        scan_shard(path)


def pax(records: bytes) -> bytes:
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")


@pytest.mark.parametrize(
    "records", [b"14 size=-1024\n", b"0 path=a\n", b"path", b"99 size=5\n" * 3, b"x size=5\n"]
)
def test_headers_that_would_lead_in_circles(tmp_path: Path, records: bytes) -> None:
    info = tarfile.TarInfo("a.txt")
    info.size = 5
    path = tmp_path / "s.tar"
    path.write_bytes(
        pax(records) + info.tobuf(tarfile.USTAR_FORMAT) + b"hello".ljust(512, b"\0") + bytes(1024)
    )
    with pytest.raises(BrokenShardError, match=r"s\.tar has no valid tar header at byte"):
        list(tar_members(path))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def test_bombs_are_refused() -> None:
    with pytest.raises(BadSampleError, match=r"it has 11000 x 10000 pixels, more than 100,000,000"):
        decode("png", bomb(11_000, 10_000), "here")
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        decode("png", bomb(200_000, 200_000), "here")
    with pytest.raises(BadSampleError, match=r"a text member has 2,000,000 bytes, more than 1,048,576"):
        decode("txt", b"a" * 2_000_000, "here")
    with pytest.raises(BadSampleError, match="cannot be parsed"):
        decode("json", b"[" * 200_000, "here")
    with pytest.raises(BadSampleError, match="cannot be parsed"):
        decode("json", b'{"a": ' + b"9" * 10_000 + b"}", "here")


def test_img2dataset_counts(tmp_path: Path) -> None:
    """A tar that was cut between two samples and closed again is whole to any reader of tars."""
    folder = whole_set(tmp_path / "set")
    (folder / "00001_stats.json").write_text(json.dumps({"count": 12, "successes": 11}))
    with pytest.raises(
        BrokenShardError, match=r"00001\.tar holds 10 samples, but its _stats\.json counts 11"
    ):
        module(folder, faults=None).setup()
    assert len(epoch(module(folder))) == TOTAL and written_down(folder) == {("00001.tar", "")}
    (folder / "00001_stats.json").write_text(json.dumps({"count": 12, "successes": 10}))
    for sidecar in folder.glob("*.npz"):
        sidecar.unlink()
    module(folder, faults=None).setup()
