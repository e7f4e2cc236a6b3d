"""Which checkpoint a run goes on from, whatever a disk or a clock did to the others."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.checkpoint_choice import chosen_checkpoint
from sdxs_lightning.callbacks.resume import read_state
from sdxs_lightning.core.errors import UserError
from tests.helpers.resumed_run import checkpoints, refused_beside_logs


@pytest.mark.parametrize("damage", ["bit", "zeros", "zeros without checksums"])
def test_a_changed_checkpoint_is_passed_over_for_an_older_one(
    resume: Callable[..., tuple[int, str]], tmp_path: Path, damage: str
) -> None:
    newest = folders.newest_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    content = bytearray((newest / folders.STATE).read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 4
    else:
        content = bytearray(len(content))
    (newest / folders.STATE).write_bytes(content)
    if "without" in damage:
        manifest = folders.read_manifest(newest)
        assert manifest is not None
        first_version = manifest._replace(checksums=None, own_checksum=None)._asdict()
        (newest / folders.MANIFEST).write_text(json.dumps(first_version))
    code, said = resume(None, str(newest))
    assert code == 2
    assert (
        f"the checkpoint {newest} has changed since it was written (state.ckpt cannot be read, or does not match its checksum)"
        in said
    )
    code, said = resume(None, "auto", updates=2)
    assert code == 0
    assert f"resume: resuming from {newest.with_name('update_00000001-batch_00000001')} instead." in said
    assert "nothing to do" not in said  # though it ends where the damaged checkpoint is
    assert checkpoints(tmp_path)[-1] == "update_00000002-batch_00000002"
    content[len(content) // 2] ^= 4
    (newest / folders.STATE).write_bytes(content)
    older = newest.with_name("update_00000001-batch_00000001") / folders.STATE
    older.write_bytes(bytes(len(older.read_bytes())))
    code, said = resume(None, "auto")
    assert code == 2
    assert "; every other one has too." in said


def test_a_clock_that_is_ahead_deletes_nothing(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    first = folder / "update_00000001-batch_00000001"
    manifest = folders.read_manifest(first)
    assert manifest is not None
    ahead = manifest._replace(saved_at=manifest.saved_at + 3600).with_checksum()
    (first / folders.MANIFEST).write_text(json.dumps(ahead._asdict()))

    def keep_one(config: dict[str, Any]) -> None:
        config["trainer"]["callbacks"][1]["init_args"]["keep"] = 1

    assert folders.newest_complete_checkpoint(folder) == folder / "update_00000002-batch_00000002"
    assert resume(keep_one)[0] == 0
    assert checkpoints(tmp_path) == ["update_00000003-batch_00000003"]


def test_a_run_that_went_back_keeps_what_it_writes_now(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """By counters alone the abandoned update 9 would be newer than the update 2 that follows update 1 anew."""
    folder = tmp_path / "run" / "checkpoints"
    (folder / "update_00000002-batch_00000002").rename(folder / "update_00000009-batch_00000009")
    abandoned = folder / "update_00000009-batch_00000009"
    manifest = folders.read_manifest(abandoned)
    assert manifest is not None
    later = manifest._replace(student_updates=9, iterations=9, batches=9).with_checksum()
    (abandoned / folders.MANIFEST).write_text(json.dumps(later._asdict()))
    assert resume(None, str(folder / "update_00000001-batch_00000001"), updates=2)[0] == 0
    assert checkpoints(tmp_path) == ["update_00000009-batch_00000009", "update_00000002-batch_00000002"]


def test_a_manifest_that_has_changed_is_no_manifest(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """One flipped bit in a counter of the older checkpoint would make it the newest, and `keep` would delete the other."""
    folder = shutil.copytree(trained[0] / "run" / "checkpoints", tmp_path / "checkpoints")
    older, newest = folders.complete_checkpoints(folder)
    file = older / folders.MANIFEST
    content = file.read_text()
    for name in ("starts", "batches", "student_updates", "saved_at"):
        digit = re.search(rf'"{name}": (\d)', content)
        assert digit is not None
        place = digit.start(1)
        file.write_text(content[:place] + chr(ord(content[place]) ^ 4) + content[place + 1 :])
        assert folders.complete_checkpoints(folder) == [newest]
        assert folders.incomplete_checkpoints(folder) == [older]
    file.write_text(content)
    assert folders.complete_checkpoints(folder) == [older, newest]


def test_a_checkpoint_with_a_missing_part_is_passed_over_and_said(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    newest = folders.newest_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    os.truncate(newest / folders.STATE, 1000)
    code, said = resume(updates=2)
    assert code == 0
    assert f"resume: not complete in '{newest.parent}' (a file is missing or shorter" in said
    assert (
        f"left there: {newest.name}; the newest complete checkpoint is update_00000001-batch_00000001."
        in said
    )
    assert "nothing to do" not in said


def test_checkpoints_of_another_run_are_not_mixed_with_its_own(
    resume: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """With `keep` they would be deleted one after the other."""
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    other = tmp_path / "other" / "checkpoints" / "update_00000001-batch_00000001"
    before = checkpoints(tmp_path)
    code, said = resume(None, str(other))
    assert code == 2
    assert f"holds checkpoints of an earlier run (newest: {before[-1]}), and --ckpt_path '{other}" in said
    assert refused_beside_logs(resume, tmp_path)
    assert checkpoints(tmp_path) == before


def test_a_finished_run_says_so(resume: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, said = resume(updates=2)
    assert code == 0
    assert "nothing to do: the checkpoint" in said
    assert "(student update 2)" in said


def test_what_is_no_checkpoint_is_told_from_one(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    folder = tmp_path / "checkpoints" / folders.checkpoint_name(1, 2)
    folders.partial_of(folder).mkdir(parents=True)
    torch.save(["no dict"], folders.partial_of(folder) / folders.STATE)
    folders.seal(folder, 1, 1, 2)
    (folder.parent / "lost+found").mkdir()
    # A manifest with an entry that a later version has added is complete.
    manifest = json.loads((folder / folders.MANIFEST).read_text()) | {"added_later": 1}
    manifest["own_checksum"] = folders.hash_of_entries(manifest)
    (folder / folders.MANIFEST).write_text(json.dumps(manifest))
    for wanted in ("auto", "last", str(folder), str(folder / folders.MANIFEST)):
        assert chosen_checkpoint(trainer, wanted) == str(folder / folders.STATE), wanted
    for wanted in (str(folder.parent), ""):
        with pytest.raises(UserError, match=r"is a folder, and not of a checkpoint; give one like 'update_"):
            chosen_checkpoint(trainer, wanted)
    for foreign in (folder / folders.STATE, folder / folders.MANIFEST):
        with pytest.raises(UserError, match=f"'{foreign}' is not a checkpoint of this program"):
            read_state(foreign)
    shutil.rmtree(folder)
    assert chosen_checkpoint(trainer, "auto") is None  # the other folder is no damaged checkpoint
