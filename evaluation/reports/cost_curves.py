"""Quality against processor time, as PNG."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUDGET = re.compile(r"_(half|\d+)x$")
"""End of a row's name that has a fraction or a multiple of another row's work."""


def lines_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Rows with a recorded cost, by name without its budget, as (mean processor seconds, row), cheapest first."""
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for name, row in rows.items():
        if row.get("cpu_seconds"):
            lines.setdefault(BUDGET.sub("", name), []).append((row["cpu_seconds"]["mean"], row))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def cost_curves(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Caption accuracy and shape score against processor time, the first row's being 1; ranges over seeds as bars.

    Args:
        rows: of a score file of recipes; rows whose names differ by their budget (`_halfx`, `_2x`) form a line.
        path: the PNG to write.

    Raises:
        ValueError: if no row has its processor time.
    """
    # Its own canvas rather than pyplot, which keeps global state and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    lines = lines_of(rows)
    if not lines:
        raise ValueError("no row has its processor time: there is no curve to draw.")
    unit = next(row["cpu_seconds"]["mean"] for row in rows.values() if row.get("cpu_seconds"))
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, key, title, factor in zip(
        panels,
        ("caption_accuracy", "shape_score"),
        ("all attributes right, %", "shape score"),
        (100, 1),
        strict=True,
    ):
        for number, (name, points) in enumerate(lines.items()):
            points = [(cost, row) for cost, row in points if row.get(key)]  # older runs have fewer scores
            scores = [row[key] for _, row in points]
            means = [factor * score["mean"] for score in scores]
            below = [mean - factor * score["smallest"] for mean, score in zip(means, scores, strict=True)]
            above = [factor * score["largest"] - mean for mean, score in zip(means, scores, strict=True)]
            axes.errorbar(
                [cost / unit for cost, _ in points],
                means,
                yerr=[below, above],
                marker="osD^vP"[number // 10 % 6],
                markersize=4,
                linewidth=1.2 if len(points) > 1 else 0,
                elinewidth=1,
                label=name.replace("_", " "),
            )
        axes.set(
            xlabel=f"processor time, {next(iter(rows)).replace('_', ' ')} = 1", ylabel=title, xscale="log"
        )
        axes.xaxis.set_major_locator(LogLocator(base=2))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=120)
