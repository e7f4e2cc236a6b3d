"""The toy world: captions and images are pure functions of split and index, and a caption states what its image shows."""

from __future__ import annotations

import hashlib
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import pytest

from data.toy.attributes import CLASSES, NOT_STATED, attributes_of
from data.toy.background_bar import BackgroundBar, background_bar
from data.toy.datamodule import ToyDataModule
from data.toy.rendered import RenderedSplit, render_batch
from data.toy.tokenizer import build_tokenizer, words
from data.toy.world import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    Style,
    Thing,
    caption_of,
    captions,
    image_at,
    parse_caption,
    render,
    scene_at,
)


def test_images_and_captions_are_functions_of_split_and_index() -> None:
    digest = hashlib.sha256(b"".join(image_at("train", index).tobytes() for index in range(50))).hexdigest()
    again = hashlib.sha256(b"".join(image_at("train", index).tobytes() for index in range(50))).hexdigest()
    assert digest == again
    assert captions("train", 3) == [
        "a red ring above a green ring",
        "an orange square left of a pink square",
        "a pink ring below a yellow triangle",
    ]
    assert captions("test", 2, start=1) == captions("test", 3)[1:]
    assert captions("train", 50) != captions("test", 50) != captions("val", 50)


def test_every_caption_parses_back_to_itself() -> None:
    stated = captions("train", 3000)
    assert [caption_of(parse_caption(caption)) for caption in stated] == stated
    singles = [caption for caption in stated if caption.endswith("background")]
    assert 0.45 < len(singles) / len(stated) < 0.55


def test_all_values_occur() -> None:
    scenes = [scene_at("train", index) for index in range(3000)]
    assert {scene.first.shape for scene in scenes} == set(SHAPES)
    assert {scene.first.colour for scene in scenes} == set(COLOURS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.relation for scene in scenes} - {None} == set(RELATIONS)
    assert all(scene.first != scene.second for scene in scenes)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog",
        "a small red dog on a gray background",
        "a red ring beside a blue ring",
        "a orange ring above a red ring",
    ],
)
def test_unknown_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the toy world"):
        parse_caption(caption)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"splits \['train', 'val', 'test'\], not 'dev'"):
        scene_at("dev", 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_relation_determines_positions(relation: str) -> None:
    scene = Scene(
        Thing("red", "circle"), relation=relation, second=Thing("blue", "circle"), background="black"
    )
    image = render(scene, np.random.default_rng(0)).astype(float)
    redness, blueness = image[..., 0] - image[..., 2], image[..., 2] - image[..., 0]
    red, blue = _centre(redness > 80), _centre(blueness > 80)
    offset = blue - red
    expected = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}[relation]
    assert offset @ np.array(expected) > 12


def test_sizes_differ_in_area() -> None:
    def area(size: str) -> int:
        scene = Scene(Thing("red", "circle"), size=size, background="black")
        image = render(scene, np.random.default_rng(1)).astype(float)
        return int((image[..., 0] > 120).sum())

    assert area("large") > 2.2 * area("small")


def test_attributes_are_ordered_by_position() -> None:
    above, below = (
        parse_caption("a red ring above a blue cross"),
        parse_caption("a blue cross below a red ring"),
    )
    assert attributes_of(above) == attributes_of(below)
    names = [
        None if index == NOT_STATED else values[index]
        for values, index in zip(CLASSES.values(), attributes_of(above), strict=True)
    ]
    assert names == ["vertical", None, None, "red", "ring", "blue", "cross"]


@pytest.mark.parametrize(("style", "least", "most"), [("textured", 0.4, 1.0), ("outlined", 0.01, 0.5)])
def test_a_style_changes_how_a_scene_is_drawn_and_not_where(style: Style, least: float, most: float) -> None:
    index = next(
        i
        for i in range(99)
        if scene_at("test", i).size == "large" and scene_at("test", i).background == "white"
    )
    plain, styled = image_at("test", index).astype(int), image_at("test", index, style).astype(int)
    changed = (plain != styled).any(axis=-1)
    assert least < changed.mean() < most
    colour = np.array(COLOURS[scene_at("test", index).first.colour])
    body = np.abs(plain - colour).max(axis=-1) < 25
    assert body.sum() > 50 and not changed[body].any()
    for name in BACKGROUNDS:  # it is visible on each
        scene = Scene(first=Thing("red", "square"), size="large", background=name)
        images = [render(scene, np.random.default_rng(0), one).astype(int) for one in (None, style)]
        assert np.abs(images[0] - images[1]).max() >= 8, name


def test_images_of_several_styles_take_turns() -> None:
    split = RenderedSplit("val", 4, (None, "textured"))
    assert split.styles.tolist() == [0, 1, 0, 1]
    assert bool((split.images_uint8[::2] == render_batch("val", 4)[::2]).all())
    assert bool((split.images_uint8[1::2] == render_batch("val", 4, 0, ["textured"])[1::2]).all())
    with pytest.raises(ValueError, match="has the styles"):
        image_at("val", 0, "cubist")  # type: ignore[arg-type]


def test_the_tokenizer_has_one_token_per_word_and_ends_with_the_highest_id() -> None:
    tokenizer = build_tokenizer()
    for word in words():
        assert len(tokenizer(word).input_ids) == 3, word
    ids = tokenizer("a small red circle on a gray background", padding="max_length").input_ids
    assert len(ids) == 16
    assert ids.index(max(ids)) == 9
    assert ids[9:] == [tokenizer.eos_token_id] * 7
    assert tokenizer.decode(ids[1:9]).split() == "a small red circle on a gray background".split()


def test_the_tokenizer_is_the_same_in_every_call() -> None:
    first, second = build_tokenizer(), build_tokenizer()
    assert first.get_vocab() == second.get_vocab() and sorted(first.get_vocab().values()) == list(
        range(len(first))
    )
    assert [first.convert_ids_to_tokens(i) for i in (0, len(first) - 1)] == ["a", "<|endoftext|>"]


def _centre(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def test_of_runs_that_start_together_one_writes_the_shards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert diffusers.AutoencoderKL  # its lazy import is not for threads
    runs = [ToyDataModule(train_images=300, cache=str(tmp_path), batch_size=6) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(ToyDataModule.prepare_data, runs))
    [shard] = runs[0].folder.glob("*.tar")
    with tarfile.open(shard) as tar:
        assert len(tar.getnames()) == 600  # of each sample the latent and the caption
    assert caplog.messages.count(f"Waiting for another run to write '{runs[0].folder}'.") == 2


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"/file/shards' \(Not a directory\); change data.init_args.cache"):
        ToyDataModule(train_images=3, cache=str(tmp_path / "file" / "shards")).prepare_data()


def test_bars_state_the_background_of_each_image(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i in range(40):
            state = background_bar(scene_at(split, i).background or "")
            assert np.array_equal(BackgroundBar()(image_at(split, i)), state)
    lengths = [int((background_bar(name)[16, :, 0] > 0).sum()) for name in BACKGROUNDS]
    assert lengths == [6, 12, 18, 24, 30]
    data = ToyDataModule(train_images=6, cache=str(tmp_path), batch_size=6, condition=BackgroundBar())
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    assert batch.latents is not None and batch.control_images is not None
    positions = [int(name.rpartition("/")[2]) for name in batch.sample_ids]
    bars = np.stack([background_bar(scene_at("train", i).background or "") for i in positions])
    assert np.array_equal(batch.control_images.permute(0, 2, 3, 1).numpy() * 255, bars)
