"""Which caption belongs to which image, and which prompts a file has: the right ones, or a refusal."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from evaluation.images.image_sets import open_images
from evaluation.images.prompt_files import read_prompts
from evaluation.images.prompt_list import PromptList
from sdxs_lightning.core.errors import UserError
from tests.helpers.evaluated_images import (
    COUNT,
    WORDS,
    Run,
    captions,
    direct_clip_score,
)

# Which caption belongs to which image.


def test_numbered_images_are_in_the_order_of_their_numbers(
    run: Run, images: Path, tmp_path: Path, world: Path
) -> None:
    assert open_images(str(images)).names == [f"{i}.png" for i in range(COUNT)]
    result = run(
        "--images", images, "--metrics", "clip_score", "--captions", captions(tmp_path / "a.txt", WORDS)
    )
    expected = direct_clip_score(world, images, [f"{i}.png" for i in range(COUNT)], WORDS)
    assert result["clip_score"] == pytest.approx(expected, rel=1e-5)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in images.iterdir():
            archive.write(path, path.name)
    zipped = open_images(str(tmp_path / "a.zip"))
    assert zipped.names == open_images(str(images)).names
    assert zipped.digest() == open_images(str(images)).digest()


def test_names_match_by_relative_path_first_and_never_by_chance() -> None:
    table = PromptList(("of x", "of y", "of z"), ("x/0.jpg", "y/0.jpg", "z.jpg"))
    assert table.of_images(["y/0.png", "x/0.png"], "f") == ["of y", "of x"]
    assert table.of_images(["deep/z.png"], "f") == ["of z"]
    with pytest.raises(UserError, match=r"'f' has 2 captions for 'w/0\.png' \(rows 1 and 2\)"):
        table.of_images(["w/0.png"], "f")
    with pytest.raises(UserError, match="several images are called 'z.jpg'"):
        table.of_images(["a/z.png", "b/z.png"], "f")
    with pytest.raises(
        UserError, match=r"none of the names in 'f' \(the first is 'x/0.jpg'\) is that of an image"
    ):
        table.of_images(["p.png", "q.png", "r.png"], "f")
    with pytest.raises(UserError, match="no caption for 1 of 2 images, the first of them 'q.png'"):
        table.of_images(["x/0.png", "q.png"], "f")
    twice = PromptList(("one", "two"), ("a.png", "a.png"))
    with pytest.raises(UserError, match="has 2 captions for 'a.png'"):
        twice.of_images(["a.png"], "f")
    dotted = PromptList(("one", "two"), ("v1.5", "v1.6"))
    assert dotted.of_images(["v1.6.png", "v1.5.png"], "f") == ["two", "one"]


@pytest.mark.parametrize("column", ["path", "id", "img", "Image Name", "Unnamed: 0"])
def test_a_column_that_names_the_images_in_another_order_is_not_passed_over(
    column: str, tmp_path: Path
) -> None:
    rows = {"2.jpg": "two", "a/0.jpg": "zero", "1.jpg": "one"}
    table = tmp_path / "a.csv"

    def write(cells: dict[str, str]) -> PromptList:
        lines = [
            f"{name.removesuffix('.jpg') if column == 'id' else name},{text}" for name, text in cells.items()
        ]
        table.write_text("\n".join([f"{column},caption", *lines]))
        return read_prompts(table)

    names = ["0.png", "1.png", "2.png"]
    with pytest.raises(
        UserError, match=f"the column '{column}' of 'f' has the images' names in another order"
    ):
        write(rows).of_images(names, "f")
    # In their order it does no harm, nor do small counts that are numbers of images too.
    assert write({"0.jpg": "zero", "1.jpg": "one", "2.jpg": "two"}).of_images(names, "f") == [
        "zero",
        "one",
        "two",
    ]
    counted = PromptList(("a", "b", "c"), records=tuple({"count": count} for count in (1, 1, 1)))
    assert counted.of_images(names, "f") == ["a", "b", "c"]


def test_names_of_other_types_are_text_or_refused(tmp_path: Path) -> None:
    names = ["0.png", "1.png"]
    held = [
        {"image": {"bytes": "x", "path": "1.png"}, "text": "one"},
        {"image": {"path": "0.png"}, "text": "zero"},
    ]
    (tmp_path / "held.json").write_text(json.dumps(held))
    assert read_prompts(tmp_path / "held.json").of_images(names, "f") == ["zero", "one"]
    for value in (1.0, True):  # what pandas makes of ids with a gap
        (tmp_path / "ids.json").write_text(
            json.dumps([{"image_id": value, "text": "a"}, {"image_id": 0, "text": "b"}])
        )
        with pytest.raises(UserError, match=f"a image_id is {value}, but must be a string or a whole number"):
            read_prompts(tmp_path / "ids.json")


def test_images_of_coco_match_by_id_or_by_count() -> None:
    names = tuple(f"COCO_val2014_{i:012d}.jpg" for i in (9, 25, 42))
    coco = PromptList(("nine", "twenty-five", "forty-two"), names, "coco")
    assert coco.of_images(["42.png", "000000000009.png"], "f") == ["forty-two", "nine"]
    assert coco.of_images(["0.png", "1.png", "2.png"], "f") == list(coco.captions)
    assert coco.of_images(["00.png", "01.png"], "f") == list(coco.selection(2, "f").captions)
    with pytest.raises(UserError, match="none of the names"):
        coco.of_images(["a.png", "b.png", "c.png"], "f")


def test_an_empty_line_between_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without words .number 2."):
        read_prompts(captions(tmp_path / "a.txt", ["a", "", "b"]))
    assert read_prompts(captions(tmp_path / "b.txt", ["a\u2028b", "c", "", ""])).captions == ("a\u2028b", "c")
    (tmp_path / "c.csv").write_text("caption,style\na dog, sitting,x\n")
    with pytest.raises(UserError, match="row 2 has 3 cells, the header 2"):
        read_prompts(tmp_path / "c.csv")


def test_captions_beside_images_have_words_and_one_image_each(images: Path) -> None:
    for number, words in enumerate(WORDS):
        (images / f"{number}.txt").write_text(words)
    assert open_images(str(images)).captions() == WORDS
    (images / "3.txt").write_text(" \n")
    with pytest.raises(UserError, match="3.txt' has no words"):
        open_images(str(images)).captions()
    (images / "3.txt").write_text("x")
    shutil.copy(images / "3.png", images / "3.bmp")
    with pytest.raises(UserError, match="two images have the caption file"):
        open_images(str(images)).captions()


# The usual prompt sets, as they are published.


def test_the_usual_prompt_sets_are_read(tmp_path: Path) -> None:
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text(
        'Prompt\tCategory\tChallenge\tNote\n"hello" in red ink\tWorld Knowledge\tBasic\t\n"a ""b"""\tArts\tBasic\tx\n'
    )
    found = read_prompts(parti)
    assert found.captions == ('"hello" in red ink', 'a "b"')
    assert found.categories == ("World Knowledge", "Arts")

    mjhq = tmp_path / "meta_data.json"
    mjhq.write_text(
        json.dumps(
            {
                "ab12": {"category": "animals", "prompt": "a cat"},
                "cd34": {"category": "art", "prompt": "a dog"},
            }
        )
    )
    found = read_prompts(mjhq)
    assert (found.captions, found.categories, found.names) == (
        ("a cat", "a dog"),
        ("animals", "art"),
        ("ab12", "cd34"),
    )
    assert found.of_images(["art/cd34.png", "animals/ab12.png"], "f") == ["a dog", "a cat"]

    geneval = tmp_path / "evaluation_metadata.jsonl"
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    ]
    geneval.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(geneval)
    assert (found.captions, found.categories) == (("a photo of a bench",), ("single_object",))
    assert found.records == tuple(rows)

    drawbench = tmp_path / "DrawBench.csv"
    drawbench.write_text('Prompts,Category\nA red car.,Colors\n"Two dogs, running.",Counting\n')
    assert read_prompts(drawbench).captions == ("A red car.", "Two dogs, running.")

    (tmp_path / "anime.json").write_text(json.dumps(["a girl", "a boy"]))
    (tmp_path / "benchmark.json").write_text(json.dumps({"anime": ["a girl"], "photo": ["a boy", "a hat"]}))
    (tmp_path / "test.json").write_text(
        json.dumps([{"prompt": "a girl", "image_path": ["0.jpg", "1.jpg"], "rank": [0, 1]}])
    )
    assert read_prompts(tmp_path / "anime.json").captions == ("a girl", "a boy")
    found = read_prompts(tmp_path / "benchmark.json")
    assert (found.captions, found.categories) == (("a girl", "a boy", "a hat"), ("anime", "photo", "photo"))
    assert read_prompts(tmp_path / "test.json").names is None


def test_categories_have_numbers_of_their_own(run: Run, images: Path, tmp_path: Path, world: Path) -> None:
    table = tmp_path / "a.csv"
    lines = [f"{i}.png,{words},{'odd' if i % 2 else 'even'}" for i, words in enumerate(WORDS)]
    table.write_text("\n".join(["file_name,caption,category", *lines]))
    entry = run("--images", images, "--metrics", "clip_score", "--captions", table)["metrics"]["clip_score"]
    odd = [number for number in range(COUNT) if number % 2]
    expected = direct_clip_score(world, images, [f"{i}.png" for i in odd], [WORDS[i] for i in odd])
    assert entry["categories"]["odd"]["value"] == pytest.approx(expected, rel=1e-5)
    assert {name: one["samples"] for name, one in entry["categories"].items()} == {"even": 6, "odd": 6}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.json", [{"caption": ["a dog", "a hound"]}], "a caption is ['a dog', 'a hound'], but must be a string"),
        ("a.json", [{"caption": {"en": "a dog"}}], "a caption is {'en': 'a dog'}, but must be a string"),
        ("a.jsonl", {"prompt": 5}, "a caption is 5, but must be a string"),
        ("a.txt", "a dog\na\0cat\n", "holds zero characters in caption number 2"),
        ("a.json", '{"k1": {"prompt": "a"}, "k1": {"prompt": "b"}}', "an object has the key 'k1' twice"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "an object has the key 'prompt' twice"),
        ("a.json", ["a dog", "a \ud800 cat"], "has half of a surrogate pair in caption number 2"),
        ("a.json", [{"file_name": None, "caption": "a"}, {"file_name": "1", "caption": "b"}], "1 of 2 rows have no file_name"),
        ("a.csv", "caption,Caption\na,b\n", "two columns are called caption"),
        ("a.csv", "file_name,file_name,caption\n0.png,1.png,a\n", "two columns are called file_name"),
        ("a.json", {"images": [{"id": 1, "file_name": "1.jpg"}],
                    "annotations": [{"id": 1, "image_id": 1, "caption": None}]}, "has a caption without words (number 1)"),
        ("a.json", {"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 1, "file_name": "2.jpg"}],
                    "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}, "two images have the id 1: 1.jpg and 2.jpg"),
        ("a.json", {"images": [{"id": 1, "file_name": "1.jpg"}],
                    "annotations": [{"id": 1, "image_id": 1.5, "caption": "a"}]}, "an id is 1.5, but must be a whole number"),
    ],
)  # fmt: skip
def test_a_caption_that_nobody_wrote_is_refused(
    tmp_path: Path, file: str, content: Any, message: str
) -> None:
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as refused:
        read_prompts(tmp_path / file)
    assert message in str(refused.value)


def test_hidden_files_are_no_prompts(tmp_path: Path) -> None:
    """macOS writes ._0.txt beside 0.txt on disks that are not its own."""
    (tmp_path / "0.txt").write_text("a dog")
    (tmp_path / "._0.txt").write_bytes(b"\0\5\x16\7\xff")
    assert read_prompts(tmp_path).captions == ("a dog",)
    (tmp_path / "1.TXT").write_text("a cat")
    assert read_prompts(tmp_path).captions == ("a dog", "a cat")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "2.txt").write_text("a cow")
    with pytest.raises(UserError, match=r"more/2\.txt' is in a folder below"):
        read_prompts(tmp_path)
