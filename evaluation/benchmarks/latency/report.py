"""Table and bar chart of a latency measurement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMPONENTS = ("text", "controlnet", "unet", "decoder", "copy")
_COLOURS = {
    "text": "#4c78a8",
    "controlnet": "#b279a2",
    "unet": "#f58518",
    "decoder": "#54a24b",
    "copy": "#9d9d9d",
}
_OTHER = "#d4d4d4"


def table(result: Mapping[str, Any]) -> str:
    """Markdown: one row for each subject and batch size."""
    rows = result["rows"]
    relative = bool(rows[0].get("relative"))
    named = [name for name in COMPONENTS if any(name in row["components"] for row in rows)]
    based = any("times_faster_than_base" in row for row in rows)
    unit = "" if relative else ", ms"
    total = "time, first = 1" if relative else "time, ms"
    head = ["", "batch", total, *(f"{name}{unit}" for name in named)]
    head += [] if relative else ["images/s"]
    head += ["peak, MB", f"x {rows[0]['subject']}", *(["x base"] if based else [])]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [
            row["subject"],
            str(row["batch_size"]),
            f"{_time(row['seconds'], relative)} ({_spread(row, relative)})",
        ]
        cells += [
            _time(row["components"][name], relative) if name in row["components"] else "" for name in named
        ]
        cells += [] if relative else [f"{row['images_per_second']:.3g}"]
        cells += [f"{row['peak_megabytes']:.0f}", f"{row['times_faster_than_first']:.2f}"]
        cells += [f"{row['times_faster_than_base']:.1f}"] if based else []
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _time(seconds: float, relative: bool) -> str:
    return f"{seconds:.4f}" if relative else f"{1000 * seconds:.1f}"


def _spread(row: Mapping[str, Any], relative: bool) -> str:
    return f"{_time(row['low'], relative)} to {_time(row['high'], relative)}"


def chart(result: Mapping[str, Any], file: Path) -> None:
    """Horizontal bars: left the time, logarithmic, right what share of it each component has."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = result["rows"][::-1]
    relative = bool(rows[0].get("relative"))
    figure, (times, shares) = plt.subplots(
        1, 2, figsize=(11, 1.4 + 0.4 * len(rows)), layout="constrained", sharey=True
    )
    labels = [f"{row['subject']} ({row['batch_size']})" for row in rows]
    times.barh(labels, [row["seconds"] for row in rows], color="#4c78a8")
    for i, row in enumerate(rows):
        times.text(row["seconds"], i, f" {_time(row['seconds'], relative)}", va="center", fontsize=8)
        left = 0.0
        for name, share in _shares(row).items():
            shares.barh(i, share, left=left, color=_COLOURS.get(name, _OTHER))
            left += share
    times.set_xscale("log")
    times.margins(x=0.2)
    times.set_xlabel(f"time{', first row = 1' if relative else ', seconds'} (logarithmic)")
    shares.set_xlabel("share of the time, %")
    handles = [Patch(color=_COLOURS.get(name, _OTHER)) for name in (*COMPONENTS, "not split")]
    figure.legend(handles, [*COMPONENTS, "not split"], loc="outside upper right", ncols=6, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _shares(row: Mapping[str, Any]) -> dict[str, float]:
    """Percent of each component, and of what is in none of them."""
    found = {name: 100 * row["components"].get(name, 0.0) / row["seconds"] for name in COMPONENTS}
    return found | {"not split": max(0.0, 100 - sum(found.values()))}
