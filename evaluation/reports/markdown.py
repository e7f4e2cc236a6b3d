"""Markdown of a result of `evaluation.evaluate`, and of the score files that `evaluation.benchmarks.tables` writes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

TITLES = {
    "fid": "FID",
    "patch_fid": "patch FID",
    "fd_dinov2": "FD-DINOv2",
    "kid": "KID",
    "cmmd": "CMMD",
    "clip_score": "CLIP score",
    "inception_score": "Inception score",
    "pickscore": "PickScore",
    "hpsv2": "HPSv2",
    "psnr_db": "PSNR, dB",
    "fid_ratio": "FID / base's",
    "caption_accuracy_ratio": "caption accuracy / base's",
    "ms_per_image": "ms/image",
    "removed": "removed by the negative prompt",
    "relative_time": "time, last row = 1",
    "relative_cost": "processor time, first row = 1",
}
LOWER_IS_BETTER = {"fid", "patch_fid", "fd_dinov2", "kid", "cmmd"}

StoredScores = Mapping[str, Any]
"""StoredScores by name: a number, the `spread` of several, or None."""


def title(metric: str) -> str:
    """Column heading of a metric."""
    return TITLES.get(metric, metric.replace("_", " "))


def number(value: float | None) -> str:
    """Format with five significant digits; empty for None."""
    return "" if value is None else f"{value:.5g}"


def interval(entry: Mapping[str, Any]) -> str:
    """`low to high`; empty without an interval."""
    return f"{number(entry['low'])} to {number(entry['high'])}" if entry.get("low") is not None else ""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


METRIC_HEADER = ("metric", "value", "95 % interval", "at N = ∞", "N", "protocol hash")


def metric_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per metric, in the columns of METRIC_HEADER."""
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


def describe_result(result: Mapping[str, Any]) -> str:
    """One-line description: images and protocol."""
    subject = result.get("model") or result.get("images")
    settings = ""
    if "model" in result:
        steps = f"{result['nfe']} step{'s' * (result['nfe'] != 1)}"
        settings = f", {steps}, guidance {result['guidance_scale']:g}"
        settings += f", {result['scheduler']}" if "scheduler" in result else ""
        settings += f", timesteps {', '.join(map(str, result['timesteps']))}" if "timesteps" in result else ""
    return f"{subject}{settings}; protocol {result['protocol']['name']}"


def result_markdown(result: Mapping[str, Any]) -> str:
    """A result as a page of Markdown."""
    table = markdown_table(METRIC_HEADER, metric_rows(result))
    return f"### {describe_result(result)}\n\n{table}\n{footnote(result)}\n"


def footnote(result: Mapping[str, Any]) -> str:
    """Notes on reading the numbers."""
    source = result["protocol"].get("source")
    protocol = f"Protocol: {source}. " if source else ""
    return (
        f"{protocol}Numbers with different protocol hashes are not comparable (`python -m evaluation.compare` refuses them). "
        "The interval is for other images of the same generator. N = ∞ is FID without the bias of finitely many images."
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest and largest."""
    return {"mean": statistics.fmean(values), "smallest": min(values), "largest": max(values)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


FORMATS: dict[str, Callable[[float], str]] = {
    "shape_score": "{:.3f}".format,
    "clean_images": _percent,
    "fid": "{:.2f}".format,
    "clip_score": "{:.1f}".format,
    "caption_accuracy": _percent,
    "attribute_accuracy": _percent,
    "style_accuracy": _percent,
    "removed": _percent,
    "diversity": "{:.3f}".format,
    "sharpness": "{:.2f}".format,
    "psnr_db": "{:.1f}".format,
    "feature_distance": "{:.4f}".format,
    "parameters": "{:,}".format,
    "ms_per_image": "{:.0f}".format,
    "relative_time": "{:.2f}".format,
    "relative_cost": "{:.2f}".format,
    "fid_ratio": "{:.2f}".format,
    "caption_accuracy_ratio": "{:.2f}".format,
}
"""Columns of score tables in order, with their formats."""


def score_table(rows: Mapping[str, StoredScores]) -> str:
    """One row per label; columns are the scores of FORMATS that any row has.

    A spread is shown as its mean and, where values differ in the digits shown, its range.
    """
    columns = [name for name in FORMATS if any(scores.get(name) is not None for scores in rows.values())]
    cells = [
        [label, *(_cell(scores.get(name), FORMATS[name]) for name in columns)]
        for label, scores in rows.items()
    ]
    return markdown_table(["", *map(_score_title, columns)], cells)


def _score_title(score: str) -> str:
    return title(score) + (", %" if FORMATS[score] is _percent else "")


def _cell(value: Any, text: Callable[[float], str]) -> str:
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return text(value)
    mean, low, high = (text(value[key]) for key in ("mean", "smallest", "largest"))
    return mean if low == high else f"{mean} ({low} to {high})"


def score_file_markdown(content: Mapping[str, Any]) -> str:
    """The table of a score file of `evaluation.benchmarks.tables`, or of a run's report.json.

    Raises:
        ValueError: if the file is neither.
    """
    kinds: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
        ("differences", _differences_markdown),
        ("fid_ratio", _report_markdown),
        ("psnr_db", _decoder_markdown),
        ("ordered_by", _estimates_markdown),
        ("rows", _rows_markdown),
        ("toy", _teachers_markdown),
    )
    for key, markdown in kinds:
        if key in content:
            return markdown(content)
    raise ValueError(f"has none of {', '.join(key for key, _ in kinds)}, one of which every score file has")


def teacher_rows(entry: Mapping[str, Any]) -> dict[str, StoredScores]:
    """Rows of real images, the autoencoder and the base at each number of steps."""
    rows = {"real images": entry.get("real_vs_real"), "autoencoder": entry.get("vae_floor")}
    rows |= {
        f"base, {steps} step{'s' * (steps != '1')}": scores for steps, scores in entry["teacher"].items()
    }
    return {label: scores for label, scores in rows.items() if scores is not None}


def _teachers_markdown(content: Mapping[str, Any]) -> str:
    return "\n".join(
        f"Protocol {name}:\n\n{score_table(teacher_rows(entry))}" for name, entry in content.items()
    )


def _report_markdown(content: Mapping[str, Any]) -> str:
    """Markdown of the report of a run, or of the summary over seeds."""
    ratios = {key: content[key] for key in ("fid_ratio", "caption_accuracy_ratio")}
    rows = teacher_rows(content) if "teacher" in content else {}
    rows |= {"student before": content["student_before"], "student": content["student"] | ratios}
    if "ms_per_image" in content["student"]:
        unit = content["student"]["ms_per_image"]
        rows = {
            label: {**scores, "relative_time": scores["ms_per_image"] / unit}
            if "ms_per_image" in scores
            else scores
            for label, scores in rows.items()
        }
    return score_table(rows)


def _rows_markdown(content: Mapping[str, Any]) -> str:
    """Markdown of recipes (a row each), U-Nets (a row per number of steps) or size conditions."""
    rows: dict[str, StoredScores] = {}
    costs = (scores.get("cpu_seconds") for scores in content["rows"].values())
    unit = next(filter(None, costs), None) if len(content["rows"]) > 1 else None
    for label, scores in content["rows"].items():
        for steps, scores_at in scores.get("steps", {}).items():
            rows[f"{label}, {steps} steps"] = {**scores_at, "parameters": scores["parameters"]}
        if "steps" not in scores:
            cost = scores.get("cpu_seconds")
            relative = cost["mean"] / unit["mean"] if cost and unit else None
            rows[label] = {**scores, "relative_cost": relative}
    return score_table(rows)


def _estimates_markdown(content: Mapping[str, Any]) -> str:
    """Markdown of rows of estimates with intervals, and which neighbours these do not tell apart."""
    rows, score = content["rows"], content["ordered_by"]
    names = list(next(iter(rows.values()))["estimates"])
    table = markdown_table(
        ["", *(title(name) for name in names)],
        [[label, *(_with_interval(row["estimates"][name]) for name in names)] for label, row in rows.items()],
    )
    ranked = sorted(rows, key=lambda label: -rows[label]["estimates"][score]["value"])
    ends = {label: rows[label]["estimates"][score] for label in ranked}
    overlapping = [
        f"{better} / {worse}"
        for better, worse in pairwise(ranked)
        if ends[better]["low"] <= ends[worse]["high"]
    ]
    return (
        f"{table}\nNeighbours whose {title(score)} intervals overlap: {', '.join(overlapping) or 'none'}.\n"
    )


def _with_interval(estimate: Mapping[str, float]) -> str:
    value = f"{estimate['value']:.4f}"
    return f"{value} ({estimate['low']:.4f} to {estimate['high']:.4f})" if "low" in estimate else value


def _decoder_markdown(content: Mapping[str, Any]) -> str:
    labels = {
        "kl_real": "base's decoder against real",
        "tiny_real": "tiny against real",
        "tiny_kl": "tiny against base's",
    }
    rows = {
        label: {"psnr_db": content["psnr_db"][pair], "feature_distance": content["feature_distance"][pair]}
        for pair, label in labels.items()
    }
    tiny, kl = content["parameters"]["tiny"], content["parameters"]["kl"]
    ratios = ", ".join(
        f"{ratio:.2f} at batch size {size}" for size, ratio in content["time_kl_over_tiny"].items()
    )
    return (
        f"{score_table(rows)}\nThe tiny decoder has {_percent(tiny / kl)} % of the base decoder's parameters; decoding time of "
        f"the base's over the tiny one's: {ratios}.\n"
    )


def _differences_markdown(content: Mapping[str, Any]) -> str:
    """Markdown of mean differences with standard errors, one row per pair of rows; `-` takes the place of their colon."""
    pairs = content["differences"]
    scores = [score for score in FORMATS if any(score in found for found in pairs.values())]
    rows = []
    for pair, found in pairs.items():
        cells = [_with_error(score, found[score]) if score in found else "" for score in scores]
        counts = [one["differences"] for one in found.values()]
        fewest, most = min(counts), max(counts)  # a score may be unknown of a seed
        seeds = str(most) if fewest == most else f"{fewest} to {most}"
        rows.append([pair.replace(":", " - "), *cells, seeds])
    return markdown_table(["", *map(_score_title, scores), "seeds"], rows)


def _with_error(score: str, found: Mapping[str, float]) -> str:
    text = FORMATS[score]
    difference = text(found["mean"])
    if float(difference) == 0:
        difference = text(0.0)  # no sign: "-0.0" would claim one
    elif found["mean"] > 0:
        difference = f"+{difference}"
    return f"{difference} ± {text(found['standard_error'])}"
