"""Tars, indexes, cached copies and members that lie or lack something: each is refused in words, never read as less."""

import io
import json
import os
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.shards.checks import SampleCheck, odd_latents
from data.shards.decoders import BadSampleError, decode, decode_latents
from data.shards.index import ShardSet, index_shard, save_index, sidecar_path
from data.shards.layout import Part, missing_member
from data.shards.remote.shard_cache import ShardCache
from data.shards.remote.shard_file import RemoteFile
from data.shards.sidecar import load_sidecar
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError, tar_members

Files = Sequence[tuple[str, bytes]]


def tar(files: Files, blocking: int = 20) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    content = stream.getvalue()
    return content.ljust(-(-len(content) // (blocking * 512)) * blocking * 512, b"\0")


FILES = [
    (f"{number:04d}.{kind}", bytes([65 + number]) * 700) for number in range(40) for kind in ("jpg", "txt")
]
WHOLE = tar(FILES)
HEADER = 10 * (512 + 1024)  # of the first member of sample 5


def zeroed(start: int, end: int | None = None) -> bytes:
    end = len(WHOLE) if end is None else end
    return WHOLE[:start] + bytes(end - start) + WHOLE[end:]


DAMAGED: dict[str, tuple[bytes, str]] = {
    "preallocated, at a member": (zeroed(HEADER), "holds nothing but [0-9,]+ zeros from byte 15360 on"),
    "preallocated, in a member": (zeroed(HEADER + 700), "holds nothing but [0-9,]+ zeros from byte 16896 on"),
    "preallocated, in a header": (zeroed(HEADER + 100), "no valid tar header at byte 15360"),
    "one header of zeros": (
        zeroed(HEADER, HEADER + 512),
        "the mark that ends a tar at byte 15360, but data follows at byte 15872",
    ),
    "two blocks of zeros": (zeroed(HEADER, HEADER + 1024), "data follows at byte 16384"),
    "two tars": (WHOLE + tar([("9999.txt", b"a")]), "data follows at byte .* two tars were joined"),
    "two tars without padding": (
        WHOLE[: len(FILES) * 1536] + bytes(512) + tar([("9999.txt", b"a")]),
        "data follows at byte",
    ),
    "a tar and rubbish": (WHOLE + b"x", "data follows at byte"),
    "a huge record": (tar(FILES, blocking=400), "tar's default blocking factor"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_follows_the_end_of_a_tar_is_not_passed_over(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(BrokenShardError, match=rf"s\.tar.*{message}") as refused:
        index_shard(path)
    assert "\n" not in str(refused.value) and "copy it again" in str(refused.value)
    # With a budget what lies before is read, and the shard is one fault; the last sample may have lost members.
    index = index_shard(path, tolerant=True)
    assert len(index.faults) == 1 and index.faults[0].reason == str(refused.value)
    expected = {
        f"{number:04d}"
        for number in range(40 if "tars" in name or "rubbish" in name or "huge" in name else 5)
    }
    kept = {index.key(row) for row in range(len(index)) if index.members(row)}
    assert kept == expected - {index.faults[0].key} and len(kept) >= len(expected) - 1
    # The same over ranges, as of a remote shard.
    with pytest.raises(BrokenShardError, match=message):
        index_shard(f"file://{path}", tmp_path / "indexes")


@pytest.mark.parametrize("end", [1024, 512, 10240 + 512, 20 * 512])
def test_the_ends_that_tar_programs_write_are_accepted(tmp_path: Path, end: int) -> None:
    """Go's and Rust's write two blocks; GNU's and Python's fill a record of 20."""
    path = tmp_path / "s.tar"
    path.write_bytes(WHOLE[: len(FILES) * 1536] + bytes(end))
    assert len(list(tar_members(path))) == len(FILES)


def keys_of(names: Sequence[str], tmp_path: Path) -> ShardSet:
    (tmp_path / "s.tar").write_bytes(tar([(name, b"words") for name in names]))
    return ShardSet.open(tmp_path / "s.tar")


def test_dotted_keys_do_not_melt_into_one_sample(tmp_path: Path) -> None:
    names = [f"v1.{number:04d}.{kind}" for number in range(8) for kind in ("jpg", "txt")]
    with pytest.raises(
        BrokenShardError, match=r"'v1' holds members named '0000\.\*', which look like samples"
    ):
        keys_of(names, tmp_path)
    many = [f"v1.{number:04d}.jpg" for number in range(300)]
    with pytest.raises(BrokenShardError, match=r"members of more than 256 kinds, the last '0256\.jpg'"):
        keys_of(many, tmp_path)


def test_further_members_are_no_dotted_keys(tmp_path: Path) -> None:
    names = [
        "k.jpg",
        "k.mask.png",
        "k.left.jpg",
        "k.right.jpg",
        "k.cond.png",
        "k.cond.txt",
        "k.txt",
        "k.seg.npy",
        "d.e/f.jpg",
    ]
    found = keys_of(names, tmp_path)
    assert found.sizes == [2] and found.shards[0].faults == ()
    # What the reader cannot find is named with the reason.
    index = keys_of(["k.1.jpg", "k.2.jpg", "k.json"], tmp_path).shards[0]
    error = missing_member(index, [Part("images", ("jpg", "png"))], 0)
    assert "it has 1.jpg, 2.jpg: a key ends at the first dot of a file's name" in str(error)


def test_names_with_a_line_break_are_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(
        BrokenShardError, match=r"the key 'a\\nb/0001' leads out of its folder or holds control"
    ):
        keys_of(["a\nb/0001.txt"], tmp_path)


def check(files: Sequence[dict[str, bytes]], contents: Any = None) -> list[str]:
    checked = SampleCheck(contents, "refuse")
    found = [
        reason for number, members in enumerate(files) for reason in checked.sample(str(number), members)
    ]
    return found + list(checked.shard())


def latents(sides: tuple[int, ...] = (4, 2, 2), dtype: str = "F16", **changes: Any) -> bytes:
    size = int(np.prod(sides)) * (2 if dtype == "F16" else 4)
    entry = {"dtype": dtype, "shape": list(sides), "data_offsets": [0, size], **changes}
    header = json.dumps({"latents": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def test_sets_that_no_training_can_read() -> None:
    melted = {"1.jpg": b"", "2.jpg": b"", "json": b'{"caption": "a"}'}
    (reason,) = check([melted] * 3)
    assert "3 of 3 samples have neither an image" in reason and "a key ends at the first dot" in reason
    assert "--contents" in reason
    assert check([melted], contents=[]) == []  # captions alone
    (reason,) = check([melted], contents=["images"])
    assert "there is no member for images" in reason
    (reason,) = check([{"latent.safetensors": latents()}])
    assert "1 of 1 samples have no caption" in reason
    assert check([{"latent.safetensors": latents(), "txt": b"a"}]) == []
    found = check([{"latent.safetensors": latents(), "txt": b"a", "json": b"{}"}], ["latents", "noise_seeds"])
    assert found == ["as data.contents reads it: the json member has no int named 'noise_seed'."]
    with pytest.raises(ValueError, match="--contents names pictures, but it accepts latents, images"):
        SampleCheck(["pictures"], "refuse")  # type: ignore[list-item]


def test_verify_knows_the_fields_that_a_training_reads() -> None:
    fields = {"noise_seed": 1e30, "original_width": -5, "crop_top": True, "original_height": 10**400}
    found = check([{"latent.safetensors": latents(), "txt": b"a", "json": json.dumps(fields).encode()}])
    assert [reason.split(" is ")[0] for reason in found] == [
        "json: 'noise_seed'",
        "json: 'original_height'",
        "json: 'original_width'",
        "json: 'crop_top'",
    ]
    assert max(map(len, found)) < 150


def test_one_latent_of_another_shape_is_found_over_all_shards() -> None:
    shapes: list[tuple[str, dict[tuple[int, ...], list[str]]]] = [
        ("a.tar", {(4, 2, 2): ["0", "1"], (4, 2, 3): ["2"]}),
        ("b.tar", {(4, 2, 2): ["3"]}),
    ]
    ((shard, key, reason),) = odd_latents(shapes)
    assert (shard, key) == ("a.tar", "2") and "(4, 2, 3), but those of 3 of 4 samples (4, 2, 2)" in reason
    assert list(odd_latents(shapes[1:])) == []
    many: dict[tuple[int, ...], list[str]] = {
        (4, 2, 2): [str(n) for n in range(50)],
        (4, 3, 3): [str(n) for n in range(30)],
    }
    ((_, key, reason),) = odd_latents([("a.tar", many)])
    assert key == "" and reason.startswith("the latents of 30 samples, '0' the first, are (4, 3, 3)")


BAD_JSON: dict[str, bytes] = {
    "half a surrogate pair": b'{"caption": "a \\ud800 b"}',
    "in a name": b'{"\\udfff": 1}',
    "deep in a list": b'{"a": [[{"b": "\\ud83d"}]]}',
    "deep": b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
    "too deep to parse": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 300 + b"1" + b"}" * 300,
    "a number without end": b'{"a": ' + b"9" * 10_000 + b"}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "zeros": b'{"a": 1}' + bytes(20),
    "a list": b"[1]",
    "a key twice": b'{"noise_seed": 1, "noise_seed": 2}',
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_no_object_of_text(name: str) -> None:
    with pytest.raises(
        BadSampleError, match=r"^here: the json member (cannot be parsed|holds a list)"
    ) as refused:
        decode("json", memoryview(BAD_JSON[name]), "here")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    str(refused.value).encode()


def test_json_that_is_fine() -> None:
    content = '{"caption": "a \\ud83d\\ude00 \u00e4", "similarity": NaN, "deep": [[[[1]]]]}'.encode(
        "utf-8-sig"
    )
    assert decode("json", content, "")["caption"] == "a \U0001f600 \u00e4"


@pytest.mark.parametrize("content", [b"a\0b", bytes(40), b"words" + bytes(3)])
def test_text_with_zero_bytes_is_a_hole_in_a_file(content: bytes) -> None:
    with pytest.raises(BadSampleError, match="the caption holds zero bytes"):
        decode("txt", content, "here")


def test_text_loses_its_byte_order_mark() -> None:
    assert decode("txt", "\ufeffa caption \n".encode(), "") == "a caption"


def raw(header: bytes, data: bytes = bytes(32), length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


LYING: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\1" * 7,
    "a header as long as memory": raw(b"{}", length=1 << 62),
    "a header beyond the file": raw(b"{}", length=100),
    "no JSON": raw(b"\xff" * 40),
    "a list": raw(b"[]"),
    "deep": raw(b"[" * 100_000),
    "UTF-16": raw('{"latents": 1}'.encode("utf-16")),
    "another name": latents().replace(b"latents", b"latentz"),
    "integers": latents(dtype="I64"),
    "dtype of another type": raw(
        b'{"latents": {"dtype": ["F16"], "shape": [4, 2, 2], "data_offsets": [0, 32]}}'
    ),
    "two axes": latents((4, 4)),
    "a negative side": latents(shape=[4, -2, -2]),
    "a side to be guessed": latents(shape=[4, 2, -1]),
    "a side that is no integer": latents(shape=[4, 2, 2.0]),
    "true": latents((1, 4, 4), shape=[True, 4, 4]),
    "no side": latents((0, 2, 2)),
    "more than there is": latents(data_offsets=[0, 64]),
    "sides beyond memory": latents(shape=[4, 99999999999, 2]),
    "offsets backwards": latents(data_offsets=[32, 0]),
    "a negative offset": latents(data_offsets=[-32, 0]),
    "offsets beyond": latents(data_offsets=[1 << 80, (1 << 80) + 32]),
    "offsets as text": latents(data_offsets=["0", "32"]),
    "one offset": latents(data_offsets=[32]),
    "cut": latents()[:-1],
    "not finite": latents()[:-2] + b"\0\x7c",
    "beyond float16": latents(dtype="F32")[:-4] + struct.pack("<f", 1e30),
}


@pytest.mark.parametrize("name", LYING)
def test_safetensors_headers_that_lie(name: str) -> None:
    with pytest.raises(BadSampleError, match=r"^here: latent\.safetensors") as refused:
        decode_latents(memoryview(LYING[name]), "here")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def damaged_sidecars(content: bytes) -> dict[str, bytes]:
    with np.load(io.BytesIO(content)) as stored:
        arrays = dict(stored)

    def changed(**changes: Any) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, **(arrays | changes))
        return stream.getvalue()

    compressed = io.BytesIO()
    np.savez_compressed(compressed, **arrays)
    return {
        "cut": content[:-100],
        "flipped": content[:900] + bytes([content[900] ^ 255]) + content[901:],
        "empty": b"",
        "no zip": b"x" * 1000,
        "compressed, so of any size": compressed.getvalue(),
        "offsets beyond the file": changed(offsets=arrays["offsets"] + (1 << 40)),
        "sizes beyond the file": changed(sizes=arrays["sizes"] + (1 << 40)),
        "negative sizes": changed(sizes=-arrays["sizes"]),
        "fewer rows": changed(offsets=arrays["offsets"][:-1]),
        "other numbers": changed(sizes=arrays["sizes"].astype(np.float64)),
        "keys that run backwards": changed(key_ends=arrays["key_ends"][::-1].copy()),
        "keys beyond": changed(key_ends=arrays["key_ends"] + 5),
        "no stamp": changed(stamp=np.zeros(0, dtype=np.int64)),
        "an older version": changed(stamp=arrays["stamp"] - np.array([1, 0, 0])),
    }


def test_a_sidecar_that_lies_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(WHOLE)
    expected, sidecar = index_shard(path), sidecar_path(path)
    for name, content in damaged_sidecars(sidecar.read_bytes()).items():
        sidecar.write_bytes(content)
        assert load_sidecar(sidecar, str(path), None) is None, name
        found = index_shard(path)
        assert found.fingerprint == expected.fingerprint, name
        assert np.array_equal(found.offsets, expected.offsets), name
        assert [found.key(row) for row in range(len(found))] == [f"{row:04d}" for row in range(40)], name


def test_checksums_outlive_the_former_version_of_the_index(tmp_path: Path) -> None:
    """They are what tells of bytes that change later: `verify` need not run again."""
    path = tmp_path / "s.tar"
    path.write_bytes(WHOLE)
    index, sidecar = index_shard(path), sidecar_path(path)
    checksums = np.arange(index.offsets.size, dtype=np.uint32).reshape(index.offsets.shape)
    save_index(replace(index, checksums=checksums), None)
    with np.load(sidecar) as stored:
        arrays = dict(stored)
    arrays["stamp"][0] = 2
    np.savez(sidecar.with_suffix(".npz"), **arrays)
    found = index_shard(path)
    assert found.checksums is not None and np.array_equal(found.checksums, checksums)
    arrays["fingerprint"] = np.array("another")
    np.savez(sidecar.with_suffix(".npz"), **arrays)
    assert index_shard(path).checksums is None


def replaced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_a_replaced_shard_is_fetched_again_and_its_index_is_its_own(tmp_path: Path) -> None:
    path, folder = tmp_path / "s.tar", tmp_path / "cache"
    other = tar([(name, content[::-1]) for name, content in FILES][:30])
    path.write_bytes(WHOLE)
    store, url = ShardStore(ShardCache(folder, 1)), f"file://{path}"
    first = index_shard(url, folder, store)
    (copy,) = folder.glob("s-*.tar")
    assert copy.read_bytes() == WHOLE
    replaced(path, other)
    # A run that has begun goes on with its copy; without one it is refused rather than read at wrong places.
    assert isinstance(store.open(url, first.stamp), RemoteFile)
    with pytest.raises(
        BrokenShardError, match=r"was replaced since it was indexed \(133,120 bytes then, 51,200 now\)"
    ):
        ShardStore().open(url, first.stamp)
    second = index_shard(url, folder, store)
    assert len(second) == 15 and second.fingerprint != first.fingerprint
    (copy,) = folder.glob("s-*.tar")
    assert copy.read_bytes() == other
    # Of the same size: only time or tag tell.
    replaced(path, tar([(name, content.lower()) for name, content in FILES][:30]))
    assert index_shard(url, folder, store).stamp != second.stamp
    (copy,) = folder.glob("s-*.tar")
    assert copy.read_bytes() == path.read_bytes()


def test_a_local_shard_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(WHOLE)
    index = index_shard(path)
    ShardStore().open(str(path), index.stamp).close()
    replaced(path, WHOLE)
    with pytest.raises(
        BrokenShardError, match=r"was replaced since it was indexed \(other time or tag\).* start again"
    ):
        ShardStore().open(str(path), index.stamp)


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_a_cut_copy_is_fetched_again(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path, folder = tmp_path / "s.tar", tmp_path / "cache"
    path.write_bytes(WHOLE)
    url = f"file://{path}" if kind == "file" else f"pipe:cat {path}"
    store = ShardStore(ShardCache(folder, 1))
    index = index_shard(url, folder, store)
    (copy,) = folder.glob("s-*.tar")
    for damage in ("cut", "empty", "longer", "size"):
        if damage == "size":
            for noted in folder.glob("*.size"):
                noted.write_text("")
        else:
            copy.write_bytes({"cut": WHOLE[:5000], "empty": b"", "longer": WHOLE + b"x"}[damage])
        caplog.clear()
        file = store.open(url, index.stamp)
        assert bytes(file.read(0, len(WHOLE))) == WHOLE
        file.close()
        if damage != "size":
            (message,) = {record.getMessage() for record in caplog.records}
            assert f"cached copy {copy} of '{url}' has" in message and "damaged on this disk" in message
        for sidecar in folder.glob("*.npz"):
            sidecar.unlink()
        assert index_shard(url, folder, store).fingerprint == index.fingerprint
    if kind == "file":  # cut while it is open
        file = store.open(url, index.stamp)
        assert bytes(file.read(0, 10)) == WHOLE[:10]
        os.truncate(copy, 5000)
        assert bytes(file.read(6000, 5000)) == WHOLE[6000:11000]
        file.close()


def test_a_copy_that_arrives_while_it_is_looked_for_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process renames it between two looks at the disk."""
    cache, stat, url = ShardCache(tmp_path, 1), Path.stat, "pipe:cat s.tar"

    def arrives(self: Path, **options: Any) -> os.stat_result:
        try:
            return stat(self, **options)
        except FileNotFoundError:
            if self.suffix == ".tar":
                self.write_bytes(WHOLE)
            raise

    monkeypatch.setattr(Path, "stat", arrives)
    assert cache.find(url) is None and cache.path_of(url).read_bytes() == WHOLE and not caplog.records


def test_a_broken_remote_shard_is_blamed_with_its_copy(tmp_path: Path) -> None:
    path, folder = tmp_path / "s.tar", tmp_path / "cache"
    path.write_bytes(WHOLE[:30_000])
    store = ShardStore(ShardCache(folder, 1))
    with pytest.raises(
        BrokenShardError, match=rf"^file://{path} \(its copy {folder}/s-.*\.tar\) is truncated"
    ):
        index_shard(f"file://{path}", folder, store)


def test_a_transfer_that_was_cut_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = tmp_path / "s.tar", tmp_path / "cache"
    path.write_bytes(WHOLE)
    cache, copied = ShardCache(folder, 1), list[int]()

    def copy(url: str, target: Any) -> None:
        copied.append(1)
        target.write(WHOLE[: -1 if len(copied) < 3 else None])

    monkeypatch.setattr(cache, "_copy", copy)
    monkeypatch.setattr("data.shards.remote.patience._FIRST_PAUSE_SECONDS", 0.0)
    store = ShardStore(cache)
    stamp = store.stamp(f"file://{path}")
    with pytest.raises(OSError, match=r"133,119 bytes came, but the server states 133,120"):
        cache.fetch(f"file://{path}", stamp)
    assert len(index_shard(f"file://{path}", folder, store)) == 40 and len(copied) == 3


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.tar"))
    path.write_bytes(WHOLE)
    assert len(index_shard(path, tmp_path / "indexes")) == 40 and ShardSet.open(path).fingerprint
