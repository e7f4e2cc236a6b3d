"""The numbers of a card: read from the run's own score files, and checked against them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.model_hash import hash_model, hash_weights
from sdxs_lightning.networks.lora_files import hash_lora
from sdxs_lightning.publishing.runs import Kind, Run

HASH_KEYS: dict[Kind, str] = {
    "pipeline": "model_sha256",
    "lora": "lora_sha256",
    "controlnet": "controlnet_sha256",
    "decoder": "decoder_sha256",
}
"""Entry of a score file with the hash of what it measured."""
TITLES = {
    "fid": "FID",
    "clip_score": "CLIP score",
    "caption_accuracy": "caption accuracy",
    "attribute_accuracy": "attribute accuracy",
    "kid": "KID",
    "diversity": "diversity",
    "style_accuracy": "style accuracy",
}


@dataclass(frozen=True)
class Number:
    """A measured value with all that it depends on."""

    metric: str
    value: float
    low: float | None
    high: float | None
    samples: int
    protocol: str
    hash: str
    """Of the metric's settings: numbers with another hash are not comparable."""
    source: str
    """Score file, relative to the run."""

    @property
    def title(self) -> str:
        return TITLES.get(self.metric, self.metric.replace("_", " "))

    @property
    def interval(self) -> str:
        """The 95 % interval, as printed."""
        return "none" if self.low is None or self.high is None else f"{self.low:.4g} to {self.high:.4g}"

    def row(self) -> str:
        """Row of the card's table."""
        cells = (
            self.title,
            f"{self.value:.6g}",
            self.interval,
            str(self.samples),
            self.protocol,
            f"`{self.hash}`",
        )
        return f"| {' | '.join(cells)} |"


def read_numbers(run: Run, model_hash: str) -> list[Number]:
    """Reads the score files of a run, which `python -m evaluation.evaluate --out RUN/NAME.json` writes.

    Args:
        run: score files are *.json in its folder and in `scores/`, if they have `metrics` with hashes.
        model_hash: of what the numbers must be of, `hash_of_export`.

    Raises:
        UserError: for a number that contradicts its own file: of other weights, outside its interval, changed settings.
    """
    numbers = []
    for path in sorted([*run.folder.glob("*.json"), *run.folder.glob("scores/*.json")]):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"'{path}' cannot be read as JSON ({error}).") from error
        if isinstance(content, dict) and isinstance(content.get("metrics"), dict):
            found = content.get(HASH_KEYS[run.kind])
            if found != model_hash:
                raise UserError(
                    f"'{path}' has scores of a {run.kind} with hash {found}, and this run exported {model_hash}; measure the "
                    "exported one again, or remove the file."
                )
            numbers += _numbers_of(content, path, path.relative_to(run.folder).as_posix())
    return numbers


def hash_of_export(run: Run) -> str:
    """Hash of what the run exported, as score files name it."""
    if run.kind == "lora":
        return hash_lora(run.exported)
    return hash_model(run.exported) if run.kind == "pipeline" else hash_weights(run.exported)


def _numbers_of(content: dict[str, Any], path: Path, source: str) -> list[Number]:
    protocol = content.get("protocol", {})
    name = str(protocol.get("name") if isinstance(protocol, dict) else protocol)
    numbers = []
    for metric, one in content["metrics"].items():
        try:
            number = Number(
                metric,
                float(one["value"]),
                one.get("low"),
                one.get("high"),
                int(one["samples"]),
                name,
                one["hash"],
                source,
            )
            settings = one["settings"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"'{path}': {metric} lacks a value, samples, hash or settings ({error!r})."
            ) from error
        _check(number, content.get(metric), settings, path)
        numbers.append(number)
    return numbers


def _check(number: Number, top: Any, settings: dict[str, Any], path: Path) -> None:
    """Raises UserError if a number contradicts the rest of its file."""
    if top is not None and float(top) != number.value:
        raise UserError(
            f"'{path}' has two values of {number.metric}, {top} and {number.value}: the file was altered, measure again."
        )
    if number.low is not None and number.high is not None and not number.low <= number.value <= number.high:
        raise UserError(
            f"'{path}': {number.metric} is {number.value}, outside its interval {number.interval}: the file was altered; "
            "measure again."
        )
    if number.hash not in (settings.get("fingerprint"), hash_of(settings)):
        raise UserError(
            f"'{path}': the settings of {number.metric} do not have its hash {number.hash}: the file was altered, measure "
            "again."
        )


def hash_of(settings: dict[str, Any]) -> str:
    """12-digit hex hash of a metric's settings; equals `evaluation.protocols.image_protocol.metric_hash`."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


_ROW = re.compile(r"^\|.*\| `[0-9a-f]{12}` \|$", re.MULTILINE)


def check_card(text: str, numbers: Sequence[Number]) -> None:
    """Checks that each number of a card is one of the run's, under the same hash.

    Args:
        text: the card: its table, and the results in its header.
        numbers: those of the run's score files.

    Raises:
        UserError: for a number that is not found there, or a card whose header cannot be parsed.
    """
    from huggingface_hub import ModelCard, ModelCardData

    rows = {number.row() for number in numbers}
    for row in _ROW.findall(text):
        if row not in rows:
            raise UserError(
                f"README.md has a row that the run's scores do not have: {row}. Write the card again, or measure again."
            )
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
        results = (data.eval_results if isinstance(data, ModelCardData) else None) or []
    except Exception as error:  # huggingface_hub raises what yaml and its own checks raise
        raise UserError(
            f"the header of README.md cannot be parsed ({' '.join(str(error).split())})."
        ) from error
    known = {(number.metric, number.hash, number.value) for number in numbers}
    for result in results:
        key = result.metric_type, (result.metric_args or {}).get("hash"), result.metric_value
        if key not in known:
            raise UserError(
                f"the header of README.md gives {key[0]} {key[2]} under the hash {key[1]}, which the run's scores do not have. "
                "Write the card again, or measure again."
            )
