"""Results as Markdown: one table of a result, one of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "fid": "FID",
    "patch_fid": "patch FID",
    "fd_dinov2": "FD-DINOv2",
    "kid": "KID",
    "cmmd": "CMMD",
    "clip_score": "CLIP score",
    "pickscore": "PickScore",
    "hpsv2": "HPSv2",
    "caption_accuracy": "all right",
    "attribute_accuracy": "attributes",
}
LOWER_IS_BETTER = {"fid", "patch_fid", "fd_dinov2", "kid", "cmmd"}


def title(metric: str) -> str:
    """For people."""
    return TITLES.get(metric, metric.replace("_", " "))


def number(value: float | None) -> str:
    """Five significant digits; nothing for None."""
    return "" if value is None else f"{value:.5g}"


def interval(entry: Mapping[str, Any]) -> str:
    """`low to high`, nothing where there is none."""
    return f"{number(entry['low'])} to {number(entry['high'])}" if entry.get("low") is not None else ""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In GitHub's form."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def metric_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A row a metric: name, value, interval, value for infinitely many images, N, hash."""
    return [
        [
            title(name) + (" ↓" if name in LOWER_IS_BETTER else ""),
            number(entry["value"]),
            interval(entry),
            number(entry.get("infinity")),
            str(entry["samples"]),
            entry["hash"],
        ]
        for name, entry in result["metrics"].items()
    ]


METRIC_HEADER = ("metric", "value", "95 % interval", "at N = ∞", "N", "protocol hash")


def describe_result(result: Mapping[str, Any]) -> str:
    """One line: what was measured, under which protocol."""
    what = result.get("model") or result.get("images")
    how = ""
    if "model" in result:
        how = f", {result['nfe']} step{'s' * (result['nfe'] != 1)}, guidance {result['guidance_scale']:g}"
    return f"{what}{how}; protocol {result['protocol']['name']}"


def result_markdown(result: Mapping[str, Any]) -> str:
    """A result as a page of Markdown."""
    table = markdown_table(METRIC_HEADER, metric_rows(result))
    return f"### {describe_result(result)}\n\n{table}\n{footnote(result)}\n"


def footnote(result: Mapping[str, Any]) -> str:
    """What a reader has to know about the numbers."""
    source = result["protocol"].get("source")
    said = f"Protocol: {source}. " if source else ""
    return (
        f"{said}Numbers with different protocol hashes do not compare (`python -m evaluation.compare` refuses them). The "
        "interval is for other images of the same generator. N = ∞ is FID with the bias of few images taken off."
    )
