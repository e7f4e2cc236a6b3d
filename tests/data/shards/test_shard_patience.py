"""Servers that hang, fail for a while, or never come back."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.shards.datamodule import ShardDataModule
from data.shards.remote.patience import Patience
from data.shards.remote.shard_cache import ShardCache
from data.shards.store import ShardStore
from data.shards.writer import ShardWriter, encode_latents
from tests.helpers.shard_server import Server, serving


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("origin") / "set"
    with ShardWriter(folder, samples_per_shard=10) as writer:
        for number in range(4):
            latents = encode_latents(torch.full((4, 8, 8), float(number)))
            writer.write({"latent.safetensors": latents, "txt": f"caption {number}"})
    return (folder / "00000.tar").read_bytes()


@pytest.fixture
def server(shard: bytes) -> Iterator[tuple[str, type[Server]]]:
    with serving({"s.tar": shard}) as (url, handler):
        yield f"{url}/s.tar", handler


def read(url: str, start: int, length: int, **limits: float) -> bytes:
    store = ShardStore(patience=Patience(**limits))
    file = store.open(url)
    try:
        return bytes(file.read(start, length))
    finally:
        file.close()


@pytest.mark.parametrize("fault", ["silent", "half", 500, 503, 429])
def test_a_failure_that_passes_is_waited_out_and_said(
    server: tuple[str, type[Server]], shard: bytes, caplog: pytest.LogCaptureFixture, fault: str | int
) -> None:
    url, handler = server
    store = ShardStore(patience=Patience(timeout_s=1.0, retry_s=20.0))
    file = store.open(url)
    handler.faults[:] = [fault, fault]
    handler.retry_after = "1" if fault == 429 else None
    with caplog.at_level(logging.WARNING, logger="data.shards.remote.patience"):
        assert bytes(file.read(1000, 600)) == shard[1000:1600]
    reasons = {"silent": "no answer within 1 s", "half": "no answer within 1 s"}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all(url in line and reasons.get(str(fault), str(fault)) in line for line in lines)
    assert all("(remote_retry_s)" in line for line in lines)
    if fault == 429:  # Retry-After: 1, where the first pause would be 0.2 s
        assert handler.seen[-1].moment - handler.seen[-2].moment >= 1.0


def test_patience_ends_with_the_reason(server: tuple[str, type[Server]]) -> None:
    url, handler = server
    handler.faults[:] = [503] * 50
    with pytest.raises(OSError, match=rf"'{url}' cannot be read \(.*503"):
        read(url, 0, 10, timeout_s=5.0, retry_s=1.2)
    tries = sorted({round(request.moment, 1) for request in handler.seen})
    # Pauses of 0.2 s and 0.8 s; the next one, 3.2 s, would be too long.
    assert 1.0 <= tries[-1] - tries[0] < 2.0


def test_a_silent_server_ends_within_the_limits(server: tuple[str, type[Server]]) -> None:
    url, handler = server
    handler.faults[:] = ["silent"] * 50
    with pytest.raises(OSError, match=r"no answer within 0.5 s, data.remote_timeout_s"):
        read(url, 0, 10, timeout_s=0.5, retry_s=0.0)
    assert len(handler.seen) == 1


def test_a_file_that_is_not_there_and_a_server_that_is_not_there(server: tuple[str, type[Server]]) -> None:
    url, handler = server
    handler.faults[:] = [404] * 50
    with pytest.raises(FileNotFoundError):
        read(url, 0, 10, timeout_s=5.0, retry_s=60.0)
    with pytest.raises(OSError, match="cannot be read .*[Cc]onnect"):
        read("http://127.0.0.1:1/s.tar", 0, 10, timeout_s=5.0, retry_s=0.3)


@pytest.mark.parametrize("status", [400, 401, 403, 410])
def test_an_answer_that_stays_is_not_asked_for_again(server: tuple[str, type[Server]], status: int) -> None:
    url, handler = server
    store = ShardStore(patience=Patience(timeout_s=5.0, retry_s=3.0))
    file = store.open(url)
    handler.faults[:] = [status] * 50
    handler.seen.clear()
    with pytest.raises(OSError, match=str(status)):
        file.read(0, 10)
    assert len(handler.seen) == 1


def test_a_transfer_into_the_cache_that_stops_half_way_is_begun_again(
    server: tuple[str, type[Server]], shard: bytes, tmp_path: Path
) -> None:
    url, handler = server
    patience = Patience(timeout_s=1.0, retry_s=20.0)
    store = ShardStore(ShardCache(tmp_path, 1, patience), patience)
    stamp = store.stamp(url)
    handler.faults[:] = [200, "half"]  # the size, then half of the shard
    assert [one.name for one in store.members(url, stamp)][:2] == [
        "000000000.latent.safetensors",
        "000000000.txt",
    ]
    assert store.cache is not None and store.cache.path_of(url, stamp).read_bytes() == shard


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"remote_timeout_s": 0.0},
            "data.remote_timeout_s is 0.0, but it must be a number of seconds above 0",
        ),
        (
            {"remote_retry_s": -1.0},
            "data.remote_retry_s is -1.0, but it must be a number of seconds, 0 or more",
        ),
    ],
)
def test_limits_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardDataModule("http://127.0.0.1/s.tar", 2, **options)
