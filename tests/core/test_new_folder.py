"""Exports can be read by those whom the umask lets read, and two of them, or a killed one, leave nothing behind."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxs_lightning.export import LEFTOVER_SECONDS, new_folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_an_exported_folder_is_readable_by_whom_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "export") as written:
            (written / "unet").mkdir(parents=True)
            save_file({"a": torch.zeros(1)}, written / "unet" / "weights.safetensors")
            (written / "config.json").write_text("{}")
            (written / "start.sh").write_text("")
            (written / "start.sh").chmod(0o700)
    finally:
        os.umask(before)
    files = [one for one in (tmp_path / "export").rglob("*") if one.is_file()]
    found = {one.name: one.stat().st_mode & 0o777 for one in files}
    assert found == {"weights.safetensors": mode, "config.json": mode, "start.sh": mode | 0o100}


def test_two_that_write_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "export"
    replace = os.replace

    def overtaken(source: Path, target: Path) -> None:
        """Another process puts its own there first, once."""
        if target == folder and not others.exists():
            replace(tmp_path / "other", folder)
            others.touch()
        replace(source, target)

    others = tmp_path / "overtaken"
    for earlier in (None, "folder", "file"):
        others.unlink(missing_ok=True)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "other.txt").touch()
        if earlier == "file":
            shutil.rmtree(folder)
            folder.touch()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", overtaken)
            with new_folder(folder) as written:
                written.mkdir()
                (written / "own.txt").touch()
        assert others.exists() and [one.name for one in folder.iterdir()] == ["own.txt"], earlier
    assert sorted(one.name for one in tmp_path.iterdir()) == ["export", "overtaken"]


def test_an_earlier_folder_survives_one_that_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "earlier.txt").touch()
    replace = os.replace

    def refused(source: Path, target: Path) -> None:
        if source.name == "complete":
            raise OSError(errno.EIO, "the disk fails")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError, match="the disk fails"), new_folder(folder) as written:
        written.mkdir()
    left = sorted(one.relative_to(tmp_path).as_posix() for one in tmp_path.rglob("*"))
    assert left == ["export", "export/earlier.txt"]


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path: Path) -> None:
    old, young, foreign = (tmp_path / f".export-{name}" for name in ("abcd1234", "abcd1235", "abcd1236"))
    for leftover in (old, young, foreign):
        (leftover / "complete").mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years")
    for leftover in (old, foreign):
        os.utime(leftover, (0, time.time() - LEFTOVER_SECONDS - 60))
    os.utime(young, (0, time.time() - LEFTOVER_SECONDS + 60))
    with new_folder(tmp_path / "export") as written:
        written.mkdir()
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        ".export-abcd1235",
        ".export-abcd1236",
        "export",
    ]
