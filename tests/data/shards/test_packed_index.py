"""The packed index of a set: equal to its sidecars, made once by many, made again when anything changed."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import data.shards.index as index_module
from data.shards.dataset import ShardDataset
from data.shards.faults import Faults, Quarantine
from data.shards.index import JoinedIndexes, ShardIndex, ShardSet, discard_outdated, index_shard, sidecar_path
from data.shards.indexing import building, request
from data.shards.indexing.location_list import LocationList
from data.shards.indexing.names import ShardNames
from data.shards.indexing.packed import PackedIndexes
from data.shards.indexing.table import ShardTable
from data.shards.order.sample_order import SampleOrder
from data.shards.scan import scan_members
from data.shards.sidecar import save_sidecar
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError

SHARDS = 20


def write_shard(path: Path, number: int, extra: bool = False, latents: bool = True) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(1 + number % 5):
            members = {"txt": f"caption {number} {row}".encode()}
            if latents:
                members["latent.safetensors"] = b"l" * (100 + 20 * (number % 2))
            if extra or number == 7:
                members["json"] = b"{}"
            for extension, content in members.items():
                info = tarfile.TarInfo(f"ké{number}-{row}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    request.warn_once.cache_clear()
    path = tmp_path / "set"
    path.mkdir()
    for number in range(SHARDS):
        write_shard(path / f"{number:05d}.tar", number)
    return path


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose headers were read."""
    found: list[str] = []

    def counted(location: str, members: Any) -> ShardIndex:
        found.append(Path(location).name)
        return scan_members(location, members)

    monkeypatch.setattr(index_module, "scan_members", counted)
    return found


def packed_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.packed-index"))


def assert_equal(found: ShardSet, expected: ShardSet) -> None:
    for name in ("locations", "kinds", "faults", "sized_by"):
        assert getattr(found.table, name) == getattr(expected.table, name), name
    for name in ("counts", "ends", "fingerprints", "kind_of", "latent_sizes", "firsts"):
        np.testing.assert_array_equal(getattr(found.table, name), getattr(expected.table, name), name)
    assert len(found.shards) == len(expected.shards)
    for one, other in zip(found.shards, expected.shards, strict=True):
        for name in ("location", "extensions", "fingerprint", "faults", "stamp"):
            assert getattr(one, name) == getattr(other, name), name
        for name in ("offsets", "sizes", "keys", "key_ends", "checksums", "image_sizes"):
            mine, wanted = getattr(one, name), getattr(other, name)
            assert (mine is None) == (wanted is None)
            if mine is not None:
                assert mine.dtype == wanted.dtype
                np.testing.assert_array_equal(mine, wanted)
    assert (found.sizes, found.fingerprint, list(found.names())) == (
        expected.sizes,
        expected.fingerprint,
        list(expected.names()),
    )


def of_sidecars(folder: Path) -> ShardSet:
    return ShardSet(tuple(index_shard(path) for path in sorted(folder.glob("*.tar"))))


def test_equals_the_sidecars_and_is_read_alone_the_next_time(
    folder: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ShardSet.open(folder)
    assert isinstance(made.shards, PackedIndexes) and sorted(scanned) == [
        f"{i:05d}.tar" for i in range(SHARDS)
    ]
    expected = of_sidecars(folder)
    assert_equal(made, expected)
    assert len(packed_files(folder)) == 1 and not list(folder.glob("*.parts"))
    monkeypatch.setattr(index_module, "load_sidecar", lambda *_: pytest.fail("a sidecar was opened"))
    scanned.clear()
    again = ShardSet.open(folder)
    assert_equal(again, expected)
    assert_equal(pickle.loads(pickle.dumps(again)), expected)
    assert len(pickle.dumps(again)) < 1000  # the path, not the tables
    assert not scanned
    # Positions of epochs, shuffled with a window smaller than the set.
    orders = [SampleOrder(one.sizes, 3, 4).samples_at(range(150)).tolist() for one in (again, expected)]
    assert orders[0] == orders[1]


def test_the_file_is_safetensors(folder: Path) -> None:
    made = ShardSet.open(folder)
    with safe_open(packed_files(folder)[0], framework="numpy") as stored:
        assert stored.get_tensor("counts").tolist() == made.sizes
        assert json.loads(stored.metadata()["kinds"])[0][0] == ["latent.safetensors", "txt"]


def test_a_mixture_is_read_from_the_packed_indexes(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    sets = [ShardSet.open(folder), ShardSet.open(tmp_path / "other")]
    joined = ShardSet(JoinedIndexes(sets))
    expected = ShardSet(tuple(index for one in sets for index in one.shards))
    assert_equal(joined, expected)
    assert_equal(pickle.loads(pickle.dumps(joined)), expected)


def replaced(path: Path, number: int) -> None:
    write_shard(path, number, extra=True)


def touched(path: Path, number: int) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("change", [replaced, touched])
def test_a_changed_shard_is_indexed_again_and_no_other(
    folder: Path, scanned: list[str], change: Callable[[Path, int], None]
) -> None:
    first = ShardSet.open(folder)
    scanned.clear()
    change(folder / "00003.tar", 3)
    found = ShardSet.open(folder)
    assert scanned == ["00003.tar"]
    assert_equal(found, of_sidecars(folder))
    assert (found.fingerprint == first.fingerprint) == (change is touched)
    # The former file is kept for runs that still read it.
    assert first.shards[5].key(0) == "ké5-0" and len(list(folder.glob("*.replaced"))) == 1


def test_added_and_removed_shards_make_another_index(folder: Path, scanned: list[str]) -> None:
    ShardSet.open(folder)
    scanned.clear()
    write_shard(folder / "00020.tar", 20)
    assert len(ShardSet.open(folder).shards) == SHARDS + 1 and scanned == ["00020.tar"]
    (folder / "00020.tar").unlink()
    assert len(ShardSet.open(folder).shards) == SHARDS
    assert scanned == ["00020.tar"] and len(packed_files(folder)) == 2


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def test_a_damaged_file_is_made_again(
    folder: Path, scanned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = ShardSet.open(folder)
    path = packed_files(folder)[0]
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def with_header(**changes: Any) -> bytes:
        text = json.dumps(header | changes).encode()
        return (len(text)).to_bytes(8, "little") + text + whole[8 + length :]

    counts = 8 + length + header["counts"]["data_offsets"][0]
    damaged = {
        "empty": b"",
        "cut": whole[:-100],
        "longer": whole + b"\0",
        "no header": b"\xff" * 200,
        "another type": with_header(counts={**header["counts"], "dtype": "F64"}),
        "another shape": with_header(counts={**header["counts"], "shape": [2**62]}),
        "unknown table": with_header(extra={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
        "no metadata": with_header(__metadata__={}),
        "pickle": pickle.dumps(made),
        "a count": flipped(whole, counts),
        "a fingerprint": flipped(whole, 8 + length + header["fingerprints"]["data_offsets"][0] + 40),
    }
    locations = [str(one) for one in sorted(folder.glob("*.tar"))]
    scanned.clear()
    for name, content in damaged.items():
        path.write_bytes(content)
        request.warn_once.cache_clear()
        caplog.clear()
        assert building._opened(path, locations) is None, name
        assert f"{path} is damaged" in caplog.text and len(caplog.records) == 1, name
    assert_equal(ShardSet.open(folder), of_sidecars(folder))
    assert path.read_bytes() == whole and not scanned  # from the sidecars


def test_damage_to_the_index_of_one_shard_stops_a_run(folder: Path) -> None:
    ShardSet.open(folder)
    path = packed_files(folder)[0]
    content = path.read_bytes()
    place = content.index("ké11-0".encode())
    path.write_bytes(flipped(content, place))
    found = ShardSet.open(folder)
    assert found.shards[10].key(0) == "ké10-0"
    with pytest.raises(
        BrokenShardError, match=r"index of .*00011\.tar in .* was damaged .* remove that file"
    ):
        found.shards[11]
    with pytest.raises(BrokenShardError, match="was damaged"):
        ShardDataset(found, SampleOrder(found.sizes, 0, 0), ()).batch(range(30, 40))


def test_verified_checksums_come_into_the_index(folder: Path) -> None:
    from data.prepare.verify.command import run
    from data.prepare.verify.options import VerifyOptions

    for number in range(SHARDS):
        write_shard(folder / f"{number:05d}.tar", number, latents=False)
    ShardSet.open(folder)
    options = VerifyOptions(shards=(str(folder),), contents=("captions",), processes=1)
    run(options)
    found = ShardSet.open(folder)
    assert isinstance(found.shards, PackedIndexes) and found.shards[3].checksums is not None
    assert_equal(found, of_sidecars(folder))
    run(options)
    assert len(packed_files(folder)) == 1  # nothing new, so it stays


@pytest.fixture
def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that this user cannot write; as root, who can write all, access() and the folder's files say so."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        access, mkdir = os.access, Path.mkdir
        monkeypatch.setattr(
            os,
            "access",
            lambda path, mode: mode & os.W_OK == 0 if Path(path) == folder else access(path, mode),
        )

        def refused(self: Path, *arguments: Any, **options: Any) -> None:
            if self.parent == folder:
                raise PermissionError(13, "Permission denied", str(self))
            mkdir(self, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", refused)
    yield folder
    folder.chmod(0o755)


def test_a_read_only_folder_has_its_index_in_the_cache_and_one_warning(
    read_only: Path, tmp_path: Path, scanned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted(read_only.iterdir())
    found = ShardSet.open(read_only)
    assert sorted(read_only.iterdir()) == before
    cache = tmp_path / "cache" / "sdxs-lightning" / "indexes"
    assert [path.name for path in cache.iterdir()] == [packed_files(cache)[0].name]
    assert [record.getMessage() for record in caplog.records] == [
        f"The index of {SHARDS} shards cannot be saved in {read_only} ([Errno 13] Permission denied: "
        f"'{read_only / packed_files(cache)[0].stem}-plain.parts'), so it is kept in {cache}; data.index_folder takes "
        "another folder."
    ]
    scanned.clear()
    assert ShardSet.open(read_only).fingerprint == found.fingerprint and not scanned
    touched(read_only / "00004.tar", 4)
    assert ShardSet.open(read_only).fingerprint == found.fingerprint and scanned == ["00004.tar"]


def test_few_shards_of_a_read_only_folder_are_indexed_once_too(read_only: Path, scanned: list[str]) -> None:
    shards = f"{read_only}/{{00000..00002}}.tar"
    for _ in range(2):
        assert ShardSet.open(shards).sizes == [1, 2, 3]
    assert len(scanned) == 3


def test_without_any_folder_there_is_one_warning(
    folder: Path, tmp_path: Path, scanned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("file", "cache"):
        (tmp_path / name).write_text("")  # where folders should be
    found = ShardSet.open(folder, tmp_path / "file" / "indexes")
    assert found.sizes == [1 + number % 5 for number in range(SHARDS)]
    assert len(caplog.records) == 1 and "every start scans them again; set data.index_folder" in caplog.text


def open_in_process(folder: Path, log: Path, barrier: Any) -> None:
    def counted(location: str, members: Any) -> ShardIndex:
        with open(log, "a") as file:
            file.write(Path(location).name + "\n")
        return scan_members(location, members)

    index_module.scan_members = counted  # type: ignore[attr-defined]
    barrier.wait()
    found = ShardSet.open(folder)
    with open(log.with_name("prints"), "a") as file:
        file.write(found.fingerprint + "\n")


def test_processes_that_start_together_index_each_shard_once(folder: Path, tmp_path: Path) -> None:
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    barrier = context.Barrier(3)
    processes = [context.Process(target=open_in_process, args=(folder, log, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(log.read_text().split()) == [f"{number:05d}.tar" for number in range(SHARDS)]
    assert set((tmp_path / "prints").read_text().split()) == {of_sidecars(folder).fingerprint}
    assert len(packed_files(folder)) == 1 and not list(folder.glob("*.parts"))


def test_an_interrupted_start_is_continued(
    folder: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(building._Builder, "_join", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ShardSet.open(folder)
    assert len(scanned) == SHARDS and not packed_files(folder)
    for path in folder.glob("*.index.npz"):
        path.unlink()
    replaced(folder / "00009.tar", 9)
    scanned.clear()
    found = ShardSet.open(folder)
    assert scanned == ["00009.tar"]
    assert_equal(found, of_sidecars(folder))


def test_other_processes_of_a_node_do_not_look_at_the_shards_again(
    folder: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, looked_at = ShardStore(), list[str]()
    stamp = store.stamp

    def watched(location: str) -> Any:
        looked_at.append(location)
        return stamp(location)

    monkeypatch.setattr(store, "stamp", watched)
    discard_outdated(folder, None, store, tolerant=False)
    assert not looked_at and not scanned  # nothing to compare: all ranks index in `setup`
    expected = ShardSet.open(folder, None, store, checked=True)
    looked_at.clear()
    discard_outdated(folder, None, store, tolerant=False)
    assert len(looked_at) == SHARDS
    assert ShardSet.open(folder, None, store, checked=True).fingerprint == expected.fingerprint
    assert len(looked_at) == SHARDS
    replaced(folder / "00002.tar", 2)
    discard_outdated(folder, None, store, tolerant=False)
    scanned.clear()
    changed = ShardSet.open(folder, None, store, checked=True)
    assert scanned == ["00002.tar"] and changed.fingerprint != expected.fingerprint
    looked_at.clear()
    assert ShardSet.open(folder, None, store, checked=True).fingerprint == changed.fingerprint
    assert not looked_at


def test_broken_and_missing_shards(folder: Path, tmp_path: Path, scanned: list[str]) -> None:
    complete = ShardSet.open(folder, tmp_path / "indexes")
    cut = folder / "00013.tar"
    cut.write_bytes(cut.read_bytes()[:1100])
    scanned.clear()
    # Tolerant: the samples stay those of the former index.
    found = ShardSet.open(folder, tmp_path / "indexes", tolerant=True)
    assert found.sizes == complete.sizes and found.fingerprint == complete.fingerprint
    assert [(number, "truncated" in fault.reason) for number, fault in found.table.faults] == [(13, True)]
    assert found.shards[13].stamp is None and scanned == ["00013.tar"]
    assert ShardSet.open(folder, tmp_path / "indexes", tolerant=True).sizes == complete.sizes
    assert scanned == ["00013.tar"]  # broken as before
    for _ in range(2):
        with pytest.raises(BrokenShardError, match=r"00013\.tar is truncated"):
            ShardSet.open(folder, tmp_path / "indexes")
    write_shard(cut, 13)
    assert ShardSet.open(folder, tmp_path / "indexes").table.faults == ()
    cut.unlink()
    with pytest.raises(FileNotFoundError, match=r"no shard or folder '.*00013"):
        ShardSet.open(f"{folder}/{{00000..00019}}.tar", tmp_path / "indexes")


def test_a_quarantine_gets_the_faults_of_a_packed_index(folder: Path, tmp_path: Path) -> None:
    write_shard(folder / "00006.tar", 6)
    with tarfile.open(folder / "00006.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("lonely.txt"))
    found = ShardSet.open(folder, tolerant=True)
    expected = of_sidecars(folder)
    entries = []
    for number, shards in enumerate((found, expected)):
        path = tmp_path / f"{number}.jsonl"
        quarantine = Quarantine(Faults(5, str(path)))
        dataset = ShardDataset(shards, SampleOrder(shards.sizes), ["latents"], quarantine=quarantine)
        entries.append([json.loads(line) for line in path.read_text().splitlines()])
        probes = dataset._typical_samples("latents"), dataset._typical_samples("images")
        entries[-1].append(probes)
    assert entries[0] == entries[1] and entries[0][0]["key"] == "lonely"
    with pytest.raises(ValueError, match=r"00006\.tar, key 'lonely': there is no member for 'latents'"):
        ShardDataset(found, SampleOrder(found.sizes))


def former_typical_samples(shards: ShardSet, probes: int) -> list[int]:
    """By a table of all samples, as long as the set."""
    sizes = np.zeros(sum(shards.sizes), dtype=np.int64)
    first = 0
    for index in shards.shards:
        if (column := index.column("latent.safetensors")) is not None:
            sizes[first : first + len(index)] = index.sizes[:, column]
        first += len(index)
    values, counts = np.unique(sizes[sizes >= 0], return_counts=True)
    usual = np.flatnonzero(sizes == values[counts.argmax()])
    return [int(usual[round(place)]) for place in np.linspace(0, len(usual) - 1, probes).tolist()]


def test_typical_samples_are_found_by_shard(folder: Path) -> None:
    found = ShardSet.open(folder)
    dataset = ShardDataset(found, SampleOrder(found.sizes))
    assert dataset._typical_samples("latents") == former_typical_samples(found, 7)
    without = [replace(index, extensions=("x", "y", "z")[: len(index.extensions)]) for index in found.shards]
    assert ShardTable.of(without).samples_of_latent_size()[0] == 0


def test_a_list_of_locations_is_that_of_its_strings() -> None:
    strings = [f"s3://b/{number}-ä\udcff.tar" for number in range(2500)] + ["x"]
    locations = LocationList.joined([LocationList.of(strings[:7]), tuple(strings[7:])])
    assert list(locations) == strings == [locations[number] for number in range(len(strings))]
    assert locations == strings and locations[-2:] == strings[-2:] and len(locations) == 2501
    assert locations != strings[:-1] and locations != [*strings[:-1], "y"]


def former_names(locations: list[str]) -> list[str]:
    def path_of(location: str) -> Path:
        if "://" not in location and not location.startswith("pipe:"):
            return Path(location).resolve()
        return Path("/", *[part for part in location.split("/") if part not in ("", ".", "..")])

    paths = [path_of(location) for location in locations]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).with_suffix("").as_posix() for path in paths]


def test_names_are_those_of_resolved_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x.tar", "a/y.z.tar", "b/x.tar", "b/.tar", "b/no"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "link.tar").symlink_to(tmp_path / "b" / "x.tar")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "a")
    for locations in (
        ["x.tar"],
        ["x.tar", "y.z.tar", "../b/no"],
        [f"{tmp_path}/a/x.tar", f"{tmp_path}/a/link.tar"],
        [f"{tmp_path}/c/x.tar", f"{tmp_path}/c/.tar"],
        ["https://h/a/b.tar?token=1", "https://h/a/c.tar"],
        ["pipe:aws s3 cp s3://b/c.tar -", "pipe:cat /x/d.tar"],
        ["s3://b/one/0.tar", f"{tmp_path}/a/x.tar"],
        ["pipe:make 0.tar", "x.tar"],
    ):
        names = ShardNames(LocationList.of(locations))
        assert list(names) == former_names(locations) and names[-1:] == [former_names(locations)[-1]]


def test_sizes_for_buckets_are_in_the_packed_index(folder: Path, scanned: list[str]) -> None:
    plain = ShardSet.open(folder)
    assert plain.table.image_sizes is None
    sized = ShardSet.open(folder, sized="images")
    assert sized.table.sized_by == "images" and len(scanned) == SHARDS
    assert sized.table.image_sizes is not None and sized.table.image_sizes.tolist() == [[0, 0]] * sum(
        plain.sizes
    )
    assert_equal(sized, of_sidecars(folder))
    assert_equal(ShardSet.open(folder, sized="images"), sized)
    assert ShardSet.open(folder).fingerprint == plain.fingerprint


def test_a_run_on_several_ranks_indexes_in_setup(folder: Path, scanned: list[str]) -> None:
    from data.shards.datamodule import ShardDataModule

    data = ShardDataModule(str(folder), 2)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=2, distributed_sampler_kwargs={"rank": 1, "num_replicas": 2}, default_root_dir="."
    )
    data.prepare_data()
    assert not scanned
    data.setup()
    assert len(scanned) == SHARDS and data.dataset is not None
    assert isinstance(data.dataset.shards.shards, PackedIndexes)


def test_an_index_with_a_strange_fingerprint_is_not_used(folder: Path) -> None:
    path = folder / "00000.tar"
    index = index_shard(path)
    assert index.stamp is not None
    save_sidecar(sidecar_path(path), replace(index, fingerprint="x" * 32), index.stamp)
    assert index_shard(path).fingerprint == index.fingerprint
