"""Tables, linked folders and links take no file from outside the folder that was given."""

from __future__ import annotations

import csv
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare.images.sources import FolderSource, open_source
from data.shards.images import UndecodableImageError, decode_pil, decode_pixels
from evaluation.images.image_sets import open_images
from evaluation.images.prompt_files import read_prompts
from sdxs_lightning.core.errors import UserError


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, path.suffix[1:].replace("jfif", "jpeg"))
    return path


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with one image and its caption; `secret/` beside it has a file of each kind."""
    image(tmp_path / "secret" / "s.png")
    (tmp_path / "secret" / "s.txt").write_text("a secret")
    image(tmp_path / "given" / "a.png")
    (tmp_path / "given" / "a.txt").write_text("a square")
    return tmp_path / "given"


def read_all(folder: Path) -> None:
    source = FolderSource(folder)
    for index in range(len(source)):
        source.read(index)


@pytest.mark.parametrize("path", ["../secret/s.png", "{absolute}", "link.png", "sub/s.png"])
def test_a_table_takes_nothing_from_outside(path: str, given: Path) -> None:
    (given / "link.png").symlink_to("../secret/s.png")
    (given / "sub").symlink_to("../secret")
    path = path.format(absolute=given.parent / "secret" / "s.png")
    with (given / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], ["a.png", "a square"], [path, "a circle"]])
    source = open_source(str(given / "table.csv"))
    assert source.read(0).caption == "a square"
    with pytest.raises(UserError, match=r"table\.csv, row 1: .* is outside the folder .*--image_folder"):
        source.read(1)
    named = open_source(str(given / "table.csv"), image_folder=given.parent)
    if path.startswith("/"):
        assert named.read(1).image == (given.parent / "secret" / "s.png").read_bytes()


@pytest.mark.parametrize("name", ["b.png", "a.json", "b.txt"])
def test_a_folder_takes_nothing_from_outside_by_a_link(name: str, given: Path) -> None:
    if name == "b.txt":
        image(given / "b.png")
    (given / name).symlink_to(f"../secret/s{Path(name).suffix}")
    with pytest.raises(UserError, match=f"{name}' is a link to a file outside"):
        read_all(given)
    if name == "b.png":
        with pytest.raises(UserError, match="is a link to a file outside"):
            open_images(str(given))


def test_a_link_inside_the_folder_is_a_file_of_it(given: Path) -> None:
    (given / "b.png").symlink_to("a.png")
    assert len(FolderSource(given)) == len(open_images(str(given)).names) == 2


def test_a_linked_folder_and_other_formats_are_not_left_out_silently(given: Path) -> None:
    image(given / "b.jfif")
    assert len(FolderSource(given)) == 2
    (given / "c.heic").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"1 images of formats that are not read, the first of them .*c\.heic"
    ):
        FolderSource(given)
    os.remove(given / "c.heic")
    (given / "sub").symlink_to("../secret")
    with pytest.raises(UserError, match="sub' is a link to a folder"):
        FolderSource(given)


def test_a_member_that_unpacks_to_more_than_an_image_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set.zip"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.bmp")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "a.bmp", "a.bmp")
    assert open_images(str(path)).read(0).size == (64, 64)
    monkeypatch.setattr(
        "evaluation.images.image_sets.MAX_IMAGE_BYTES", 10_000
    )  # the file has 12 kB, packed 50 bytes
    with pytest.raises(
        UserError, match=r"a\.bmp': cannot be read \(it unpacks to 12,342 bytes, more than 10,000\)"
    ):
        open_images(str(path)).read(0)


@pytest.mark.parametrize(
    ("limit", "message"), [("MAX_IMAGE_BYTES", "its file has"), ("MAX_PIXELS", "it has 64 x 64 pixels")]
)
def test_an_image_above_the_limits_is_not_decoded(
    limit: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    assert decode_pixels(content).shape == (64, 64, 3)
    monkeypatch.setattr(f"data.shards.images.{limit}", 1000)
    for decode in (decode_pixels, decode_pil):
        with pytest.raises(UndecodableImageError, match=f"{message}.* more than 1,000"):
            decode(content)


def test_prompts_of_a_folder_are_its_own(given: Path) -> None:
    assert read_prompts(given).captions == ("a square",)
    (given / "b.txt").symlink_to("../secret/s.txt")
    with pytest.raises(UserError, match=r"b\.txt' is a link to a file outside"):
        read_prompts(given)
