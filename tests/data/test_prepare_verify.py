"""`python -m data.prepare verify`: every kind of damage is found, named by shard and key, and ends in exit code 2."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from data.prepare.__main__ import main
from data.prepare.common.checksums import recorded_sums, write_sums
from data.prepare.common.set_folder import LocalFolder
from data.prepare.common.shard_files import PreparedSample, make_shard
from data.shards.dataset import ShardDataset
from data.shards.decoders import BadSampleError
from data.shards.index import ShardSet, index_shard, sidecar_path
from data.shards.order.sample_order import SampleOrder
from data.shards.writer import Member, ShardWriter

CAPTIONS = ["a red circle", "a small blue square", "a green cat", "the white star", "a photo", "a dog"]


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def latents(seed: int) -> bytes:
    values = np.random.default_rng(seed).standard_normal((4, 8, 8)).astype(np.float16)
    return safetensors.numpy.save({"latents": values})


def foreign(folder: Path, change: Callable[[int, dict[str, Member]], None] = lambda i, sample: None) -> Path:
    """Six samples in shards of three, as another tool would write them: without checksums."""
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for i, caption in enumerate(CAPTIONS):
            sample: dict[str, Member] = {"jpg": jpeg(i), "txt": caption, "json": {"width": 16}}
            change(i, sample)
            writer.write(sample)
    return folder


def prepared(folder: Path) -> Path:
    """Two shards of latents with all checksums."""
    folder.mkdir()
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 16)
    fields = {**sizes, "crop_top": 0, "crop_left": 0}
    for shard in range(2):
        keys = [f"{3 * shard + i:09d}" for i in range(3)]
        samples = [
            PreparedSample(key, {"latent.safetensors": latents(int(key)), "txt": CAPTIONS[int(key)]}, fields)
            for key in keys
        ]
        make_shard(LocalFolder(folder), shard, samples)
    write_sums(folder, recorded_sums(folder))
    return folder


def check(*arguments: object) -> None:
    """A command that finds none."""
    main(["verify", "--processes", "1", *map(str, arguments)])


def faults(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """The lines on stdout of a command that finds some."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        check(*arguments)
    captured = capsys.readouterr()
    assert end.value.code == 2
    (sentence,) = [line for line in captured.err.splitlines() if line.startswith("prepare verify: ")]
    lines = captured.out.splitlines()
    assert sentence.startswith(f"prepare verify: {len(lines)} faults in ")
    return lines


def patch(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def test_an_intact_set_passes_and_gets_its_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "set")
    check(folder, "--out", tmp_path / "faults.jsonl")
    output = capsys.readouterr().out
    assert output.startswith("no fault in 6 samples in 2 shards, read in ") and output.endswith(
        "; 0 shards compared with their SHA-256\n"
    )
    assert (tmp_path / "faults.jsonl").read_text() == ""
    for name in ("00000.tar", "00001.tar"):
        assert sidecar_path(folder / name).is_file() and len(index_shard(folder / name)) == 3
    main(
        ["verify", str(prepared(tmp_path / "own")), str(folder), "--index_folder", str(tmp_path / "indexes")]
    )
    assert "no fault in 12 samples in 4 shards" in (output := capsys.readouterr().out)
    assert "; 2 shards compared" in output and len(list((tmp_path / "indexes").iterdir())) == 4


def test_one_flipped_bit_of_latents_is_found_by_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path / "set")
    shard = folder / "00001.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(latents(4)) + 200
    content[place] ^= 1
    shard.write_bytes(bytes(content))
    file_fault, member_fault = faults(capsys, folder, "--out", tmp_path / "faults.jsonl")
    assert file_fault.startswith(f"{shard}: bytes have changed: its SHA-256 is ")
    assert file_fault.endswith(" was recorded")
    assert member_fault == (
        f"{shard}, key '000000004': latent.safetensors: bytes have changed since it was written (CRC-32 in the json)"
    )
    stored = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [(one["shard"], one["key"]) for one in stored] == [(str(shard), ""), (str(shard), "000000004")]
    checked = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert checked.returncode == 1 and "00000.tar: OK\n00001.tar: FAILED\n" in checked.stdout


def test_every_single_flipped_bit_changes_the_checksum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(tmp_path / "set")
    check(folder, "--record")
    shard = folder / "00000.tar"
    original = shard.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(original), 12).tolist():
        content = bytearray(original)
        content[place] ^= 1 << place % 8
        shard.write_bytes(bytes(content))
        lines = faults(capsys, folder)
        assert any("bytes have changed" in line or "no valid tar header" in line for line in lines)
    shard.write_bytes(original)
    check(folder)
    assert "2 shards compared with their SHA-256" in capsys.readouterr().out


def test_truncated_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "set")
    content = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(content[: len(content) // 2])
    (folder / "00001.tar").write_bytes(b"")
    first, second = faults(capsys, folder)
    assert first.startswith(f"{folder}/00000.tar, key '000000002': is truncated: '")
    assert second.startswith(f"{folder}/00001.tar: is empty")
    # Cut between two members, which Python's tarfile takes for the end.
    (folder / "00001.tar").write_bytes(content)
    with tarfile.open(folder / "00001.tar") as tar:
        between = tar.getmembers()[4].offset
    (folder / "00001.tar").write_bytes(content[:between])
    assert f"it ends at byte {between} without the mark that ends a tar" in faults(capsys, folder)[1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"jpg": jpeg(4)[:300]}, "jpg: the image cannot be decoded ("),
        ({"jpg": b"<html>404</html>"}, "jpg: the image cannot be decoded ("),
        ({"jpg": None}, "there is no image (jpg, jpeg, png, webp), which most samples of this shard have"),
        ({"txt": None}, "there is no caption (txt, text, caption), which most samples of this shard have"),
        ({"json": None}, "there is no json (json), which most samples of this shard have"),
        ({"txt": b"caf\xe9"}, "txt: the caption is not UTF-8 ("),
        ({"txt": "  "}, "the caption is empty"),
        ({"json": b"{"}, "json: the json member cannot be parsed ("),
        ({"latent.safetensors": b"12345678"}, "latent.safetensors: "),
    ],
)
def test_broken_samples_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, bytes | str | None], expected: str
) -> None:
    def broken(i: int, sample: dict[str, Member]) -> None:
        for name, content in change.items() if i == 4 else ():
            if content is None:
                del sample[name]
            else:
                sample[name] = content

    folder = foreign(tmp_path / "set", broken)
    (line,) = faults(capsys, folder)
    assert (
        line.startswith(f"{folder}/00001.tar, key '000000004': {expected}")
        and "00001.tar" not in line[len(str(folder)) + 12 :]
    )
    if expected == "the caption is empty":
        check(folder, "--empty_captions", "keep")


def test_an_index_of_other_contents_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "set")
    check(folder)
    other = foreign(tmp_path / "other", lambda i, sample: sample.update(txt=CAPTIONS[i] * 40))
    index_shard(other / "00000.tar")
    # The index of another tar that happens to have the stamp of this one.
    with (
        np.load(sidecar_path(other / "00000.tar")) as stored,
        np.load(sidecar_path(folder / "00000.tar")) as mine,
    ):
        np.savez(tmp_path / "forged.npz", **(dict(stored) | {"stamp": mine["stamp"]}))
    shutil.copy(tmp_path / "forged.npz", sidecar_path(folder / "00000.tar"))
    (line,) = faults(capsys, folder)
    assert line == f"{folder}/00000.tar: its stored index was of other contents, and has been written again"
    check(folder)


def test_a_flipped_bit_is_detected_by_a_training_and_by_the_next_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(tmp_path / "set")
    check(folder)
    shard = folder / "00001.tar"
    times = shard.stat()
    content = bytearray(shard.read_bytes())
    content[content.index(b"a photo")] ^= 1
    shard.write_bytes(bytes(content))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))  # a failing disk changes no times
    for _ in range(2):
        (line,) = faults(capsys, folder)
        assert line == f"{shard}, key '000000004': txt: bytes have changed since the shard was last verified"
    shards = ShardSet.open(str(folder))
    dataset = ShardDataset(shards, SampleOrder(shards.sizes, shuffle_window_shards=0), ())
    assert dataset.batch([3]).captions == ["the white star"]
    with pytest.raises(
        BadSampleError, match="key '000000004': the bytes of the member 'txt' have changed since"
    ):
        dataset.batch([4])


def test_shards_are_read_through_fsspec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "set")
    where = ["--cache_folder", str(tmp_path / "cache")]
    check(f"file://{folder}/{{00000..00001}}.tar", *where)
    assert "no fault in 6 samples in 2 shards" in capsys.readouterr().out
    (folder / "00001.tar").unlink()
    shutil.rmtree(tmp_path / "cache")
    (line,) = faults(capsys, f"file://{folder}/{{00000..00001}}.tar", *where)
    assert line.startswith(f"file://{folder}/00001.tar: ")


def test_members_missing_from_all_samples_are_detected_by_their_checksum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path / "set") as writer:
        writer.write({"txt": "a", "json": {"crc32": {"txt": 3904355907, "jpg": 1}}})
        writer.write({"txt": "b", "json": {"crc32": "no mapping"}})
    (line,) = faults(capsys, tmp_path / "set", "--contents", "captions")
    assert line.endswith("key '000000000': jpg is missing, and its json has a checksum of it")


def test_members_that_are_not_adjacent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("a.txt", "b.txt", "a.json"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
    (line,) = faults(capsys, tmp_path / "set.tar", "--contents", "captions")
    reason = "the members of 'a' are not adjacent; write the shard again, sorted by key."
    assert line == f"{tmp_path}/set.tar, key 'a': {reason}"


def test_several_processes_find_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared(tmp_path / "set")
    for name in ("00000.tar", "00001.tar"):
        content = bytearray((folder / name).read_bytes())
        content[1000] ^= 64
        (folder / name).write_bytes(bytes(content))
    alone = faults(capsys, folder)
    together = faults(capsys, folder, "--processes", 2)
    assert sorted(together) == sorted(alone) and len(alone) >= 2


def test_no_shards_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify", str(tmp_path / "nowhere")])
    assert end.value.code == 2 and "prepare verify: There is no shard or folder" in capsys.readouterr().err


def test_latents_of_one_folder_have_one_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training without buckets refuses the odd one, at the step where the shuffle brings it."""
    folder = tmp_path / "set"
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for i, caption in enumerate(CAPTIONS):
            values = np.zeros((4, 8, 9 if i == 4 else 8), np.float16)
            writer.write({"latent.safetensors": safetensors.numpy.save({"latents": values}), "txt": caption})
    (line,) = faults(capsys, folder)
    assert line.startswith(
        f"{folder}/00001.tar, key '000000004': its latents are (4, 8, 9), but those of 5 of 6 samples"
    )
    check(folder, "--buckets")
    (folder / "latents.json").write_text(json.dumps({"sizes": [[64, 64], [64, 72]]}))
    check(folder)
    (folder / "latents.json").write_text(json.dumps({"sizes": [[64, 64]]}))
    assert len(faults(capsys, folder)) == 1
    main(["verify", str(prepared(tmp_path / "other")), str(prepared(tmp_path / "third"))])  # a folder each


def test_a_set_that_no_training_can_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("k.1.jpg", jpeg(1)), ("k.2.jpg", jpeg(2)), ("k.json", b'{"caption": "a"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (line,) = faults(capsys, path)
    assert "1 of 1 samples have neither an image" in line and "a key ends at the first dot" in line
    (line,) = faults(capsys, path, "--contents", "images")
    assert line.startswith(f"{path}, key 'k': as data.contents reads it: there is no member for images")
    check(path, "--contents", "captions")


def test_contents_are_decoded_as_a_training_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(i: int, sample: dict[str, Member]) -> None:
        size = -5 if i == 3 else 16
        sample["json"] = {
            "original_width": size,
            "original_height": 16,
            "crop_top": 0,
            "crop_left": None if i == 1 else 0,
        }

    folder = foreign(tmp_path / "set", change)
    lines = sorted(faults(capsys, folder, "--contents", "images", "sizes"))
    assert [line.partition(": ")[2] for line in lines] == [
        "as data.contents reads it: the json member has no int named 'crop_left'.",
        "json: 'original_width' is -5, but it is an integer from 1 to 1048576",
    ]


def test_a_shard_that_is_recorded_and_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared(tmp_path / "set")
    (folder / "00001.tar").unlink()
    (line,) = faults(capsys, folder)
    assert line == f"{folder}/00001.tar: it is missing, and SHA256SUMS or its _stats.json lists it"
