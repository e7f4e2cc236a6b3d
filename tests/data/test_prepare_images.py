"""`python -m data.prepare images`: what keeps its bytes, what is left out, and how a killed run is resumed."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.prepare.__main__ import main
from data.prepare.common.geometry import resize_shorter_side, resize_to_cover
from data.prepare.common.progress import CommandProgress
from data.prepare.common.raw_shards import RawShards
from data.prepare.images.image_files import UnreadableImageError, read_image
from data.prepare.images.sources import open_source
from data.shards.dataset import ShardDataset
from data.shards.index import ShardSet
from data.shards.order.sample_order import SampleOrder
from data.shards.store import ShardStore
from data.shards.writer import ShardWriter
from tests.helpers.preparing import files, killed_in_its_second_shard, refused
from tests.helpers.ranks.processes import PRELOAD

SIZES = [(40, 30), (64, 32), (33, 50), (20, 20), (48, 48), (31, 64), (100, 20), (36, 36), (41, 32)]
"""Width, height."""


def render(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth colours, so that JPEG keeps them nearly."""
    down, across = np.mgrid[0 : size[1], 0 : size[0]]
    waves = [np.sin(across / (4 + seed + i)) + np.cos(down / (5 + i)) for i in range(3)]
    return Image.fromarray((np.stack(waves, axis=-1) * 60 + 128).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images in a folder and a subfolder; JPEG, PNG and JPEG again."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i, size in enumerate(SIZES):
        kind = "PNG" if i % 3 == 1 else "JPEG"
        place = folder / ("more" if i > 5 else ".") / f"{i}.{'png' if kind == 'PNG' else 'jpg'}"
        place.write_bytes(encoded(render(size, i), kind))
        place.with_suffix(".txt").write_text(f"image {i} of {size[0]} by {size[1]}\n")
    return folder


def command(source: Path | str, out: Path, *more: object) -> list[str]:
    fixed = ["--samples_per_shard", 4, "--processes", 1]
    return [str(one) for one in ("images", "--from", source, "--out", out, *fixed, *more)]


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    shards = RawShards(ShardSet.open(str(folder)), ShardStore())
    samples = [shards.sample(i) for i in range(len(shards))]
    shards.close()
    return {sample.key: sample.members for sample in samples}


def fields(folder: Path, key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(members(folder)[key]["json"])
    return found


def test_files_keep_their_bytes(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command(photos, tmp_path / "set", "--max_aspect", 8))
    output = capsys.readouterr().out
    assert output.startswith("9 samples read in ") and "holds 9 samples in 3 shards\n" in output
    found = members(tmp_path / "set")
    assert list(found) == [f"{i:09d}" for i in range(9)]
    names = sorted(
        path.relative_to(photos).as_posix() for path in photos.rglob("*.*") if path.suffix != ".txt"
    )
    for name, (key, sample) in zip(names, found.items(), strict=True):
        assert sample[Path(name).suffix[1:]] == (photos / name).read_bytes(), key
        assert sample["txt"].decode() == (photos / name).with_suffix(".txt").read_text().strip()
        width, height = SIZES[int(Path(name).stem)]
        content = json.loads(sample["json"])
        assert (content["original_width"], content["original_height"]) == (width, height)
        assert (content["width"], content["height"]) == (width, height)
        assert (content["crop_top"], content["crop_left"]) == (0, 0)


def test_sidecars_describe_their_shard(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    main(command(photos, out))
    stats = json.loads((out / "00001_stats.json").read_text())
    tar = (out / "00001.tar").read_bytes()
    assert (stats["count"], stats["successes"], stats["bytes"]) == (4, 3, len(tar))
    assert stats["status_dict"] == {"too elongated": 1} and stats["faults"] == []
    assert stats["sha256"] == hashlib.sha256(tar).hexdigest()
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums["00001.tar"] == stats["sha256"] and list(sums) == ["00000.tar", "00001.tar", "00002.tar"]
    rows = pq.read_table(out / "00001.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["000000004", "000000005", "000000007"]
    assert rows[1]["caption"] == "image 5 of 31 by 64"
    assert (rows[1]["width"], rows[1]["height"], rows[1]["status"]) == (31, 64, "success")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["samples"], summary["left_out"]) == (8, {"too elongated": 1})


def test_a_killed_run_resumes_to_the_same_shards_in_several_processes(photos: Path, tmp_path: Path) -> None:
    options = ("--resolution", 24, "--min_side", 0, "--condition", "canny")
    main(command(photos, tmp_path / "complete", *options))
    out = tmp_path / "set"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "data.prepare.__main__"])
    run = context.Process(target=killed_in_its_second_shard, args=(command(photos, out, *options), out))
    run.start()
    run.join(120)
    assert run.exitcode == -signal.SIGKILL
    assert [path.name for path in out.glob("*.tar")] == ["00000.tar"] and list(
        out.glob(".making-*/*.partial")
    )
    before = (out / "00000.tar").stat().st_mtime_ns
    main([*command(photos, out, *options), "--part", "1/2"])
    assert not (out / "summary.json").exists() and len(list(out.glob("*.tar"))) == 2
    main([*command(photos, out, *options), "--processes", "2"])
    assert files(out) == files(tmp_path / "complete") and len(files(out)) == 10
    assert (out / "00000.tar").stat().st_mtime_ns == before and not list(out.glob(".making-*"))
    # A truncated tar is detected by its size and written again; so is a missing one.
    (out / "00001.tar").write_bytes((out / "00001.tar").read_bytes()[:1024])
    (out / "00002.tar").unlink()
    main(command(photos, out, *options))
    assert files(out) == files(tmp_path / "complete")


def test_a_resized_square_equals_the_readers(photos: Path, tmp_path: Path) -> None:
    main(command(photos, tmp_path / "plain", "--min_side", 24, "--max_aspect", 8))
    small = ("--resolution", 24, "--format", "png", "--max_aspect", 8)
    main(command(photos, tmp_path / "square", *small, "--crop", "centre"))
    main(command(photos, tmp_path / "complete", *small))
    expected = read(tmp_path / "plain", resolution=24)
    squares = read(tmp_path / "square", resolution=None)
    assert expected.images is not None and squares.images is not None
    # Two bicubic kernels, which round differently.
    assert (
        squares.images.shape == (7, 3, 24, 24)
        and (expected.images - squares.images).abs().max() < 1.01 / 127.5
    )
    assert read(tmp_path / "complete", resolution=24).images is not None
    assert expected.original_sizes is not None and expected.crops is not None
    for row, (key, sample) in enumerate(members(tmp_path / "square").items()):
        content = json.loads(sample["json"])
        crop = [content["crop_top"], content["crop_left"]]
        assert crop == expected.crops[row].tolist(), key
        assert [content["original_height"], content["original_width"]] == expected.original_sizes[
            row
        ].tolist()
    # 64x32 becomes 48x24, uncropped.
    assert fields(tmp_path / "complete", "000000001") | {"width": 48, "height": 24, "crop_left": 0} == fields(
        tmp_path / "complete", "000000001"
    )


def read(folder: Path, resolution: int | None) -> Any:
    shards = ShardSet.open(str(folder))
    dataset = ShardDataset(shards, SampleOrder(shards.sizes, shuffle_window_shards=0), ["images"], resolution)
    return dataset.batch(range(len(dataset)))


@pytest.mark.parametrize(
    ("options", "kept", "reasons"),
    [
        (["--min_side", 32], [1, 2, 4, 7, 8], {"too small": 4}),
        (["--max_aspect", 1.5], [0, 3, 4, 7, 8], {"too elongated": 4}),
        (["--min_caption", 20, "--max_aspect", 8], [6], {"caption too short": 8}),
        (["--max_caption", 19], [0, 1, 2, 3, 4, 5, 7, 8], {"caption too long": 1}),
    ],
)
def test_unwanted_samples_are_left_out_and_counted(
    photos: Path, tmp_path: Path, options: list[object], kept: list[int], reasons: dict[str, int]
) -> None:
    # All captions have 19 characters but that of the image 100 wide, which has 20.
    main(command(photos, tmp_path / "set", *options))
    assert [int(key) for key in members(tmp_path / "set")] == kept
    assert json.loads((tmp_path / "set" / "summary.json").read_text())["left_out"] == reasons


def test_broken_samples_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    complete = encoded(render((32, 32), 0))
    (folder / "a.jpg").write_bytes(complete[: len(complete) // 2])
    (folder / "b.jpg").write_bytes(b"<html>404</html>")
    (folder / "c.jpg").write_bytes(complete)
    (folder / "d.jpg").write_bytes(complete)
    (folder / "e.jpg").write_bytes(complete)
    for name in "abc":
        (folder / f"{name}.txt").write_text("words")
    (folder / "d.txt").write_bytes(b"caf\xe9")
    main(command(folder, tmp_path / "set"))
    assert "holds 1 samples in 1 shards; left out: 1 no caption, 3 unreadable" in capsys.readouterr().out
    faults = dict(json.loads((tmp_path / "set" / "summary.json").read_text())["faults"])
    assert faults["000000000"].startswith("a.jpg: the image cannot be decoded (")
    assert faults["000000001"].startswith("b.jpg: the image cannot be decoded (")
    broken_text = "the caption is not UTF-8 (unexpected end of data at byte 3)"
    assert faults["000000003"] == f"{folder}/d.jpg: {broken_text}"
    (folder / "c.jpg").unlink()
    message = refused(command(folder, tmp_path / "other"), capsys)
    assert message.startswith("prepare images: no sample was kept of 4: a.jpg: the image cannot be decoded")


def test_captions_come_from_json_and_sizes_from_an_earlier_step(photos: Path, tmp_path: Path) -> None:
    jpeg = encoded(render((50, 40), 1))
    earlier = {"original_height": 400, "original_width": 600, "crop_top": 4, "crop_left": 8, "sha256": "x"}
    with ShardWriter(tmp_path / "tars", samples_per_shard=2) as writer:
        writer.write({"jpg": jpeg, "json": {"caption": "from json", **earlier}}, key="here/7")
        writer.write(
            {
                "jpg": jpeg,
                "txt": "from txt",
                "json": {"caption": "other"},
                "cond.png": encoded(render((50, 40), 5), "PNG"),
            },
            key="8",
        )
        writer.write({"txt": "no image"}, key="9")
    main(
        command(
            tmp_path / "tars", tmp_path / "set", "--resolution", 20, "--crop", "centre", "--format", "png"
        )
    )
    found = members(tmp_path / "set")
    assert [sample["txt"] for sample in found.values()] == [b"from json", b"from txt"]
    first, second = (json.loads(sample["json"]) for sample in found.values())
    # 40 high becomes 20: the earlier crop is halved, and 25 wide is cropped to 20 from 2 on.
    assert (first["original_height"], first["original_width"]) == (400, 600)
    assert (first["crop_top"], first["crop_left"], first["sha256"]) == (2, 4 + 2, "x")
    assert (second["original_height"], second["original_width"], second["crop_left"]) == (40, 50, 2)
    assert list(found["000000000"]) == ["json", "png", "txt"] and "cond.png" in found["000000001"]
    control = Image.open(io.BytesIO(found["000000001"]["cond.png"]))
    expected = resize_to_cover((40, 50), (20, 20)).apply(render((50, 40), 5))
    assert np.array_equal(np.asarray(control), np.asarray(expected))
    faults = json.loads((tmp_path / "set" / "00000_stats.json").read_text())["faults"]
    assert faults == [
        ["000000002", f"{tmp_path}/tars/00001.tar, key '9': there is no image (jpg, jpeg, png, webp)"]
    ]


def test_tables_of_paths_and_of_bytes(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(photos, tmp_path / "folder"))
    paths = sorted(
        path.relative_to(photos).as_posix() for path in photos.rglob("*.*") if path.suffix != ".txt"
    )
    captions = [(photos / path).with_suffix(".txt").read_text().strip() for path in paths]
    scores = [0.5 * i for i in range(9)]
    rows = pa.table({"file_name": paths, "text": captions, "score": scores})
    pyarrow.csv.write_csv(rows, photos / "list.csv")
    try:
        main(command(photos / "list.csv", tmp_path / "csv"))
    finally:
        (photos / "list.csv").unlink()
    content = [{"bytes": (photos / path).read_bytes(), "path": None} for path in paths]
    held = pa.table({"image": content, "caption": captions, "score": scores})
    pq.write_table(held, tmp_path / "held.parquet", row_group_size=2)
    main(command(tmp_path / "held.parquet", tmp_path / "parquet"))
    assert files(tmp_path / "csv") == files(tmp_path / "parquet") != files(tmp_path / "folder")
    assert fields(tmp_path / "csv", "000000003")["score"] == 1.5
    images = [sample.get("jpg") for sample in members(tmp_path / "folder").values()]
    assert images == [sample.get("jpg") for sample in members(tmp_path / "csv").values()]
    named = command(tmp_path / "held.parquet", tmp_path / "no", "--caption_column", "alt")
    assert "has no column 'alt'; name one of image, caption, score with --caption_column" in refused(
        named, capsys
    )


def test_urls_in_a_table_are_not_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.csv").write_text("image,caption\nhttps://example.org/a.jpg,words\nnowhere.jpg,words\n")
    message = refused(command(tmp_path / "list.csv", tmp_path / "set"), capsys)
    assert "row 0: 'https://example.org/a.jpg' must be downloaded first; img2dataset makes tars" in message
    faults = json.loads((tmp_path / "set" / "00000_stats.json").read_text())["faults"]
    assert faults[1][1] == f"{tmp_path}/list.csv, row 1: there is no file '{tmp_path}/nowhere.jpg'"


def test_an_image_with_an_exif_rotation_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(encoded(render((40, 24), 2), exif=exif))
    (tmp_path / "photos" / "a.txt").write_text("words")
    main(command(tmp_path / "photos", tmp_path / "set", "--format", "png"))
    upright = Image.open(io.BytesIO(members(tmp_path / "set")["000000000"]["png"]))
    stored = Image.open(tmp_path / "photos" / "a.jpg")
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(stored), -1))
    assert fields(tmp_path / "set", "000000000")["original_height"] == 40


def test_conditions_are_a_folder_with_the_names_of_the_images(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    deep = {}
    for i, size in enumerate(SIZES):
        place = given / ("more" if i > 5 else ".") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        deep[i] = np.arange(size[0] * size[1], dtype=np.uint16).reshape(size[1], size[0]) * 7
        Image.fromarray(deep[i]).save(place)
    Image.fromarray(deep[0]).save(given / "stray.png")
    main(command(photos, tmp_path / "set", "--conditions", str(given)))
    said = capsys.readouterr().out
    assert "; 1 condition images have no image of their name in --from, such as stray.png" in said
    control = Image.open(io.BytesIO(members(tmp_path / "set")["000000002"]["cond.png"]))
    assert control.mode.startswith("I;16") and np.array_equal(np.asarray(control), deep[2])
    both = command(photos, tmp_path / "no", "--conditions", str(given), "--condition", "canny")
    assert "--condition canny both name condition images; give one" in refused(both, capsys)


def test_padded_squares_of_img2dataset_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    padded = Image.new("RGB", (48, 48), "white")
    padded.paste(render((48, 24), 1), (0, 12))
    with ShardWriter(tmp_path / "tars") as writer:
        sky = render((48, 48), 1)
        sky.paste((90, 120, 200), (0, 0, 48, 14))  # uniform at the top only
        for image in (padded, sky, render((48, 48), 1)):
            size = {"original_width": 480, "original_height": 240}
            writer.write({"jpg": encoded(image, quality=95), "txt": "words", "json": size})
    main(command(tmp_path / "tars", tmp_path / "set"))
    assert "; 1 have uniform bands around them: download with img2dataset's resize_mode keep_ratio" in (
        capsys.readouterr().out
    )


def test_condition_images_are_made_or_given(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    for i, size in enumerate(SIZES):
        place = given / ("more" if i > 5 else ".") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(render(size, 7), "PNG"))
    main(command(photos, tmp_path / "set", "--condition", f"given:{given}"))
    found = members(tmp_path / "set")
    control = Image.open(io.BytesIO(found["000000002"]["cond.png"]))
    assert np.array_equal(np.asarray(control), np.asarray(render(SIZES[2], 7)))
    (given / "2.png").rename(given / "2.1.png")  # that of 2.1.jpg
    (given / "2.json").write_text("{}")
    (given / "3.png").write_bytes(encoded(render((8, 8), 0), "PNG"))
    (given / "4.WEBP").write_bytes((given / "4.png").read_bytes())
    main(command(photos, tmp_path / "lacking", "--condition", f"given:{given}"))
    faults = json.loads((tmp_path / "lacking" / "summary.json").read_text())["faults"]
    assert faults[0] == ["000000002", f"2.jpg: there is no condition image for it in '{given}'"]
    assert faults[1] == ["000000003", "3.jpg: the condition image is 8x8 and its image 20x20"]
    assert faults[2] == [
        "000000004",
        f"4.png: there are 2 condition images for it in '{given}': 4.WEBP, 4.png",
    ]
    wrong = command(photos, tmp_path / "no", "--condition", "hed")
    assert "--condition 'hed' is none of canny, soft_edge, sketch, depth:MODEL, given:FOLDER" in refused(
        wrong, capsys
    )
    absent = command(photos, tmp_path / "no", "--condition", "depth:nowhere")
    assert "there is no folder 'nowhere'" in refused(absent, capsys)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--quality", 90], "was started with quality 95 and this command says 90"),
        (["--resolution", 16], "was started with resolution None and this command says 16"),
        (["--samples_per_shard", 5], "was started with samples_per_shard 4"),
        (["--from", "OTHER"], "was started with source_fingerprint"),
    ],
)
def test_a_set_is_not_resumed_with_other_settings(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[object], message: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.jpg").write_bytes(encoded(render((32, 32), 0)))
    changed = [other if one == "OTHER" else one for one in changed]
    main(command(photos, tmp_path / "set"))
    before = files(tmp_path / "set")
    assert message in refused(command(photos, tmp_path / "set", *changed), capsys)
    assert files(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--crop", "centre"], "--crop centre needs --resolution, the side of the squares"),
        (["--min_caption", 9, "--max_caption", 3], "--min_caption 9 is above --max_caption 3"),
        (["--from", "nowhere"], "--from 'nowhere': There is no shard or folder 'nowhere'"),
        (["--from", "nowhere.csv"], "--from 'nowhere.csv': there is no such file"),
        (["--from", "EMPTY"], "holds neither images (.avif, .bmp, .gif,"),
        (["--condition", "given:nowhere"], "--condition 'given:nowhere': there is no folder 'nowhere'"),
    ],
)
def test_bad_inputs_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    options = [tmp_path / "empty" if one == "EMPTY" else one for one in options]
    assert message in refused(command(photos, tmp_path / "set", *options), capsys)
    assert not (tmp_path / "set").exists()


def test_a_full_disk_ends_in_one_sentence(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: ShardWriter, *_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    message = refused(command(photos, tmp_path / "set"), capsys, code=4)
    assert message.endswith(
        "could not be written to '" + str(tmp_path / "set") + "': no space left on device."
    )


def test_geometry() -> None:
    assert resize_to_cover((768, 1024), (512, 512))[:3] == ((512, 683), 0, 85)
    assert resize_to_cover((100, 100), (64, 128)) == ((128, 128), 32, 0, (64, 128))
    assert resize_shorter_side((300, 200), 100).target == (150, 100)


def test_images_of_every_mode_become_rgb() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    found = read_image(encoded(clear, "PNG"))
    assert (found.member, found.image.mode, found.image.getpixel((0, 0))) == ("png", "RGB", (255, 255, 255))
    assert read_image(encoded(Image.new("L", (4, 4), 7), "BMP")).member is None
    assert read_image(encoded(Image.new("RGB", (4, 4)), "WEBP")).member == "webp"
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        read_image(b"")


def test_a_folder_with_tars_is_read_as_shards(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write({"jpg": encoded(render((32, 32), 0)), "txt": "words"})
    source = open_source(str(tmp_path))
    assert len(source) == 1 and source.read(0).caption == "words"


def test_progress_lines_have_rate_and_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    progress = CommandProgress(4, "images")
    progress(1)
    assert capsys.readouterr().err == ""
    progress(3)
    output = capsys.readouterr().err
    assert output.startswith("images: 4 of 4, ") and output.endswith(" a second, 0 s left\n")


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("data.prepare.common.progress._SECONDS_BETWEEN_BARS", 0.0)
    progress = CommandProgress(4, "images")
    progress(1)
    progress(3)
    first, second = capsys.readouterr().err.split("\r")[1:]
    assert first.startswith(f"[{'#' * 7}{'.' * 23}] images: 1 of 4, ") and first.endswith(" s left\x1b[K")
    assert second.startswith(f"[{'#' * 30}] images: 4 of 4, ") and second.endswith(", 0 s left\x1b[K\n")


def test_folders_of_several_kinds_and_an_output_in_the_source_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of tars beside images only the tars would be read, without a word of the others."""
    mixed = tmp_path / "mixed"
    main(command(photos, mixed))
    (mixed / "new.png").write_bytes(encoded(render((40, 30), 1), "PNG"))
    assert f"--from '{mixed}' holds tars and images; give a folder of one kind" in refused(
        command(mixed, tmp_path / "out"), capsys
    )
    assert f"--out is '{photos}', the folder of --from" in refused(command(photos, photos), capsys)
    assert not list(photos.glob("*.tar")) and not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out '/dev/null/x' cannot be written" in refused(command(photos, Path("/dev/null/x")), capsys, 4)
