"""The page: tabs, their inputs, and what happens when one changes."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.demo.studio import Made, Studio

EXAMPLES = (
    "a red circle above a blue square",
    "a large orange cross on a navy background",
    "a pink ring below a blue heart",
    "a small yellow square on a gray background",
)
"""Of the toy world."""
NEEDS_CONTROLNET = """This needs a ControlNet of this student: start the demo with `--controlnet DIR`.

The toy student of the repository has its own, `data/toy/controlnet`, trained by `configs/toy/controlnet_denoising.yaml` and
`configs/toy/controlnet_pretrained.yaml`. Those of other students: `configs/sd15/controlnet_pretrained.yaml` and others."""
NEEDS_LORA = """This needs a style LoRA of this student: start the demo with `--lora FILE`.

The toy student of the repository has its own, `data/toy/lora`, trained by the commands at the top of `configs/toy/lora.yaml`.
Those of other students: `configs/sd15/lora.yaml` and its neighbours."""
PAPER_PX = 256
MAX_PROMPT = 400
"""Characters of a prompt; the rest is cut."""
MAX_DRAWING = 1_000_000
"""Characters of a drawing that is sent."""
PAPER = f"""
<canvas id="sketch-paper" width="{PAPER_PX}" height="{PAPER_PX}" tabindex="0" aria-label="Paper to draw on"
 style="width: 100%; max-width: {2 * PAPER_PX}px; background: white; border: 1px solid #999; touch-action: none;"></canvas>"""
SCRIPT = """<script>
(() => {
  let last = null, waiting = false;
  const paper = () => document.getElementById("sketch-paper");
  const at = (event) => {
    const box = paper().getBoundingClientRect();
    return [(event.clientX - box.left) * paper().width / box.width, (event.clientY - box.top) * paper().height / box.height];
  };
  const send = () => {
    waiting = false;
    const field = document.querySelector("#sketch-data textarea, #sketch-data input");
    field.value = paper().dataset.drawn ? paper().toDataURL("image/png") : "";
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const soon = () => { if (!waiting) { waiting = true; setTimeout(send, 50); } };
  document.addEventListener("pointerdown", (event) => { if (event.target === paper()) last = at(event); });
  document.addEventListener("pointerup", () => { if (last) { last = null; soon(); } });
  document.addEventListener("pointermove", (event) => {
    if (!last) return;
    const pen = paper().getContext("2d"), next = at(event);
    pen.lineWidth = 10; pen.lineCap = "round"; pen.strokeStyle = "#000000";
    pen.beginPath(); pen.moveTo(...last); pen.lineTo(...next); pen.stroke();
    last = next; paper().dataset.drawn = "1"; soon();
  });
  window.clearPaper = () => {
    paper().getContext("2d").clearRect(0, 0, paper().width, paper().height);
    delete paper().dataset.drawn; soon();
  };
})();
</script>"""
"""A plain canvas: gradio's image editor needs WebGL, which takes seconds for a stroke where no GPU draws it. What is drawn goes
into a hidden text field as data."""
CSS = """
.pictures { display: flex; flex-wrap: wrap; gap: 8px; min-height: 128px; }
.pictures figure { margin: 0; flex: 1 1 128px; max-width: 384px; }
.pictures img { width: 100%; image-rendering: pixelated; border-radius: 6px; display: block; }
.pictures figcaption { font-size: 0.85em; opacity: 0.8; }
.status { font-variant-numeric: tabular-nums; min-height: 1.5em; }
"""
_LIVE: dict[str, Any] = {
    "trigger_mode": "always_last",  # while one is in progress, the last input waits and the others are dropped
    "show_progress": "hidden",
    "concurrency_limit": None,
    "api_visibility": "private",
}
UPLOADED: dict[str, Any] = {"type": "pil", "image_mode": None}
"""Of fields for images, which come as they are: gradio's own conversion drops transparency, clips 16 bits, and leaves the
palette of a GIF unread."""
_Handler = Callable[..., tuple[Any, Any]]


def theme() -> Any:
    """Gradio's plain theme with the system's fonts: the default one loads fonts from the network."""
    return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    steps = len(studio.generator.plan.steps)
    with gr.Blocks(title="sdxs-lightning", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# {'One step' if steps == 1 else f'{steps} steps'} from noise to image")
        with gr.Tab("Text", id="text"):
            _text_tab(studio)
        with gr.Tab("Sketch", id="sketch"):
            _sketch_tab(studio)
        with gr.Tab("Image", id="image"):
            _image_tab(studio)
        with gr.Tab("Style", id="style"):
            _style_tab(studio)
        with gr.Tab("Beside the base", id="base"):
            _base_tab(studio)
    return page


def _text_tab(studio: Studio) -> None:
    prompt, seed = _prompt("text"), _seed()
    count = gr.Slider(1, 8, value=1, step=1, label="Images", elem_id="text-count")
    pictures, status = _outputs("text")
    handler = _handler(lambda visitor, *given: studio.text(visitor, *given), "text")
    _on_change([prompt, seed, count], handler, [pictures, status])
    _examples(prompt)


def _sketch_tab(studio: Studio) -> None:
    if not studio.generator.networks.has_control:
        gr.Markdown(NEEDS_CONTROLNET)
        return
    with gr.Row():
        with gr.Column():
            gr.HTML(PAPER, label="Draw here", elem_id="sketch-canvas")
            drawing = gr.Textbox(visible="hidden", elem_id="sketch-data", label="drawing")
            clear = gr.Button("Clear the paper", size="sm")
            clear.click(None, None, None, js="() => { window.clearPaper(); }")
            prompt, seed = _prompt("sketch"), _seed()
            scale = gr.Slider(0, 2, value=1, step=0.05, label="Weight of the sketch", elem_id="sketch-scale")
        with gr.Column():
            pictures, status = _outputs("sketch")

    def make(visitor: str, drawing: str, prompt: str, seed: int, scale: float) -> Made | None:
        if not drawing:
            return studio.text(visitor, prompt, seed, 1)
        return studio.sketch(visitor, prompt, seed, drawn(drawing), scale)

    _on_change(
        [drawing, prompt, seed, scale], _handler(make, "sketch", drawing_first=True), [pictures, status]
    )
    _examples(prompt)


def _image_tab(studio: Studio) -> None:
    ways = ["Partial noise"] + (["Condition (ControlNet)"] if studio.condition is not None else [])
    with gr.Row():
        with gr.Column():
            image = gr.Image(
                sources=["upload", "webcam"],
                **UPLOADED,
                streaming=False,
                label="Image",
                elem_id="image-input",
            )
            webcam = gr.Image(
                sources=["webcam"], **UPLOADED, streaming=True, label="Webcam, live", elem_id="image-webcam"
            )
            prompt, seed = _prompt("image"), _seed()
            way = gr.Radio(ways, value=ways[0], label="Keep of the image", elem_id="image-way")
            strength = gr.Slider(0.05, 1, value=0.5, step=0.05, label="Strength", elem_id="image-strength")
            scale = gr.Slider(
                0, 2, value=1, step=0.05, label="Weight of the condition", visible=len(ways) > 1
            )
        with gr.Column():
            pictures, status = _outputs("image")

    def make(
        visitor: str, image: Any, prompt: str, seed: int, way: str, strength: float, scale: float
    ) -> Made | None:
        if image is None:
            raise UserError("Choose an image, or start the webcam.")
        return studio.image(visitor, prompt, seed, image, strength, way != ways[0], scale)

    handler = _handler(make, "image")
    rest = [prompt, seed, way, strength, scale]
    _on_change([image, *rest], handler, [pictures, status])
    webcam.stream(
        handler,
        [webcam, *rest],
        [pictures, status],
        stream_every=0.1,
        time_limit=300,
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )


def _style_tab(studio: Studio) -> None:
    if not studio.has_lora:
        gr.Markdown(NEEDS_LORA)
        return
    prompt, seed = _prompt("style"), _seed()
    scale = gr.Slider(0, 1.5, value=1, step=0.05, label="Weight of the style", elem_id="style-scale")
    pictures, status = _outputs("style")
    handler = _handler(lambda visitor, *given: studio.styled(visitor, *given), "style")
    _on_change([prompt, seed, scale], handler, [pictures, status])
    _examples(prompt)


def _base_tab(studio: Studio) -> None:
    if studio.base is None:
        gr.Markdown("This needs the base: start the demo with `--base DIR`.")
        return
    prompt, seed = _prompt("base"), _seed()
    button = gr.Button("Draw with both", elem_id="base-run")
    with gr.Row():
        with gr.Column():
            gr.Markdown("Student")
            pictures, status = _outputs("base-student")
        with gr.Column():
            gr.Markdown(f"Base, {studio.base_title}")
            base_pictures, base_status = _outputs("base-base")
    student = _handler(lambda visitor, prompt, seed: studio.text(visitor, prompt, seed, 1), "base-student")
    _on_change([prompt, seed], student, [pictures, status])
    base = _handler(lambda visitor, prompt, seed: studio.by_base(visitor, prompt, seed), "base-base")
    button.click(student, [prompt, seed], [pictures, status], **_LIVE)
    button.click(base, [prompt, seed], [base_pictures, base_status], **_LIVE)


def _prompt(tab: str) -> Any:
    return gr.Textbox(
        value=EXAMPLES[0],
        label="Prompt",
        max_length=MAX_PROMPT,
        elem_id=f"{tab}-prompt",
        autofocus=tab == "text",
    )


def _seed() -> Any:
    return gr.Number(value=0, precision=0, label="Seed", minimum=0, maximum=2**31 - 1)


def _outputs(tab: str) -> tuple[Any, Any]:
    """Images as data in the page, so that none is stored in a file or served as one; and a line on how long they took."""
    pictures = gr.HTML(value='<div class="pictures"></div>', elem_id=f"{tab}-pictures")
    status = gr.HTML(value='<div class="status" role="status"></div>', elem_id=f"{tab}-status")
    return pictures, status


def _examples(prompt: Any) -> None:
    gr.Examples([[example] for example in EXAMPLES], [prompt], cache_examples=False)


def _on_change(inputs: Sequence[Any], handler: _Handler, outputs: Sequence[Any]) -> None:
    """Calls the handler whenever an input changes, by a visitor's hand or otherwise."""
    for one in inputs:
        one.change(handler, list(inputs), list(outputs), **_LIVE)


def _handler(make: Callable[..., Made | None], tab: str, drawing_first: bool = False) -> _Handler:
    """The event handler around a function of (visitor, inputs)."""

    def handle(request: gr.Request, *sent: Any) -> tuple[Any, Any]:
        drawing, rest = sent[:drawing_first], sent[drawing_first:]
        given = [*drawing, *(one[:MAX_PROMPT] if isinstance(one, str) else one for one in rest)]
        try:
            made = make(f"{request.session_hash}/{tab}", *given)
        except UserError as error:
            return gr.skip(), _status(html.escape(str(error)))
        if made is None:
            return gr.skip(), gr.skip()
        count = len(made.images)
        rate = f"{1000 * made.seconds:.0f} ms, {count / made.seconds:.1f} images/s"
        words = [one for one in given[drawing_first:] if isinstance(one, str)]
        text = words[0] if words else ""
        return _pictures(made, text), _status(rate)

    return handle


def drawn(data: str) -> Any:
    """The pixels (H, W, 4), uint8, of a drawing that the page sent as data.

    Raises:
        UserError: for anything else.
    """
    head, _, body = data.partition(",")
    try:
        if head != "data:image/png;base64" or len(data) > MAX_DRAWING:
            raise ValueError(head[:40])
        with Image.open(io.BytesIO(base64.b64decode(body, validate=True)), formats=["PNG"]) as image:
            if image.size != (PAPER_PX, PAPER_PX):
                raise ValueError(f"{image.size}")
            return np.asarray(image.convert("RGBA"))
    except (ValueError, OSError) as error:
        raise UserError(f"this is no drawing of the page ({error}).") from error


def _status(text: str) -> str:
    return f'<div class="status" role="status">{text}</div>'


def _pictures(made: Made, prompt: str) -> str:
    alt = html.escape(prompt, quote=True)
    figures = [
        f'<figure><img class="result" alt="{alt}" src="{_data(image)}"></figure>' for image in made.images
    ]
    figures += [
        f'<figure><img alt="condition" src="{_data(image)}"><figcaption>what the ControlNet sees</figcaption></figure>'
        for image in made.inputs
    ]
    return f'<div class="pictures">{"".join(figures)}</div>'


def _data(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
