"""A result as one self-contained HTML file: the numbers, how they were measured, and sample images."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.reports.markdown import METRIC_HEADER, describe_result, footnote, metric_rows

IMAGE_PX = 256
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } th, td { padding: .3em .9em; text-align: left; border-bottom: 1px solid #ddd }
td:nth-child(n+2):nth-child(-n+5), th:nth-child(n+2):nth-child(-n+5) { text-align: right }
code, pre { font: 13px/1.4 ui-monospace, monospace } pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 12px }
figure { margin: 0 } figcaption { font-size: 12px; color: #555 } img { width: 100%; image-rendering: auto; display: block }
.small { color: #555; font-size: 13px }
"""


def write_html(
    path: Path,
    result: Mapping[str, Any],
    images: Mapping[int, Image.Image],
    captions: Sequence[str] | None,
    reference: Mapping[int, Image.Image] | None = None,
) -> None:
    """Write the page.

    Args:
        path: the .html file.
        result: content of the JSON file.
        images: sample images by number.
        captions: captions of all samples.
        reference: images of the reference set by number.
    """
    title = html.escape(describe_result(result))
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{title}</h1>",
        _table(METRIC_HEADER, metric_rows(result)),
        f"<p class='small'>{html.escape(footnote(result))}</p>",
        "<h2>Samples</h2>",
        _grid(images, captions),
    ]
    if reference:
        parts += ["<h2>Reference</h2>", _grid(reference, None)]
    settings = json.dumps(dict(result), indent=2, ensure_ascii=False)
    parts += [f"<h2>All settings</h2><pre>{html.escape(settings)}</pre></body></html>"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _grid(images: Mapping[int, Image.Image], captions: Sequence[str] | None) -> str:
    figures = []
    for number, image in images.items():
        caption = "" if captions is None else html.escape(captions[number])
        figures.append(
            f"<figure><img alt='sample {number}' title='sample {number}' src='{_embedded(image)}'>"
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f"<div class='grid'>{''.join(figures)}</div>"


def _embedded(image: Image.Image) -> str:
    shown = image.copy()
    shown.thumbnail((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    shown.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
