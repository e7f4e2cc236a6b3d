"""Loads what the demo shows and serves it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.image_formats import readable_formats
from sdxs_lightning.demo.studio import MAX_PIXELS, Condition, Studio, stock_base
from sdxs_lightning.inference.generator import OneStepGenerator

if TYPE_CHECKING:
    from sdxs_lightning.demo.__main__ import DemoOptions

TOY = Path(__file__).resolve().parents[2] / "data" / "toy"
"""The toy world of the repository; installed packages are without it."""
CONDITIONS = {
    "canny": "data.conditions.Canny",
    "sketch": "data.conditions.Sketch",
    "soft_edge": "data.conditions.SoftEdge",
    "depth": "data.conditions.Depth",
}
"""Classes by name; imported when one is asked for, since the package works without the repository's `data`."""


def serve(options: DemoOptions) -> str:
    """Serves until it is interrupted.

    Raises:
        UserError: for an unusable model or adapter, a missing extra, or a port that is taken.
    """
    app = launch(options)
    print(f"Serving on {app.local_url} (Ctrl-C ends it)", flush=True)
    app.block_thread()
    return ""


def launch(options: DemoOptions) -> Any:
    """The running demo, a gradio Blocks; `close()` ends it.

    Raises:
        UserError: as `serve`.
    """
    # Before gradio is imported: no usage statistics, no look for a newer version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            "the demo needs gradio; install it with `uv sync --extra demo` or pip install sdxs-lightning[demo]."
        ) from error
    from sdxs_lightning.demo.page import CSS, SCRIPT, build, theme

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    Image.ID[:] = (
        readable_formats()
    )  # gradio opens what visitors upload with every decoder that is registered
    app = build(studio(options))
    try:
        app.launch(
            server_name=options.host,
            server_port=options.port or None,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            max_file_size=f"{options.max_upload_mb:g}mb",
            allowed_paths=[],
            enable_monitoring=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            css=CSS,
            head=SCRIPT,
        )
    except OSError as error:
        raise UserError(
            f"--port {options.port} cannot be opened ({error}); give another one, or 0 for a free one."
        ) from error
    assert gradio.__version__
    return app


def studio(options: DemoOptions) -> Studio:
    """Loads the student, its adapters and its base."""
    toy = options.model is None
    model = options.model or str(_shipped("student"))
    # An export has its adapters inside.
    own = toy and options.backend == "torch"
    controlnet = options.controlnet or (_shipped_adapter("controlnet") if own else None)
    lora = options.lora or (_shipped_adapter("lora") if own else None)
    base = options.base or (str(TOY / "base") if toy else None)
    generator = OneStepGenerator.load(
        model,
        options.backend,
        controlnet,
        lora,
        options.device,
        options.dtype,
        lora_scale=0.0,
        compiled=options.compiled,
    )
    if generator.model.takes_guidance:
        raise UserError(
            f"--model '{model}' takes the guidance scale as an input, which the demo does not give; see `python -m "
            "sdxs_lightning.generate --guidance_scale 2`, or diffusers."
        )
    networks = generator.networks
    drawn = base and stock_base(
        base, options.base_steps, options.base_guidance_scale, networks.device, networks.dtype
    )
    return Studio(
        generator,
        condition_named(options.condition) if generator.networks.has_control else None,
        lora is not None,
        drawn or None,
        f"{options.base_steps} steps, guidance {options.base_guidance_scale:g}",
    )


def condition_named(name: str) -> Condition:
    """Makes condition images: canny, sketch, soft_edge, depth:FOLDER, or the class of a dotted path.

    Raises:
        UserError: for another name.
    """
    short, _, argument = name.partition(":")
    path = CONDITIONS.get(short, short)
    module, _, attribute = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--condition '{name}' is none of {', '.join(CONDITIONS)}, and no class that can be imported ({error})."
        ) from error
    made: Condition = kind(argument) if argument else kind()
    return made


def _shipped(name: str) -> Path:
    folder = TOY / name
    if not folder.is_dir():
        raise UserError(f"there is no toy {name} at '{folder}'; give --model DIR, the folder of a student.")
    return folder


def _shipped_adapter(name: str) -> str | None:
    folder = TOY / name
    return str(folder) if folder.is_dir() else None
