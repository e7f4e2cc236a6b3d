"""The demo in a real browser: what a visitor does, and the picture on the page that comes of it.

    uv run --group browser pytest -m browser -n0 tests/browser

With SCREENSHOTS=DIR in the environment each test leaves an image of its page there.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxs_lightning.demo.__main__ import DemoOptions
from tests.helpers.students import random_controlnet, random_lora
from tests.helpers.tiny_run import ROOT

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 60_000
"""Patience with a loaded machine, milliseconds."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A ControlNet and a LoRA of random weights for the shipped student."""
    from diffusers import UNet2DConditionModel

    from sdxs_lightning.families.weights import load_network
    from sdxs_lightning.networks.controlnet import save_controlnet
    from sdxs_lightning.networks.lora_files import write_lora

    root = tmp_path_factory.mktemp("adapters")
    unet = load_network(UNet2DConditionModel, ROOT / "data" / "toy" / "student" / "unet")
    save_controlnet(random_controlnet(unet), root / "controlnet", torch.float32)
    (root / "lora").mkdir()
    write_lora(root / "lora", random_lora(unet), dtype=torch.float32)
    return str(root / "controlnet"), str(root / "lora")


@pytest.fixture(scope="module")
def demo(adapters: tuple[str, str]) -> Iterator[str]:
    """Address of a demo of the shipped student."""
    from sdxs_lightning.demo.serve import launch

    controlnet, lora = adapters
    app = launch(DemoOptions(port=0, controlnet=controlnet, lora=lora, base_steps=2, max_upload_mb=1.0))
    yield app.local_url
    app.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "install chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"],
        )
        yield chromium
        chromium.close()


class Visitor:
    """A page of the demo, and what its console and its network say."""

    def __init__(self, browser: Any, address: str, name: str, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, permissions=["camera"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.name = name
        self.errors: list[str] = []
        self.page.on("console", lambda one: self.errors.append(one.text) if one.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.hosts: set[str] = set()
        self.page.on("request", lambda one: self.hosts.add(one.url.split("/")[2] if "//" in one.url else ""))
        self.page.goto(address)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def source(self, tab: str) -> str:
        """The image shown in a tab, as data."""
        shown = self.page.locator(f"#{tab}-pictures img.result").first
        shown.wait_for()
        return str(shown.get_attribute("src"))

    def changed(self, tab: str, before: str) -> str:
        """The image shown in a tab, when it is another than before."""
        self.page.wait_for_function(
            "([tab, before]) => { const one = document.querySelector(`#${tab}-pictures img.result`);"
            " return one && one.src !== before; }",
            arg=[tab, before],
        )
        return self.source(tab)

    def shows(self, tab: str, prompt: str) -> str:
        """The image shown in a tab, when it is of a prompt."""
        self.page.locator(f'#{tab}-pictures img.result[alt="{prompt}"]').first.wait_for()
        return self.source(tab)

    def leave(self) -> None:
        """Ends the visit; the console has to be without errors, and no other host was asked."""
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.screenshot(path=str(Path(folder) / f"{self.name}.png"), full_page=True)
        self.context.close()
        assert self.errors == []
        assert {host.split(":")[0] for host in self.hosts if host} <= {"127.0.0.1"}


def pixels(source: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def expected(prompt: str, seed: int = 0) -> Any:
    from sdxs_lightning.inference.generator import OneStepGenerator

    generator = OneStepGenerator.load(ROOT / "data" / "toy" / "student", device="cpu")
    return generator.generate(prompt, seed)[0].permute(1, 2, 0).numpy()


def same(source: str, image: Any) -> bool:
    """Up to rounding of one byte."""
    return int(np.abs(pixels(source).astype(int) - image.astype(int)).max()) <= 1


def test_typing_a_prompt_draws_it(browser: Any, demo: str) -> None:
    visitor = Visitor(browser, demo, "text")
    box = visitor.page.get_by_label("Prompt").first
    box.fill("a red circle")
    first = visitor.shows("text", "a red circle")
    assert same(first, expected("a red circle"))
    box.fill("")
    box.press_sequentially(
        "a large green star", delay=5
    )  # faster than images are made: letters in between are dropped
    last = visitor.shows("text", "a large green star")
    assert same(last, expected("a large green star")) and not same(last, expected("a red circle"))
    status = visitor.page.locator("#text-status [role=status]").inner_text()
    assert "ms" in status and "images/s" in status
    visitor.page.get_by_label("Seed").first.fill("3")
    assert same(visitor.changed("text", last), expected("a large green star", 3))
    slider = visitor.page.locator("#text-count input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    visitor.page.locator("#text-pictures img.result").nth(1).wait_for()
    visitor.leave()


def test_a_stroke_changes_the_picture(browser: Any, demo: str) -> None:
    visitor = Visitor(browser, demo, "sketch")
    visitor.tab("Sketch")
    visitor.page.locator("#sketch-prompt textarea").fill("a blue square")
    before = visitor.shows("sketch", "a blue square")
    canvas = visitor.page.locator("#sketch-paper")
    canvas.scroll_into_view_if_needed()
    place = canvas.bounding_box()
    mouse = visitor.page.mouse
    for at in (0.3, 0.7):
        mouse.move(place["x"] + at * place["width"], place["y"] + 0.25 * place["height"])
        mouse.down()
        mouse.move(place["x"] + at * place["width"], place["y"] + 0.75 * place["height"], steps=8)
        before = visitor.changed("sketch", before)  # while the button is still down
        mouse.up()
    seen = pixels(str(visitor.page.locator('#sketch-pictures img[alt="condition"]').get_attribute("src")))
    # White strokes on black; the second may be under way still when its first picture comes.
    assert 1 < seen.mean() < 200 and seen.max() > 200
    visitor.page.get_by_role("button", name="Clear the paper").click()
    visitor.page.wait_for_function("!document.querySelector('#sketch-pictures img[alt=condition]')")
    assert same(visitor.source("sketch"), expected("a blue square"))
    visitor.leave()


def test_an_uploaded_image_and_its_strength(browser: Any, demo: str, tmp_path: Path) -> None:
    visitor = Visitor(browser, demo, "image")
    visitor.tab("Image")
    colours = np.zeros((64, 96, 3), np.uint8)
    colours[:, :48], colours[:, 48:] = (200, 40, 40), (40, 40, 200)
    Image.fromarray(colours).save(tmp_path / "two.png")
    visitor.page.locator("#image-input input[type=file]").set_input_files(tmp_path / "two.png")
    first = visitor.source("image")
    slider = visitor.page.locator("#image-strength input[type=range]")
    slider.focus()
    for _ in range(4):
        slider.press("ArrowLeft")
    weaker = visitor.changed("image", first)
    visitor.page.get_by_label("Condition (ControlNet)").check()
    visitor.page.locator('#image-pictures img[alt="condition"]').wait_for()
    assert visitor.changed("image", weaker)
    visitor.leave()


def test_the_webcam_loop(browser: Any, demo: str) -> None:
    visitor = Visitor(browser, demo, "webcam")
    visitor.tab("Image")
    webcam = visitor.page.locator("#image-webcam")
    webcam.get_by_role("button").first.click()  # access
    visitor.page.wait_for_timeout(1500)
    record = webcam.get_by_role("button", name="record")
    (record if record.count() else webcam.get_by_role("button").first).first.click()
    first = visitor.source("image")
    assert visitor.changed("image", first)  # Chromium's fake camera moves
    visitor.leave()


def test_the_style_slider(browser: Any, demo: str) -> None:
    visitor = Visitor(browser, demo, "style")
    visitor.tab("Style")
    visitor.page.locator("#style-prompt textarea").fill("a red circle")
    styled = visitor.shows("style", "a red circle")
    slider = visitor.page.locator("#style-scale input[type=range]")
    slider.focus()
    slider.press("Home")  # 0: the plain student
    plain = visitor.changed("style", styled)
    visitor.page.wait_for_timeout(500)
    assert same(visitor.source("style"), expected("a red circle"))
    slider.press("End")
    assert visitor.changed("style", plain) != styled
    visitor.leave()


def test_beside_the_base(browser: Any, demo: str) -> None:
    visitor = Visitor(browser, demo, "base")
    visitor.tab("Beside the base")
    visitor.page.get_by_role("button", name="Draw with both").click()
    assert visitor.source("base-student") != visitor.source("base-base")
    assert "ms" in visitor.page.locator("#base-base-status").inner_text()
    visitor.leave()


def test_two_visitors_at_once(browser: Any, demo: str) -> None:
    visitors = [Visitor(browser, demo, f"visitor-{i}") for i in range(2)]
    prompts = ["a yellow triangle", "a purple square"]
    for visitor, prompt in zip(visitors, prompts, strict=True):
        box = visitor.page.get_by_label("Prompt").first
        box.fill("")
        box.press_sequentially(prompt, delay=2)
    for visitor, prompt in zip(visitors, prompts, strict=True):
        assert same(visitor.shows("text", prompt), expected(prompt))
    for visitor in visitors:
        visitor.leave()


def test_a_narrow_screen_and_the_keyboard(browser: Any, demo: str) -> None:
    visitor = Visitor(browser, demo, "narrow", width=360)
    before = visitor.source("text") if visitor.page.locator("#text-pictures img").count() else ""
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 360
    box = visitor.page.get_by_label("Prompt").first
    for _ in range(30):  # by the Tab key alone
        if box.evaluate("one => one === document.activeElement"):
            break
        visitor.page.keyboard.press("Tab")
    visitor.page.keyboard.press("Control+A")
    visitor.page.keyboard.type("a black star")
    assert visitor.shows("text", "a black star") != before
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 360
    visitor.leave()


def test_files_are_not_served_and_uploads_are_limited(browser: Any, demo: str) -> None:
    context = browser.new_context()
    for path in ("/etc/passwd", str(ROOT / "pyproject.toml"), "../../etc/passwd"):
        found = context.request.get(f"{demo.rstrip('/')}/gradio_api/file={path}")
        assert found.status in (403, 404)
    large = {"name": "large.png", "mimeType": "image/png", "buffer": b"0" * 2_000_000}
    uploaded = context.request.post(f"{demo.rstrip('/')}/gradio_api/upload", multipart={"files": large})
    assert uploaded.status >= 400
    context.close()
