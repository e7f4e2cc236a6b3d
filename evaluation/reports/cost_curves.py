"""Quality against processor time, as PNG."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BUDGET = re.compile(r"_(half|\d+)x$")
"""End of a row's name that has a fraction or a multiple of another row's work."""


Point = tuple[float, Mapping[str, Any]]
"""Mean processor seconds of a row, and the row."""


def lines_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Rows with a recorded cost, by name without its budget, as (mean processor seconds, row), cheapest first."""
    lines: dict[str, list[Point]] = {}
    for name, row in rows.items():
        if row.get("cpu_seconds"):
            lines.setdefault(BUDGET.sub("", name), []).append((row["cpu_seconds"]["mean"], row))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def cost_curves(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Caption accuracy and shape score against processor time, that of the first row being 1; ranges over seeds as bars.

    Args:
        rows: of a score file of recipes, of which those without a processor time are left out; rows whose names
            differ by their budget (`_halfx`, `_2x`) form a line.
        path: the PNG to write.

    Raises:
        ValueError: if no row has its processor time.
    """
    # Its own canvas rather than pyplot, which keeps global state and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    lines = lines_of(rows)
    if not lines:
        raise ValueError("no row has its processor time: there is no curve to draw.")
    first = next(name for name, row in rows.items() if row.get("cpu_seconds"))
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    titles = {"caption_accuracy": "all attributes right, %", "shape_score": "shape score"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for number, (name, points) in enumerate(lines.items()):
            _draw_line(axes, name, points, key, rows[first]["cpu_seconds"]["mean"], number)
        axes.set(xlabel=f"processor time, {first.replace('_', ' ')} = 1", ylabel=title, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=120)


def _draw_line(axes: Any, name: str, points: Sequence[Point], key: str, unit: float, number: int) -> None:
    """Draws the means of a line's rows, and their ranges over seeds as bars; the number chooses the marker."""
    factor = 100 if key == "caption_accuracy" else 1
    known = [(cost / unit, row[key]) for cost, row in points if row.get(key)]  # older runs have fewer scores
    means = [factor * score["mean"] for _, score in known]
    below = [factor * (score["mean"] - score["smallest"]) for _, score in known]
    above = [factor * (score["largest"] - score["mean"]) for _, score in known]
    axes.errorbar(
        [cost for cost, _ in known],
        means,
        yerr=[below, above],
        marker="osD^vP"[number // 10 % 6],  # matplotlib has ten colours
        markersize=4,
        linewidth=1.2 if len(known) > 1 else 0,
        elinewidth=1,
        label=name.replace("_", " "),
    )
