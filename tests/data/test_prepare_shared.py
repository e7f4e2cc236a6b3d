"""Several commands that make one set: nothing is done twice, or lost with a process that dies, and the bytes are the same."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare.__main__ import main
from data.prepare.common import claims as claims_module
from data.prepare.common.claims import Claim, Claims, ShardEnd, claimed
from data.prepare.common.owner import Owner
from data.prepare.common.set_folder import LocalFolder
from data.prepare.common.settings_file import begin_or_resume, json_content
from data.prepare.common.shard_files import PreparedSample, make_shard, read_stats
from sdxs_lightning.core.errors import UserError
from tests.helpers import faulty_store
from tests.helpers.preparing import files, refused, shared_command
from tests.helpers.ranks.processes import in_ranks

COUNT, PER_SHARD = 24, 2


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(COUNT):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"photo {number}")
    return folder


def command(photos: Path, out: Path | str, *more: object) -> list[str]:
    fixed = ("--processes", 1, "--samples_per_shard", PER_SHARD)
    return [str(one) for one in ("images", "--from", photos, "--out", out, *fixed, *more)]


@pytest.fixture(scope="module")
def complete(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one command that had it to itself."""
    out = tmp_path_factory.mktemp("complete") / "set"
    main(command(photos, out))
    return out


def read(said: str) -> int:
    """Samples that a command read, as it says."""
    found = re.search(r"^(\d+) samples read in", said, re.MULTILINE)
    assert found is not None, said
    return int(found[1])


def dead_process() -> int:
    """Number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def owned_elsewhere(folder: LocalFolder, name: str = "00000") -> Owner:
    """Claims something for a process of another machine."""
    owner = dataclasses.replace(Owner.new(), host="elsewhere")
    assert folder.create(f".claims/{name}-0", owner.content)
    return owner


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "set")


def test_a_claim_is_exclusive_until_it_is_released(folder: LocalFolder) -> None:
    claim = Claims(folder).take("00000")
    assert claim is not None and claim.held()
    assert Claims(folder).take("00000") is None
    with claim:
        assert Claims(folder).take("00000") is None
    again = Claims(folder).take("00000")
    assert again is not None
    with again:
        pass
    Claims(folder).tidy()
    assert not (folder.path / ".claims").exists()


def test_of_many_that_find_a_dead_claim_one_takes_it_over(folder: LocalFolder) -> None:
    folder.create(".claims/00000-0", dataclasses.replace(Owner.new(), pid=dead_process()).content)
    # A process number that is used again belongs to a process that started later.
    folder.create(".claims/00001-0", dataclasses.replace(Owner.new(), started="1").content)
    for name in ("00000", "00001"):
        taken: list[Claim] = []
        start = threading.Barrier(16)

        def take(name: str = name, taken: list[Claim] = taken, start: threading.Barrier = start) -> None:
            start.wait()
            claim = Claims(folder).take(name)
            taken += [] if claim is None else [claim]

        threads = [threading.Thread(target=take) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (claim,) = taken
        assert claim.held()
        with claim:
            pass
    assert not list((folder.path / ".claims").iterdir())


def test_a_claim_of_another_machine_counts_as_long_as_its_heart_beats(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "DEAD_SECONDS", 0.3)
    owner = owned_elsewhere(folder)
    claims = Claims(folder)
    for _ in range(6):
        assert claims.take("00000") is None and claims.take("00000") is None
        time.sleep(0.1)
        folder.beat(".claims/00000-0", owner.content)
    end = time.monotonic() + 0.3
    assert claims.take("00000") is None
    time.sleep(max(0.0, end - time.monotonic()) + 0.05)
    assert claims.take("00000") is not None


def test_who_is_waited_for_is_said(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once in a while; nothing while there is progress, and nothing of what is free."""
    monkeypatch.setattr(claims_module, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(claims_module, "SILENT_SECONDS", 0.2)
    owner = owned_elsewhere(folder)
    claims = Claims(folder)
    claims.wait(["00000"])
    time.sleep(0.2)
    claims.wait(["00000"], progressed=True)
    assert not caplog.records
    time.sleep(0.2)
    claims.wait(["00001"])
    assert not caplog.records
    time.sleep(0.2)
    claims.wait(["00000", "00001"])
    claims.wait(["00000", "00001"])
    (record,) = caplog.records
    assert record.getMessage() == (
        f"Waiting for '00000', '00001', claimed by {owner}. A process of another machine whose heartbeat stops counts as dead "
        "after 120 s."
    )


def test_a_heart_beats(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "BEAT_SECONDS", 0.02)
    claim = Claims(folder).take("00000")
    assert claim is not None
    with claim:
        before = folder.state(".claims/00000-0")
        end = time.monotonic() + 10
        while folder.state(".claims/00000-0") == before and time.monotonic() < end:
            time.sleep(0.01)
        assert folder.state(".claims/00000-0") != before


def test_a_process_that_was_taken_for_dead_publishes_nothing(folder: LocalFolder) -> None:
    """As after SIGSTOP: another one has its shard, and may have removed its temporary folder."""
    claim = Claims(folder).take("00000")
    assert claim is not None
    fields = dict.fromkeys(
        ("width", "height", "original_width", "original_height", "crop_top", "crop_left"), 1
    )

    def samples(lose_folder: bool) -> Iterator[PreparedSample]:
        yield PreparedSample("0", {"txt": "a"}, fields)
        folder.create(".claims/00000-1", Owner.new().content)
        if lose_folder:
            for path in folder.path.glob(".making-*"):
                os.rename(path, folder.path.parent / path.name)
        yield PreparedSample("1", {"txt": "b"}, fields)

    for lose_folder in (False, True):
        make_shard(folder, 0, samples(lose_folder), claim)
        assert claim.lost and folder.names() == {} and read_stats(folder, 0) is None


def test_a_shard_that_was_lost_is_waited_for(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "POLL_SECONDS", 0.02)
    done: set[int] = set()
    ends: list[ShardEnd] = []
    for shard, claim in claimed(Claims(folder), [0, 1, 2], done.__contains__, ends.append):
        if shard == 1 and not claim.lost and 1 not in done:
            done.add(1)  # by the other, which has superseded this claim
            folder.create(".claims/00001-1", dataclasses.replace(Owner.new(), pid=dead_process()).content)
            assert not claim.held()
        else:
            done.add(shard)
    assert ends == [ShardEnd(0, True), ShardEnd(2, True), ShardEnd(1, False)]


def test_three_commands_at_once_share_the_work_and_one_is_killed(
    photos: Path, complete: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    ends = in_ranks(shared_command, (command(photos, out), tmp_path, 3, (0,)), tmp_path, 3, 300)
    assert [end.code for end in ends] == [-9, 0, 0], ends
    # The killed one had made a shard; the one that it was making is made again.
    counts = [read(end.said) for end in ends[1:]]
    assert sum(counts) == COUNT - PER_SHARD and min(counts) > 0
    assert files(out) == files(complete) and len(files(out)) == 3 * COUNT // PER_SHARD + 1
    assert not list(out.glob(".*"))
    assert sum("is dead; it is made here" in end.said for end in ends) == 1


def test_the_same_command_again_does_nothing(
    photos: Path, complete: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in complete.glob("0*")}
    main(command(photos, complete))
    assert read(capsys.readouterr().out) == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in complete.glob("0*")}


def test_folders_of_others_stay(photos: Path, complete: Path, tmp_path: Path) -> None:
    """Temporary folders of running processes, of this machine and of others."""
    out = tmp_path / "set"
    main(command(photos, out, "--part", "0/2"))
    owners = {
        "here": Owner.new(),
        "elsewhere": dataclasses.replace(Owner.new(), host="elsewhere"),
        "dead": dataclasses.replace(Owner.new(), pid=dead_process()),
        "long-dead": dataclasses.replace(Owner.new(), host="elsewhere"),
    }
    for name, owner in owners.items():
        (out / f".making-{name}").mkdir()
        (out / f".making-{name}" / "owner.json").write_bytes(owner.content)
    for path in (out / ".making-long-dead" / "owner.json", out / ".making-long-dead"):
        os.utime(path, (1, 1))
    main(command(photos, out))
    assert sorted(path.name for path in out.glob(".making-*")) == [".making-elsewhere", ".making-here"]
    assert files(out) == files(complete)


def test_settings_of_two_that_begin_at_once_are_compared(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)  # both have looked before either writes
    assert [folder.create("images.json", content) for content in (b"1", b"2")] == [True, False]
    assert folder.read("images.json") == b"1" and folder.names() == {"images.json": 1}


def test_an_object_store_that_fails_and_is_slow(
    photos: Path, complete: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    out = "faulty://bucket/set"
    arguments = command(photos, out, "--remote_timeout_s", 0.5)
    ends = in_ranks(shared_command, (arguments, tmp_path, 2, (0,), str(store)), tmp_path, 2, 300)
    assert [end.code for end in ends] == [-9, 0], ends
    assert read(ends[1].said) == COUNT - PER_SHARD
    assert "cannot be written (OSError: 500 Internal Server Error); next try in 0.2 s" in ends[1].said
    assert "no answer within 0.5 s" in ends[1].said
    there = store / "bucket" / "set"
    assert files(there) == files(complete)
    assert not list((there / ".claims").iterdir())
    faulty_store.register(store)
    main(arguments)
    assert read(capsys.readouterr().out) == 0


def test_an_object_store_that_stays_away_is_given_up(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty_store.register(tmp_path)
    main(command(photos, "faulty://bucket/set", "--part", "0/12"))
    monkeypatch.setattr(faulty_store.FaultyStore, "requests", itertools.repeat(1))
    monkeypatch.setattr(faulty_store.FaultyStore, "always", True)
    message = refused(command(photos, "faulty://bucket/set", "--remote_retry_s", 0.1), capsys, code=4)
    assert "could not be claimed in 'faulty://bucket/set': 'faulty://bucket/set/.claims/00001-0'" in message
    assert "cannot be written (OSError: 500 Internal Server Error)" in message
    message = refused(command(photos, "nowhere://bucket/set"), capsys)
    assert "--out: 'nowhere://bucket/set' cannot be read (Protocol not known: nowhere)" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus_per_task", "1"], "--gpus_per_task needs --ray, whose tasks ask for them."),
        (["--ray", "--processes", "2"], "--processes is for one machine, and --ray starts as many tasks as"),
        (
            ["--ray", "--gpus_per_task", "0.5", "--device", "cpu"],
            "--gpus_per_task 0.5 and --device cpu exclude one another.",
        ),
        (["--ray"], "--ray needs the extra ray: `uv sync --extra ray`, or `pip install ray`."),
    ],
)
def test_options_of_ray(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    arguments = ["images", "--from", str(photos), "--out", str(tmp_path / "set"), *more]
    assert message in refused(arguments, capsys)
    assert not (tmp_path / "set").exists()


class OvertakenFolder(LocalFolder):
    """Another command begins the set, and makes a shard, just after this one found no settings."""

    def read(self, name: str) -> bytes | None:
        found = super().read(name)
        if found is None:
            self.path.mkdir()
            (self.path / name).write_bytes(json_content({"side": 8}))
            (self.path / "00000.tar").touch()
        return found


def test_a_command_that_another_overtakes_at_the_start_goes_on(tmp_path: Path) -> None:
    begin_or_resume(OvertakenFolder(tmp_path / "same"), "settings.json", {"side": 8})
    with pytest.raises(UserError, match="was started with side 8 and this command says 9"):
        begin_or_resume(OvertakenFolder(tmp_path / "other"), "settings.json", {"side": 9})
    (tmp_path / "same" / "settings.json").unlink()
    with pytest.raises(UserError, match="holds shards but no settings.json"):
        begin_or_resume(LocalFolder(tmp_path / "same"), "settings.json", {"side": 8})


@pytest.mark.parametrize(
    ("option", "most"), [("processes", 1024), ("remote_timeout_s", 1_000_000), ("remote_retry_s", 1_000_000)]
)
def test_numbers_that_cannot_be_meant_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, most: int
) -> None:
    said = refused(command(photos, tmp_path / "set", f"--{option}", most + 1), capsys)
    assert f"--{option} is '{most + 1}" in said and f"{most}" in said.partition("must be")[2]
    assert not (tmp_path / "set").exists()
