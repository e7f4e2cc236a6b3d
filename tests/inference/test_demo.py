"""The demo without a browser: the newest input wins, what the pages call, what it refuses. In a browser: tests/browser."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.conditions import Canny
from data.toy.training.style_classifier import STYLES, StyleClassifier
from data.toy.world import captions, image_at
from evaluation.images.samples import load_pipeline
from evaluation.metrics.control_adherence import EdgeAdherence
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.demo.__main__ import DemoOptions
from sdxs_lightning.demo.serve import condition_named, studio
from sdxs_lightning.demo.studio import Made, NewestWins, Studio, stock_base, strokes, uploaded
from sdxs_lightning.inference.generator import OneStepGenerator
from tests.helpers.students import PROMPTS, condition
from tests.helpers.tiny import save_tiny_sdxl
from tests.helpers.tiny_run import ROOT

Students = Callable[[str], Path]


def test_the_newest_input_wins_and_visitors_take_turns() -> None:
    newest, begun, go_on = NewestWins(), threading.Event(), threading.Event()
    done: list[str] = []
    results: dict[str, str | None] = {}

    def work(name: str) -> str:
        if name == "a1":
            begun.set()
            assert go_on.wait(10)
        done.append(name)
        return name

    def ask(visitor: str, name: str) -> None:
        results[name] = newest.run(visitor, lambda: work(name))

    first = threading.Thread(target=ask, args=("a", "a1"))
    first.start()
    assert begun.wait(10)
    threads = []
    for visitor, name in (("b", "b1"), ("a", "a2"), ("c", "c1"), ("b", "b2"), ("a", "a3"), ("a", "a4")):
        before = newest._line.get(visitor)
        threads.append(threading.Thread(target=ask, args=(visitor, name)))
        threads[-1].start()
        while newest._line.get(visitor) is before:
            pass
    go_on.set()
    for thread in (first, *threads):
        thread.join(10)
    # What is in progress ends, of what waited only the newest of each visitor is done, in the order of the visitors.
    assert done == ["a1", "b2", "a4", "c1"]
    assert results == {
        one: one if one in done else None for one in ("a1", "a2", "b1", "a3", "a4", "b2", "c1")
    }
    with pytest.raises(ZeroDivisionError):
        newest.run("a", lambda: 1 / 0)
    assert newest.run("b", lambda: "after an error") == "after an error"


class Base:
    """Stands in for a base: takes its time until it is told to end."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, prompt: str, seed: int) -> Image.Image:
        self.begun.set()
        assert self.go_on.wait(60)
        return Image.new("RGB", (32, 32))


def test_the_bases_many_steps_do_not_stop_live_images(student: Students) -> None:
    base = Base()
    room = Studio(OneStepGenerator.load(student("sd"), device="cpu"), base=base)
    drawing = threading.Thread(target=room.by_base, args=("a/base", PROMPTS[0], 0))
    drawing.start()
    assert base.begun.wait(10)
    made: list[object] = []
    live = threading.Thread(target=lambda: made.append(room.text("b/text", PROMPTS[0], 0, 1)))
    live.start()
    live.join(20)
    still = drawing.is_alive()
    base.go_on.set()
    drawing.join(10)
    assert still and made and made[0] is not None


def test_a_base_with_half_precision_files_only(tmp_path: Path) -> None:
    """SDXL repositories often have nothing else."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(save_tiny_sdxl(tmp_path / "whole"))
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half").rglob("diffusion_pytorch_model.safetensors"))
    draw = stock_base(str(tmp_path / "half"), 1, 1.0, torch.device("cpu"), torch.float32)
    assert draw(PROMPTS[0], 0).size == (32, 32)
    assert load_pipeline(tmp_path / "half").unet.dtype == torch.float32  # as evaluate does


def test_what_a_page_sends_is_cut(student: Students) -> None:
    """A browser's limits do not bind who calls without one."""
    gradio = pytest.importorskip("gradio")
    from sdxs_lightning.demo import page

    seen: list[object] = []

    def make(visitor: str, *given: object) -> Made:
        seen.extend(given)
        return Made([Image.new("RGB", (8, 8))], 1.0)

    request = gradio.Request(session_hash="s")
    page._handler(make, "text")(request, "a" * 10_000, 1)
    page._handler(make, "sketch", drawing_first=True)(request, "d" * 10_000, "b" * 10_000)
    assert seen == ["a" * 400, 1, "d" * 10_000, "b" * 400]
    with page.build(Studio(OneStepGenerator.load(student("sd"), device="cpu"))) as built:
        images = [block for block in built.blocks.values() if isinstance(block, gradio.Image)]
        shown = [block.value for block in built.blocks.values() if isinstance(block, gradio.Markdown)]
    assert [(one.type, one.image_mode) for one in images] == [("pil", None)] * 2
    assert page.NEEDS_CONTROLNET in shown and page.NEEDS_LORA in shown
    for config in re.findall(r"configs/\S+?\.yaml", page.NEEDS_CONTROLNET + page.NEEDS_LORA):
        assert (ROOT / config).is_file()
    public = [
        one.api_name for one in built.fns.values() if one.api_visibility != "private" and one.fn is not None
    ]
    assert not [name for name in public if str(name).startswith("handle")], public


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def test_pages_show_the_generators_images(student: Students) -> None:
    folder = student("sd")
    made = OneStepGenerator.load(
        folder, controlnet=f"{folder}-controlnet", lora=f"{folder}-lora", device="cpu"
    )
    plain = OneStepGenerator.load(folder, controlnet=f"{folder}-controlnet", device="cpu")
    room = Studio(made, condition_named("canny"), has_lora=True)
    text = room.text("v", PROMPTS[0], 4, 2)
    assert text is not None and text.seconds > 0 and len(text.images) == 2
    assert torch.equal(
        torch.stack([pixels(one) for one in text.images]), plain.generate([PROMPTS[0]] * 2, [4, 5])
    )
    styled = room.styled("v", PROMPTS[0], 4, 1.0)
    assert styled is not None and not torch.equal(pixels(styled.images[0]), pixels(text.images[0]))
    again = room.text("v", PROMPTS[0], 4, 1)  # the style of one page is not in the others
    assert again is not None and torch.equal(pixels(again.images[0]), pixels(text.images[0]))
    drawing = np.zeros((64, 64, 4), np.uint8)
    drawing[20:40, 30:34] = (0, 0, 0, 255)
    sketch = room.sketch("v", PROMPTS[0], 4, drawing, 1.0)
    assert sketch is not None
    lines = sketch.inputs[0]
    assert lines.size == (32, 32) and pixels(lines).float().mean() < 20 and pixels(lines).max() > 200
    expected = plain.generate(PROMPTS[0], 4, control_images=lines)
    assert torch.equal(pixels(sketch.images[0]), expected[0])
    photo = Image.fromarray(condition(1, (48, 64))[0].permute(1, 2, 0).numpy())
    near = room.image("v", PROMPTS[0], 4, photo, 0.5, False, 1.0)
    along = room.image("v", PROMPTS[0], 4, photo, 0.5, True, 1.0)
    assert near is not None and along is not None and along.inputs[0].size == (32, 32)


def test_strokes_are_white_on_black() -> None:
    paper = np.full((4, 4, 3), 255, np.uint8)
    paper[1] = 0
    assert strokes(paper)[1].min() == 255 and strokes(paper)[0].max() == 0
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[2, :, 3] = 255
    assert strokes(clear)[2].min() == 255 and strokes(clear)[0].max() == 0


def test_the_shipped_student_is_the_default() -> None:
    room = studio(DemoOptions(base_steps=1, device="cpu"))
    made = room.text("v", "a red circle", 0, 1)
    assert made is not None and made.images[0].size == (32, 32)
    base = room.by_base("v", "a red circle", 0)
    assert base is not None and base.images[0].size == (32, 32)
    new = [
        file.stat().st_size
        for file in (ROOT / "data" / "toy" / "student").rglob("*")
        if file.is_file()
        and not _same(
            file, ROOT / "data" / "toy" / "base" / file.relative_to(ROOT / "data" / "toy" / "student")
        )
    ]
    assert sum(new) <= 6_000_000


def test_the_shipped_controlnet_follows_edges() -> None:
    """`data/toy/controlnet`, which the demo takes by itself: 24 held-out images' edges with other images' noise."""
    room = studio(DemoOptions(base_steps=1))
    assert room.generator.networks.has_control and isinstance(room.condition, Canny)
    prompts = captions("val", 24)
    controls = torch.stack([pixels(Image.fromarray(Canny()(image_at("val", index)))) for index in range(24)])
    found = {}
    for scale in (0.0, 0.5, 1.0):
        metric = EdgeAdherence(Canny(), tolerance_px=1)
        images = room.generator.generate(prompts, 0, control_images=controls, control_scale=scale)
        metric.update_with(images, controls, list(range(24)))
        found[scale] = metric.estimate()["edge_f1"].value
    assert found[0.0] < 0.8 and found[0.5] > 0.93 and found[1.0] > 0.97
    assert torch.equal(
        room.generator.generate(prompts, 0, control_images=controls, control_scale=0.0),
        OneStepGenerator.load(ROOT / "data" / "toy" / "student", device="cpu").generate(prompts, 0),
    )
    folder = ROOT / "data" / "toy" / "controlnet"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3_000_000


def test_the_shipped_lora_brings_its_style() -> None:
    """`data/toy/lora`, which the demo takes by itself: at scale 1 the texture, at 0 the plain student's images to the bit."""
    room = studio(DemoOptions(base_steps=1))
    assert room.has_lora
    prompts, judge = captions("val", 48), StyleClassifier.from_pretrained(ROOT / "data" / "toy" / "style")
    shares, images = {}, {}
    for scale in (0.0, 1.0):
        room.generator.set_lora_scale(scale)
        images[scale] = room.generator.generate(prompts, 0)
        shares[scale] = float((judge.predict(images[scale]) == STYLES.index("textured")).float().mean())
    assert shares[0.0] == 0.0 and shares[1.0] >= 0.9
    plain = OneStepGenerator.load(ROOT / "data" / "toy" / "student", device="cpu")
    assert torch.equal(images[0.0], plain.generate(prompts, 0))
    assert sum(file.stat().st_size for file in (ROOT / "data" / "toy" / "lora").iterdir()) <= 1_000_000


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and other.read_bytes() == file.read_bytes()


def test_an_uploaded_image_is_read_as_it_looks(tmp_path: Path) -> None:
    """As its RGB twin."""
    gradio = pytest.importorskip("gradio")
    from sdxs_lightning.demo import page

    values = np.random.default_rng(0).integers(0, 256, (40, 32), dtype=np.uint8)
    grey = Image.fromarray(values)
    clear, white = Image.new("RGBA", (32, 40), (255, 0, 0, 0)), Image.new("L", (32, 40), 255)
    deep = Image.fromarray(values.astype(np.uint16) * 257)
    field = gradio.Image(**page.UPLOADED)
    for name, sent, twin in (
        ("a.gif", grey.convert("P"), grey),
        ("b.png", clear, white),
        ("c.png", deep, grey),
    ):
        sent.save(tmp_path / name)
        payload = gradio.data_classes.ImageData(path=str(tmp_path / name), orig_name=name)
        found = uploaded(field.preprocess(payload), (40, 32))
        assert torch.equal(pixels(found), pixels(twin.convert("RGB"))), name


def test_a_line_of_pixels_is_cut_before_it_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled first, 1 x 16 million pixels that a visitor uploads would become 32 x 512 million."""
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda image, size, *given, **named: sizes.append(size) or resize(image, size, *given, **named),  # type: ignore[func-returns-value]
    )
    assert uploaded(Image.new("RGB", (1, 10_000), "red"), (32, 48)).size == (48, 32)
    assert sizes == [(48, 32)]


def test_what_the_demo_refuses(student: Students) -> None:
    room = Studio(OneStepGenerator.load(student("sd"), device="cpu"))
    photo = Image.new("RGB", (32, 32))
    with pytest.raises(UserError, match="start it with --controlnet"):
        room.image("v", "a", 0, photo, 0.5, True, 1.0)
    with pytest.raises(UserError, match="start it with --base"):
        room.by_base("v", "a", 0)
    with pytest.raises(UserError, match="5000x4000 pixels; up to 16 million are accepted"):
        room.image("v", "a", 0, Image.new("RGB", (5000, 4000)), 0.5, False, 1.0)
    with pytest.raises(
        UserError, match=r"the image cannot be used: its pixels are 32-bit numbers \(mode F\)"
    ):
        room.image("v", "a", 0, Image.new("F", (32, 32)), 0.5, False, 1.0)
    for empty in (
        lambda: room.text("v", "a", None, 1),
        lambda: room.image("v", "a", None, photo, 0.5, False, 1),
    ):
        with pytest.raises(UserError, match="Give a seed, a whole number"):
            empty()
    with pytest.raises(UserError, match="--condition 'edges' is none of canny, sketch, soft_edge, depth"):
        condition_named("edges")
    with pytest.raises(UserError, match="there is no model in 'nowhere'"):
        studio(DemoOptions(model="nowhere"))
