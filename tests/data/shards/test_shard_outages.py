"""Outages longer than any try, answers of a wrong length, files that change while they are read, and fetching ahead."""

import logging
import time
from collections.abc import Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.shards.datamodule import ShardDataModule
from data.shards.order.buckets import AnyOrder, BucketOrder
from data.shards.order.mixture import MixedOrder
from data.shards.order.sample_order import SampleOrder
from data.shards.remote import patience as patience_module
from data.shards.remote.fetching import UpcomingShards
from data.shards.remote.patience import Patience
from data.shards.remote.shard_cache import ShardCache
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError
from data.shards.writer import ShardWriter, encode_latents
from tests.helpers.shard_server import Server, serving

SHARDS, PER_SHARD = 6, 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("origin") / "set"
    with ShardWriter(folder, samples_per_shard=PER_SHARD) as writer:
        for number in range(SHARDS * PER_SHARD):
            latents = encode_latents(torch.full((4, 8, 8), float(number)))
            writer.write({"latent.safetensors": latents, "txt": f"caption {number}"})
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[tuple[str, type[Server]]]:
    with serving(files) as found:
        yield found


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    replacement = SimpleNamespace(sleep=found.sleep, monotonic=lambda: found.now, time=time.time)
    monkeypatch.setattr(patience_module, "time", replacement)
    return found


class During(list[str | int]):
    """A fault of every request until a time of the clock."""

    def __init__(self, clock: Clock, seconds: float, fault: str | int) -> None:
        super().__init__([fault])
        self._clock, self._seconds = clock, seconds

    def __bool__(self) -> bool:
        return self._clock.now < self._seconds

    def pop(self, _: Any = 0) -> str | int:
        return self[0]


@pytest.mark.parametrize("fault", ["refused", 503])
def test_an_outage_of_minutes_is_waited_out_with_a_line_for_each_wait(
    server: tuple[str, type[Server]],
    files: dict[str, bytes],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    fault: str | int,
) -> None:
    url = server[0] + "/00000.tar"
    file = ShardStore().open(url)
    server[1].faults = During(clock, 300, fault)
    with caplog.at_level(logging.WARNING, logger="data.shards.remote.patience"):
        assert bytes(file.read(1000, 600)) == files["00000.tar"][1000:1600]
    assert 300 <= clock.now < 330 and max(clock.waits) == 30.0
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(clock.waits)
    reason = "503" if fault == 503 else "Disconnected"
    assert all(url in line and reason in line and "(remote_retry_s)" in line for line in lines)
    server[1].faults = During(clock, 10_000, fault)
    began = clock.now
    with pytest.raises(OSError, match=rf"'{url}' cannot be read \(.*{reason}"):
        file.read(0, 10)
    assert 570 <= clock.now - began <= 600  # the default patience


@pytest.mark.parametrize("status", [503, 429])
def test_retry_after_is_a_number_or_a_date(
    server: tuple[str, type[Server]], clock: Clock, status: int
) -> None:
    file = ShardStore().open(server[0] + "/00000.tar")
    for value, (low, high) in {
        "7": (7, 7),
        formatdate(time.time() + 40, usegmt=True): (35, 40),
        formatdate(0, usegmt=True): (0.2, 0.2),
        "soon": (0.2, 0.2),
    }.items():
        server[1].retry_after, server[1].faults[:] = value, [status]
        clock.waits.clear()
        file.read(0, 10)
        assert len(clock.waits) == 1 and low <= clock.waits[0] <= high, value
    server[1].retry_after, server[1].faults[:] = "700", [status]
    clock.waits.clear()
    with pytest.raises(OSError, match=str(status)):
        file.read(0, 10)
    assert not clock.waits  # longer than the patience


def test_a_slow_drip_counts_as_no_answer(
    server: tuple[str, type[Server]], files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    file = ShardStore(patience=Patience(timeout_s=0.5, retry_s=20.0)).open(server[0] + "/00000.tar")
    server[1].faults[:] = ["drip"]
    with caplog.at_level(logging.WARNING, logger="data.shards.remote.patience"):
        assert bytes(file.read(0, 500)) == files["00000.tar"][:500]
    assert ["no answer within 0.5 s" in record.getMessage() for record in caplog.records] == [True]


def test_an_answer_of_the_wrong_length_is_asked_for_again(
    server: tuple[str, type[Server]],
    files: dict[str, bytes],
    clock: Clock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, handler = server[0] + "/00000.tar", server[1]
    store = ShardStore()
    file = store.open(url)
    handler.faults[:] = ["short"]
    with caplog.at_level(logging.WARNING, logger="data.shards.remote.patience"):
        assert bytes(file.read(1000, 600)) == files["00000.tar"][1000:1600]
    assert "300 bytes came where 600 were asked for" in caplog.text
    # The headers of the shard, and the shard as a whole.
    handler.faults[:] = [200, "short"]
    assert len(list(store.members(url))) == 2 * PER_SHARD
    cached = ShardStore(ShardCache(tmp_path, 1))
    stamp = cached.stamp(url)
    handler.faults[:] = [200, "short"]
    assert len(list(cached.members(url, stamp))) == 2 * PER_SHARD
    assert cached.cache is not None and cached.cache.path_of(url, stamp).read_bytes() == files["00000.tar"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("elsewhere", "bytes 1000-1599 were asked for, and the server states 'bytes 488-1087/"),
        ("other state", "the bytes of another state of the file came"),
        ("page", "22 bytes of type application/octet-stream came instead of a range"),
        ("nonsense", "ClientResponseError: 400"),
        ("long", "500 bytes came where 600 were asked for"),
    ],
)
def test_an_answer_with_other_bytes_is_asked_for_again(
    server: tuple[str, type[Server]],
    files: dict[str, bytes],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    reason: str,
) -> None:
    file = ShardStore().open(server[0] + "/00000.tar")
    server[1].faults[:] = [fault]
    with caplog.at_level(logging.WARNING, logger="data.shards.remote.patience"):
        for start in (1000, 2000):
            assert bytes(file.read(start, 600)) == files["00000.tar"][start : start + 600]
    assert reason in caplog.text


def test_a_server_without_ranges_needs_a_cache_into_which_a_shard_comes_in_one_answer(
    server: tuple[str, type[Server]],
    files: dict[str, bytes],
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, handler = server[0] + "/00000.tar", server[1]
    handler.faults = During(clock, 10_000, "whole")
    with pytest.raises(OSError, match="its server does not serve ranges; set data.cache_folder"):
        ShardStore().open(url).read(1000, 600)
    assert not clock.waits
    assert bytes(ShardStore().open(url).read(0, len(files["00000.tar"]))) == files["00000.tar"]
    monkeypatch.setattr("data.shards.remote.shard_cache._COPY_BYTES", 1000)
    cached = ShardStore(ShardCache(tmp_path, 1))
    handler.seen.clear()
    stamp = cached.stamp(url)
    assert len(list(cached.members(url, stamp))) == 2 * PER_SHARD
    assert [request.method for request in handler.seen].count("GET") == 1
    # Bytes of another state than that of which the HEAD spoke, as from the replicas of a store.
    handler.faults = [200, 200, "other state"]
    with pytest.raises(BrokenShardError, match="was replaced while it was fetched"):
        ShardStore(ShardCache(tmp_path / "other", 1)).members(url)


def test_a_shard_that_is_replaced_while_it_is_read_by_ranges(
    server: tuple[str, type[Server]], files: dict[str, bytes], clock: Clock
) -> None:
    url, handler = server[0] + "/00000.tar", server[1]
    file = ShardStore().open(url)
    assert bytes(file.read(0, 10)) == files["00000.tar"][:10]
    handler.files["00000.tar"], handler.tags["00000.tar"] = files["00001.tar"], "second"
    with pytest.raises(
        BrokenShardError, match="was replaced since it was indexed .*other time or tag.* start again"
    ):
        file.read(0, 10)
    # A server that ignores If-Match, and a new file that is shorter.
    handler.honours_tags, handler.tags["00000.tar"] = False, "third"
    file = ShardStore().open(url)
    handler.files["00000.tar"], handler.tags["00000.tar"] = files["00001.tar"][:1024], "fourth"
    with pytest.raises(BrokenShardError, match=r"was replaced .*\([0-9,]+ bytes then, 1,024 now\)"):
        file.read(600, 1000)
    assert not clock.waits


def test_a_shard_that_is_replaced_while_it_is_fetched_is_not_kept(
    server: tuple[str, type[Server]], files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = server[0] + "/00000.tar", server[1]
    cache = ShardCache(tmp_path, 1)
    store = ShardStore(cache)
    stamp, copy = store.stamp(url), cache._copy

    def replaced_meanwhile(source: str, target: Any) -> None:
        copy(source, target)
        handler.files["00000.tar"], handler.tags["00000.tar"] = files["00001.tar"], "second"

    monkeypatch.setattr(cache, "_copy", replaced_meanwhile)
    with pytest.raises(BrokenShardError, match=r"00000\.tar was replaced while it was fetched; start again"):
        store.members(url, stamp)
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("*.partial"))


def test_a_server_without_etags_is_watched_by_its_dates(monkeypatch: pytest.MonkeyPatch) -> None:
    dates = iter(["Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"])
    system = SimpleNamespace(info=lambda path: {"size": 5, "Last-Modified": next(dates)})
    monkeypatch.setattr("data.shards.store.file_system", lambda url: (system, url))
    store = ShardStore()
    assert store.stamp("http://h/s.tar") != store.stamp("http://h/s.tar")


def waited_for(found: Any) -> None:
    until = time.monotonic() + 20
    while not found() and time.monotonic() < until:
        time.sleep(0.01)
    assert found()


@pytest.mark.parametrize("windows", [1.0, 0.0])
def test_the_next_window_is_fetched_while_this_one_is_read(
    server: tuple[str, type[Server]], tmp_path: Path, windows: float
) -> None:
    """Its samples need no request then; without it each of its shards is asked for when it is first read."""
    data = ShardDataModule(
        server[0] + "/{00000..00005}.tar",
        5,
        index_folder=str(tmp_path / "indexes"),
        cache_folder=str(tmp_path / "cache"),
        shuffle_window_shards=2,
        fetch_ahead_windows=windows,
    )
    data.setup()
    dataset = data.dataset
    assert dataset is not None
    cache = dataset._store.cache
    assert cache is not None
    for path in cache.folder.glob("*.tar"):
        path.unlink()  # fetched to be indexed
    shards = [dataset.order.samples_at(range(start, start + 20)) // PER_SHARD for start in (0, 20, 40)]
    windows_of = [{f"{number:05d}.tar" for number in one.tolist()} for one in shards]
    server[1].seen.clear()
    first = dataset.batch(range(5))
    wanted = windows_of[0] | (windows_of[1] if windows else set())
    names = {index.location.rpartition("/")[2]: index for index in dataset.shards.shards}
    here = wanted if windows else names_of(first.sample_ids)

    def is_cached(name: str) -> bool:
        stamp = names[name].stamp
        return stamp is not None and cache.find(names[name].location, stamp) is not None

    waited_for(lambda: all(is_cached(name) for name in here))
    for start in (5, 10, 15):
        dataset.batch(range(start, start + 5))
    server[1].seen.clear()
    expected = [f"caption {sample}" for sample in dataset.order.samples_at(range(20, 40)).tolist()]
    captions = [
        caption for start in range(20, 40, 5) for caption in dataset.batch(range(start, start + 5)).captions
    ]
    assert captions == expected
    asked = {request.name for request in server[1].seen} & windows_of[1]
    assert asked == (set() if windows else windows_of[1])
    dataset.close()


def names_of(sample_ids: Sequence[str]) -> set[str]:
    return {sample_id.partition("/")[0] + ".tar" for sample_id in sample_ids}


def orders() -> dict[str, tuple[AnyOrder | BucketOrder, list[int]]]:
    sizes = [700, 0, 300, 900, 500, 0, 800, 600, 400, 1000]
    plain = SampleOrder(sizes, 1, 3)
    mixed = MixedOrder(
        [SampleOrder(sizes[:5], 1, 2), SampleOrder(sizes[5:], 1, 2)], [1, 2], [0, sum(sizes[:5])]
    )
    bucket_of = np.arange(sum(sizes)) % 3 // 2
    samples = [np.flatnonzero(bucket_of == bucket) for bucket in (0, 1)]
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    parts = [SampleOrder(np.bincount(shard_of[one], minlength=len(sizes)).tolist(), 1, 3) for one in samples]
    return {
        "plain": (plain, sizes),
        "stored order": (SampleOrder(sizes, 1, 0), sizes),
        "mixed": (mixed, sizes),
        "buckets": (BucketOrder(parts, samples, [len(one) for one in samples], 8), sizes),
    }


@pytest.mark.parametrize("kind", orders())
@pytest.mark.parametrize("room", [3, 6, 100])
def test_shards_are_told_before_their_first_use_and_within_the_cache(kind: str, room: int) -> None:
    order, sizes = orders()[kind]
    firsts = np.cumsum(sizes) - np.asarray(sizes)
    remote = np.ones(len(sizes), dtype=np.int64)
    remote[3] = 0  # local
    upcoming = UpcomingShards(order, firsts, remote, 1000, room)
    told: set[int] = set()
    early, uses = 0, 0
    for start in range(0, sum(sizes) + 200, 40):
        new = upcoming.at(range(start, start + 40))
        assert 3 not in new and len(new) == len(set(new))
        told |= set(new)
        used = set(
            (np.searchsorted(firsts, order.samples_at(range(start, start + 40)), side="right") - 1).tolist()
        )
        uses += len(used - {3})
        early += len((used - {3}) & told)
        assert upcoming._used <= room and upcoming._used == len(upcoming._last_uses)
    # Where the shards of one window do not fit, some are read before there is room for them.
    assert early == uses or room == 3
    assert early >= 0.5 * uses


def test_a_resumed_run_tells_from_its_place_on() -> None:
    order = SampleOrder([100] * 20, 1, 2)
    upcoming = UpcomingShards(order, np.arange(0, 2000, 100), np.ones(20, dtype=np.int64), 200, 100)
    assert len(upcoming.at(range(0, 8))) <= 20 and upcoming.at(range(8, 16)) == []
    place = 10_000_000
    needed = {int(sample) // 100 for sample in order.samples_at(range(place, place + 8))}
    assert needed <= set(upcoming.at(range(place, place + 8)))


def test_negative_windows_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.fetch_ahead_windows is -1, but it must be a number of windows"
    ):
        ShardDataModule("http://127.0.0.1/s.tar", 2, fetch_ahead_windows=-1)
