"""The index against Python's tarfile, and what it refuses."""

import gzip
import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from data.shards.index import (
    ShardIndex,
    ShardSet,
    expand_braces,
    find_shards,
    index_shard,
    scan_shard,
    sidecar_path,
)
from data.shards.locations import find_locations
from data.shards.scan import scan_members
from data.shards.tar_headers import BrokenShardError, TarMember, tar_members

LONG = "folder/" + "n" * 120 + "/" + "k" * 130


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_equals_tarfile(tmp_path: Path, tar_format: int) -> None:
    long = LONG[:220] if tar_format == tarfile.USTAR_FORMAT else LONG
    names = ["a.txt", "a.jpg", "sub/b.latent.safetensors", f"{long}.txt", "größe.txt", "c.json", "d.cond.png"]
    contents = [bytes([number]) * (number * 300) for number in range(len(names))]
    path = write_tar(tmp_path / "s.tar", list(zip(names, contents, strict=True)), tar_format)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert [(member.name, member.offset, member.size) for member in tar_members(path)] == expected
    index = scan_shard(path)
    assert [index.key(row) for row in range(len(index))] == ["a", "sub/b", long, "größe", "c", "d"]
    assert index.extensions == ("cond.png", "jpg", "json", "latent.safetensors", "txt")
    data = path.read_bytes()
    column = index.column("jpg")
    assert column is not None and index.column("webp") is None
    assert index.offsets[1:, column].tolist() == [-1] * 5
    assert data[index.offsets[0, column] :][: index.sizes[0, column]] == contents[1]


def test_skips_what_is_no_sample(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("README", "._a.txt", "a.txt"):
            tar.addfile(tarfile.TarInfo(name))
    index = scan_shard(path)
    assert [index.key(row) for row in range(len(index))] == ["a"]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = write_tar(
        tmp_path / "w.tar", [(f"{i}.txt", b"x" * (200 + 300 * i)) for i in range(4)]
    ).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "cut.tar"
    for length in [*range(1, end, 97), *range(512, end + 1, 512)]:
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenShardError, match=r"cut\.tar is truncated"):
            scan_shard(path)
    path.write_bytes(whole[:700])
    with pytest.raises(BrokenShardError, match=r"'0\.txt' should end at byte 712, but the file has 700"):
        scan_shard(path)
    path.write_bytes(b"")
    with pytest.raises(BrokenShardError, match=r"cut\.tar is empty"):
        scan_shard(path)


def test_other_damage_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"1"), ("b.txt", b"2")])
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 4  # one bit of the second header
    path.write_bytes(data)
    with pytest.raises(BrokenShardError, match="no valid tar header at byte 1024"):
        scan_shard(path)
    path.write_bytes(gzip.compress(bytes(data)).ljust(512, b"\0"))
    with pytest.raises(BrokenShardError, match="looks compressed"):
        scan_shard(path)
    write_tar(path, [("a.txt", b"1"), ("b.txt", b"2"), ("a.jpg", b"3")])
    with pytest.raises(BrokenShardError, match="members of 'a' are not adjacent"):
        scan_shard(path)
    write_tar(path, [("a.txt", b"1"), ("a.txt", b"2")])
    with pytest.raises(BrokenShardError, match="'a' has the member 'txt' twice"):
        scan_shard(path)


def test_sidecar_is_used_and_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"1")])
    first = index_shard(path)
    scans: list[str] = []

    def counted(location: str, members: Iterable[TarMember]) -> ShardIndex:
        scans.append(location)
        return scan_members(location, members)

    monkeypatch.setattr("data.shards.index.scan_members", counted)
    again = index_shard(path)
    assert not scans
    assert again.fingerprint == first.fingerprint and again.offsets.tolist() == first.offsets.tolist()
    assert [again.key(0), again.extensions] == ["a", ("txt",)]
    # Same size, other content, later: only the modification time tells.
    write_tar(path, [("b.txt", b"2")])
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    assert index_shard(path).key(0) == "b" and len(scans) == 1
    sidecar_path(path).write_bytes(sidecar_path(path).read_bytes()[:100])
    assert index_shard(path).key(0) == "b" and len(scans) == 2
    assert index_shard(path).key(0) == "b" and len(scans) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tar", "s.tar.index.npz"]


def test_an_index_that_cannot_be_saved_is_only_slow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"1")])
    (tmp_path / "file").touch()
    assert len(index_shard(path, tmp_path / "file")) == 1
    assert "set data.index_folder to a writable folder" in caplog.text


def test_shards_of_equal_name_stay_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = write_tar(tmp_path / folder / "00000.tar", [(f"{folder}.txt", b"")])
        os.utime(path, ns=(0, 10**18))  # so that size and time cannot tell them apart
    for _ in range(2):
        shards = ShardSet.open([tmp_path / "one", tmp_path / "two"], tmp_path / "indexes")
        assert [shard.key(0) for shard in shards.shards] == ["one", "two"]
    assert list(shards.names()) == ["one/00000", "two/00000"]
    assert shards.fingerprint != ShardSet.open([tmp_path / "two", tmp_path / "one"]).fingerprint


def test_the_fingerprint_survives_a_copy(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "00000.tar", [("a.txt", b"1")])
    assert ShardSet.open(tmp_path / "one").fingerprint == ShardSet.open(str(tmp_path / "two")).fingerprint


def test_find_shards(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:03d}.tar" for number in range(12)]
    for path in paths:
        path.touch()
    (tmp_path / "notes.txt").touch()
    assert find_shards(tmp_path) == paths
    assert find_shards(f"{tmp_path}/00*.tar") == paths[:10]
    assert find_shards(f"{tmp_path}/{{008..010}}.tar") == paths[8:11]
    assert find_shards([f"{tmp_path}/{{000,002}}.tar", str(paths[2]), str(paths[1])]) == [
        paths[0],
        paths[2],
        paths[1],
    ]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]


@pytest.mark.parametrize("pattern", ["p{i,i}pe:touch ran", "{pipe:touch ran,x}", "{x,{p,q}ipe:touch ran}"])
def test_braces_make_no_command(pattern: str) -> None:
    """Configurations and commands ask of what is written whether commands are trusted."""
    with pytest.raises(
        ValueError, match="is a command after its braces are expanded; write pipe: before them"
    ):
        find_locations(pattern)
    assert find_locations("pipe:cat {a,b}.tar") == ["pipe:cat a.tar", "pipe:cat b.tar"]


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \.tar file; shards are named by"):
        find_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no shard or folder '.*nowhere'"):
        find_shards(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"No file matches '.*\*\.tar'"):
        find_shards(f"{tmp_path}/*.tar")
    (tmp_path / "00.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"There is no shard or folder '.*01\.tar'"):
        find_shards(f"{tmp_path}/{{00..01}}.tar")
    with pytest.raises(FileNotFoundError, match="No shards were named"):
        find_shards([])
    with tarfile.open(tmp_path / "00.tar", "w"):
        pass
    with pytest.raises(BrokenShardError, match="they hold no sample"):
        ShardSet.open(tmp_path)
