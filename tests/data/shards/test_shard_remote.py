"""Remote shards by range, through the bounded cache, and from commands; faults of the network."""

import json
import multiprocessing
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from data.shards.datamodule import ShardDataModule
from data.shards.faults import Faults
from data.shards.index import ShardSet
from data.shards.locations import file_name, find_locations, is_remote
from data.shards.remote.shard_cache import ShardCache
from data.shards.remote.shard_file import RemoteFile
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError
from data.shards.writer import ShardWriter, encode_latents

SAMPLES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("origin") / "set"
    with ShardWriter(path, samples_per_shard=10) as writer:
        for number in range(SAMPLES):
            latents = encode_latents(torch.full((4, 8, 8), float(number)))
            writer.write({"latent.safetensors": latents, "txt": f"caption {number}"})
    return path


class Handler(BaseHTTPRequestHandler):
    """Serves a folder with ranges, as object stores do, and fails when it is told to."""

    protocol_version = "HTTP/1.1"
    root: Path
    requests: list[str]
    failing: set[str]

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.reply(body=False)

    def do_GET(self) -> None:
        self.reply(body=True)

    def reply(self, body: bool) -> None:
        name = self.path.strip("/")
        path, wanted = self.root / name, self.headers.get("Range")
        self.requests.append(f"{self.command} {name} {wanted}")
        if name in self.failing or not path.is_file():
            status = 503 if name in self.failing else 404
            self.failing.discard(name)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        total = len(data)
        self.send_response(206 if wanted else 200)
        if wanted:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()  # type: ignore[union-attr]
            end = min(int(last) + 1 if last else total, total)
            data = data[int(first) : end]
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{total}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[tuple[str, type[Handler]]]:
    root = tmp_path / "served"
    root.mkdir()
    for path in folder.glob("*.tar"):
        (root / path.name).write_bytes(path.read_bytes())

    class Own(Handler):
        pass

    Own.root, Own.requests, Own.failing = root, [], set()
    with ThreadingHTTPServer(("127.0.0.1", 0), Own) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", Own
        httpd.shutdown()


def epoch(shards: str | list[str], **options: Any) -> list[tuple[str, float]]:
    data = ShardDataModule(shards, 5, **options)
    data.setup()
    assert data.dataset is not None
    seen = []
    for start in range(0, SAMPLES, 5):
        batch = data.dataset.batch(range(start, start + 5))
        assert batch.latents is not None
        seen += list(zip(batch.captions, batch.latents[:, 3, 7, 7].tolist(), strict=True))
    data.dataset.close()
    return seen


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, float]]:
    return epoch(str(folder), index_folder=str(tmp_path_factory.mktemp("indexes")))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["file", "memory", "http", "pipe"])
def test_remote_shards_are_the_same_samples(
    folder: Path,
    expected: list[tuple[str, float]],
    server: tuple[str, type[Handler]],
    tmp_path: Path,
    kind: str,
    cached: bool,
) -> None:
    if kind == "memory":
        for path in folder.glob("*.tar"):
            fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    roots = {"file": f"file://{folder}", "memory": f"memory://{tmp_path.name}", "http": server[0]}
    shards = f"{roots.get(kind, '')}/{{00000..00002}}.tar"
    if kind == "pipe":
        shards = f"pipe:cat {folder}/{{00000..00002}}.tar"
    options = (
        {"cache_folder": str(tmp_path / "cache")} if cached else {"index_folder": str(tmp_path / "indexes")}
    )
    if kind == "pipe" and not cached:
        with pytest.raises(ValueError, match="cannot be read from the middle; set data.cache_folder"):
            epoch(shards, **options)
        return
    assert epoch(shards, **options) == expected
    server[1].requests.clear()
    assert epoch(shards, **options) == expected  # with the indexes made
    reads = [request for request in server[1].requests if request.startswith("GET")]
    if kind == "http" and cached:
        assert reads == []
    elif kind == "http":
        assert 0 < len(reads) <= SAMPLES and all("bytes=" in request for request in reads)
    if cached:
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 3


def test_globs_of_urls(folder: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe_file(f"/{tmp_path.name}/g/{path.name}", path.read_bytes())
    names = [f"memory:///{tmp_path.name}/g/0000{i}.tar" for i in range(3)]
    assert find_locations(f"memory://{tmp_path.name}/g/*.tar") == names
    assert find_locations(f"memory://{tmp_path.name}/g/") == names
    with pytest.raises(
        FileNotFoundError, match=r"No file matches 'memory://.*/x\*\.tar'; shards are named by"
    ):
        find_locations(f"memory://{tmp_path.name}/x*.tar")
    assert is_remote("s3://b/a.tar") and is_remote("pipe:cat a.tar") and not is_remote("a/b.tar")
    assert (
        file_name("https://h/a/b.tar?token=1") == "b.tar"
        and file_name("pipe:aws s3 cp s3://b/c.tar -") == "c.tar"
    )
    with pytest.raises(ValueError, match=r"'nonsense://a\.tar' cannot be read"):
        epoch("nonsense://a.tar", index_folder=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"its index needs a local place; set data\.index_folder or data\.cache_folder"
    ):
        epoch("memory://a.tar")


def test_shards_of_one_name_stay_apart_in_the_cache(tmp_path: Path) -> None:
    """Every set of img2dataset calls its first shard 00000.tar."""
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name) as writer:
            for number in range(5):
                writer.write(
                    {"latent.safetensors": encode_latents(torch.zeros(4, 2, 2)), "txt": f"{name} {number}"}
                )
    shards = [f"file://{tmp_path}/{name}/00000.tar" for name in ("one", "two")]
    for _ in range(2):
        data = ShardDataModule(shards, 10, cache_folder=str(tmp_path / "cache"))
        data.setup()
        assert data.dataset is not None
        batch = data.dataset.batch(range(10))
        assert sorted(batch.captions) == [
            f"{name} {number}" for name in ("one", "two") for number in range(5)
        ]
        assert len(set(batch.sample_ids)) == 10
    cache = ShardCache(tmp_path / "cache", 1)
    assert cache.path_of(shards[0]) != cache.path_of(shards[1])


def test_a_failing_network_is_asked_again(
    server: tuple[str, type[Handler]], expected: list[tuple[str, float]], tmp_path: Path
) -> None:
    shards = server[0] + "/{00000..00002}.tar"
    options = {"index_folder": str(tmp_path / "indexes")}
    assert epoch(shards, **options) == expected
    server[1].failing.update({"00000.tar", "00002.tar"})
    assert epoch(shards, **options) == expected and not server[1].failing


def test_404_is_a_fault(
    server: tuple[str, type[Handler]], expected: list[tuple[str, float]], tmp_path: Path
) -> None:
    shards = server[0] + "/{00000..00002}.tar"
    options: dict[str, Any] = {"index_folder": str(tmp_path / "indexes")}
    epoch(shards, **options)
    (server[1].root / "00001.tar").unlink()
    with pytest.raises(FileNotFoundError):
        epoch(shards, **options)
    faults = Faults(100, str(tmp_path / "quarantine.jsonl"))
    seen = epoch(shards, faults=faults, **options)
    lost = {f"caption {number}" for number in range(10, 20)}
    assert all(got == want for got, want in zip(seen, expected, strict=True) if want[0] not in lost)
    assert not {caption for caption, _ in seen} & lost
    entries = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in entries} == {"", *(f"{number:09d}" for number in range(10, 20))}
    assert {entry["shard"] for entry in entries} == {server[0] + "/00001.tar"}


def test_a_remote_file_that_changed_is_indexed_again(
    server: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    url, store = server[0] + "/00000.tar", ShardStore()
    first = ShardSet.open(url, tmp_path, store).fingerprint
    path = server[1].root / "00000.tar"
    path.write_bytes((server[1].root / "00001.tar").read_bytes())
    os.utime(path, ns=(0, 10**18))
    assert ShardSet.open(url, tmp_path, store).fingerprint != first


def test_the_cache_is_bounded(folder: Path, tmp_path: Path) -> None:
    urls = [f"file://{path}" for path in sorted(folder.glob("*.tar"))]
    size = (folder / "00000.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 2.5 * size / 1e9)
    stamps = {url: ShardStore().stamp(url) for url in urls}
    paths = [cache.fetch(url, stamps[url]) for url in urls[:2]]
    time.sleep(0.01)
    assert cache.find(urls[0], stamps[urls[0]]) == paths[0]  # used again, so the other one is the oldest
    cache.fetch(urls[2], stamps[urls[2]])
    assert [cache.find(url, stamps[url]) is not None for url in urls] == [True, False, True]
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.limit_bytes
    with pytest.raises(BrokenShardError, match=r"more than the cache of 1e-06 GB; raise data\.cache_gb"):
        ShardCache(tmp_path / "small", 1e-6).fetch(urls[0])
    with pytest.raises(ValueError, match=r"data\.cache_gb is 0"):
        ShardCache(tmp_path, 0)


def test_a_cache_below_one_window_is_refused(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache_folder": str(tmp_path / "cache"), "cache_gb": 5e-5}
    shards = f"file://{folder}/{{00000..00002}}.tar"
    with pytest.raises(
        ValueError, match=r"data\.cache_gb is 5e-05, but the shards of one shuffle window take up"
    ):
        epoch(shards, **options)
    epoch(shards, shuffle_window_shards=1, **options)


def test_a_copy_that_is_removed_before_it_is_opened_is_fetched_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that index shards share a cache with room for fewer: one's copy may go for the room of another's."""
    store, url = ShardStore(ShardCache(tmp_path / "cache", 1)), f"file://{folder}/00000.tar"
    fetched, paths = store._fetched, list[Path]()

    def removing(location: str, stamp: Any, times: int) -> Path:
        paths.append(fetched(location, stamp))
        if len(paths) <= times:
            paths[-1].unlink()
        return paths[-1]

    monkeypatch.setattr(store, "_fetched", lambda location, stamp: removing(location, stamp, 2))
    expected = [one.name for one in ShardStore().members(f"{folder}/00000.tar")]
    assert [one.name for one in store.members(url)] == expected and len(paths) == 3
    paths.clear()
    monkeypatch.setattr(store, "_fetched", lambda location, stamp: removing(location, stamp, 99))
    with pytest.raises(OSError, match=r"removed from the cache 10 times .* raise data\.cache_gb"):
        store.members(url)


def fetch(folder: Path, log: Path, urls: list[str]) -> None:
    cache = ShardCache(folder, 1)
    for url in urls:
        cache.fetch(url)


def test_processes_fetch_a_shard_once(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = f"pipe:echo x >> {log}; sleep 0.2; cat {folder}/00000.tar"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch, args=(tmp_path / "cache", log, [command])) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0] and log.read_text() == "x\n"


def test_a_command_that_fails(folder: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1)
    for command in ("false", f"head -c 3000 {folder}/00000.tar; exit 3"):
        with pytest.raises(BrokenShardError, match="The command 'pipe:.* failed"):
            cache.fetch(f"pipe:{command}")
    assert cache._shards() == []
    with pytest.raises(BrokenShardError, match="is truncated"):
        epoch(f"pipe:head -c 3000 {folder}/00000.tar", cache_folder=str(tmp_path / "cache"))


def test_a_shard_is_fetched_while_it_is_read_by_ranges(folder: Path, tmp_path: Path) -> None:
    url = f"file://{folder}/00000.tar"
    whole = (folder / "00000.tar").read_bytes()
    store = ShardStore(ShardCache(tmp_path / "cache", 1))
    assert store.cache is not None
    file = store.open(url)
    assert isinstance(file, RemoteFile) and bytes(file.read(1000, 50)) == whole[1000:1050]
    until = time.monotonic() + 20
    while store.cache.find(url, store.stamp(url)) is None and time.monotonic() < until:
        time.sleep(0.02)
    assert bytes(file.read(2000, 50)) == whole[2000:2050] and file._local is not None
    assert len(file.read(len(whole) - 10, 50)) == 10
    file.close()


def test_workers_read_remote_shards(
    server: tuple[str, type[Handler]], expected: list[tuple[str, float]], tmp_path: Path
) -> None:
    """fsspec's event loop does not survive a fork, so each process has to have its own."""
    options: dict[str, Any] = {"cache_folder": str(tmp_path / "cache"), "num_workers": 2}
    data = ShardDataModule(server[0] + "/{00000..00002}.tar", 5, **options)
    loader = data.train_dataloader()
    captions = [caption for batch in loader for caption in batch.captions]
    loader.close()
    assert captions == [caption for caption, _ in expected]


def test_tar_headers_over_a_slow_stream(folder: Path, tmp_path: Path) -> None:
    """Without a cache the headers of a remote shard are found by reading on, not by a request each."""
    store, url = ShardStore(), f"file://{folder}/00001.tar"
    members = list(store._remote_members(url, store.stamp(url)))
    with tarfile.open(folder / "00001.tar") as tar:
        assert [(one.name, one.offset, one.size) for one in members] == [
            (one.name, one.offset_data, one.size) for one in tar
        ]
