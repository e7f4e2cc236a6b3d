"""Labelled sheets of images, and progress curves, as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN_PX = 6
FONT_PX = 13


def sheet(rows: Mapping[str, Tensor], captions: Sequence[str], image_px: int = 112) -> Image.Image:
    """One row of images per label, one column per caption.

    Args:
        rows: label to images (n,3,H,W) uint8, the same n in each row.
        captions: n captions, written above the columns.
        image_px: side of an image on the sheet; enlarged without smoothing, so that single pixels remain visible.

    Returns:
        An RGB image on white.
    """
    font = ImageFont.load_default(FONT_PX)
    labels_px = MARGIN_PX * 2 + max(int(font.getlength(line)) for label in rows for line in label.split("\n"))
    texts = [textwrap.fill(caption, width=image_px // 7) for caption in captions]
    header_px = MARGIN_PX + (FONT_PX + 4) * max(text.count("\n") + 1 for text in texts)
    step = image_px + MARGIN_PX
    page = Image.new("RGB", (labels_px + step * len(captions), header_px + step * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for column, text in enumerate(texts):
        draw.multiline_text((labels_px + column * step, MARGIN_PX // 2), text, fill="black", font=font)
    for row, (label, images_uint8) in enumerate(rows.items()):
        top = header_px + row * step
        draw.multiline_text((MARGIN_PX, top + image_px // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images_uint8.cpu()):
            page.paste(_enlarged(image, image_px), (labels_px + column * step, top))
    return page


def _enlarged(image_uint8: Tensor, image_px: int) -> Image.Image:
    """(3,H,W) uint8 to a square of image_px."""
    image = Image.fromarray(np.ascontiguousarray(image_uint8.permute(1, 2, 0).numpy()))
    larger = image_px > image.width
    return image.resize(
        (image_px, image_px), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    )


def progress_curves(
    history: Sequence[Mapping[str, Any]],
    teacher: Mapping[str, float] | None,
    teacher_label: str,
    path: Path,
    warmup_updates: int = 0,
) -> None:
    """Shape score and caption accuracy against minutes of training, the teacher as horizontal lines.

    Args:
        history: measurements with `seconds`, `student_updates`, `shape_score` and `caption_accuracy`.
        teacher: the same two scores of the many-step teacher under the same protocol; None draws no lines.
        teacher_label: the teacher's label in the legend.
        path: the PNG to write.
        warmup_updates: student updates that are drawn as the warm-up's.
    """
    # Its own canvas rather than pyplot, which keeps global state and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    warmup = sum(point["student_updates"] <= warmup_updates for point in history) if warmup_updates else 0
    # The distillation's line begins at the warm-up's last point.
    parts = {"warm-up": history[:warmup], "distillation": history[max(0, warmup - 1) :]}
    for axes, key, title, factor in (
        (left, "shape_score", "shape score", 1),
        (right, "caption_accuracy", "all attributes right, %", 100),
    ):
        for name, points in parts.items():
            if len(points) > (name == "distillation" and warmup > 0):
                minutes = [point["seconds"] / 60 for point in points]
                scores = [factor * point[key] for point in points]
                axes.plot(minutes, scores, marker="o", markersize=3, label=f"one-step student, {name}")
        if teacher is not None and key in teacher:
            axes.axhline(factor * teacher[key], color="gray", linestyle="--", label=teacher_label)
        axes.set(xlabel="minutes", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylim(0.5, 1)  # a real image scores 0.945
    right.set_ylim(50, 100)
    figure.savefig(path, dpi=120)
