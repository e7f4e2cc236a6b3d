"""The numbers of a card: read from the run's own score files, and checked against them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxs_lightning.callbacks.run_folder import ORIGIN
from sdxs_lightning.core.errors import UserError, one_line
from sdxs_lightning.core.model_hash import hash_model, hash_weights
from sdxs_lightning.networks.lora_files import hash_lora
from sdxs_lightning.publishing.calling import Settings
from sdxs_lightning.publishing.runs import Kind, Run

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

HASH_KEYS: dict[Kind, str] = {
    "pipeline": "model_sha256",
    "lora": "lora_sha256",
    "controlnet": "controlnet_sha256",
    "decoder": "decoder_sha256",
}
"""Entry of a score file with the hash of what it measured."""
PARTNER_KEYS: dict[Kind, str] = {
    "lora": "model_sha256",
    "controlnet": "model_sha256",
    "decoder": "vae_sha256",
}
"""Entry with the hash of the pipeline (or, for a decoder, of the VAE) that it was measured with."""
TITLES = {
    "fid": "FID",
    "clip_score": "CLIP score",
    "caption_accuracy": "caption accuracy",
    "attribute_accuracy": "attribute accuracy",
    "kid": "KID",
    "diversity": "diversity",
    "style_accuracy": "style accuracy",
    "psnr_db": "PSNR, dB",
    "psnr_loss_db": "PSNR lost to the base's decoder, dB",
}
SECTION = "## Measured"
HEAD = ("metric", "value", "95 % interval", "images", "steps", "guidance", "scale", "protocol", "hash")
"""Of the card's table in that section."""


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
    steps: int | None
    """Of the sampler; None for a decoder, which was measured without one."""
    guidance_scale: float | None
    """Of the sampler; at most 1 is none."""
    scale: float | None
    """Of a LoRA or ControlNet."""
    partner_hash: str | None
    """Of the pipeline that a LoRA or ControlNet was measured with, or of the VAE whose latents a decoder decoded."""
    source: str
    """Score file, relative to the run."""

    @property
    def title(self) -> str:
        return TITLES.get(self.metric, self.metric.replace("_", " "))

    @property
    def interval(self) -> str:
        """The 95 % interval, as printed."""
        return "none" if self.low is None or self.high is None else f"{self.low:.4g} to {self.high:.4g}"

    def cells(self) -> tuple[str, ...]:
        """Row of the card's table."""
        guided = "" if self.guidance_scale is None else f"{self.guidance_scale:g}"
        return (
            cell(self.title),
            f"{self.value:.6g}",
            self.interval,
            str(self.samples),
            "" if self.steps is None else str(self.steps),
            "none" if self.guidance_scale is not None and self.guidance_scale <= 1 else guided,
            "" if self.scale is None else f"{self.scale:g}",
            cell(self.protocol),
            f"`{self.hash}`",
        )

    def result(self) -> EvalResult:
        """Entry of the card's header."""
        from huggingface_hub import EvalResult

        names = ("hash", "samples", "low", "high", "steps", "guidance_scale", "scale", "partner_hash")
        found = asdict(self)
        return EvalResult(
            task_type="text-to-image",
            dataset_type=self.protocol,
            dataset_name=self.protocol,
            metric_type=self.metric,
            metric_name=self.title,
            metric_value=self.value,
            metric_args={name: found[name] for name in names if found[name] is not None},
        )


def cell(text: str) -> str:
    """Text that a row of a Markdown table can hold."""
    return one_line(text).replace("|", "\\|")


def table(numbers: Sequence[Number]) -> str:
    """The card's table, Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(number.cells() for number in numbers)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@dataclass(frozen=True)
class Scores:
    """What was measured of a run."""

    numbers: Sequence[Number]
    skipped: Sequence[str]
    """JSON files beside the score files that have no `metrics`."""


def read_scores(run: Run, settings: Settings, partner: Path) -> Scores:
    """Reads the score files of a run, which `python -m evaluation.evaluate --out RUN/NAME.json` writes.

    Args:
        run: score files are *.json in its folder and in `scores/`, if they have `metrics` with hashes.
        settings: of the card's code, which the numbers must have.
        partner: folder of the pipeline that a LoRA, ControlNet or decoder is used with there.

    Raises:
        UserError: for a number that contradicts its own file or the card's code: of other weights, another student or base,
            other steps, outside its interval, changed settings.
    """
    try:
        exported, paired = hash_of_export(run), hash_of_partner(run, partner)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    numbers, skipped = [], []
    for path in sorted([*run.folder.glob("*.json"), *run.folder.glob("scores/*.json")]):
        source = path.relative_to(run.folder).as_posix()
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"'{path}' cannot be read as JSON ({error}).") from error
        if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
            skipped += [source] * (source != ORIGIN)
            continue
        found = content.get(HASH_KEYS[run.kind])
        if found != exported:
            raise UserError(
                f"'{path}' has scores of a {run.kind} with hash {found}, and this run exported {exported}; measure the "
                "exported one again, or remove the file."
            )
        _check_alone(content, run, path)
        for number in _numbers_of(content, run.kind, path, source):
            _check_called(number, run, settings, paired, path)
            numbers.append(number)
    return Scores(numbers, skipped)


def hash_of_partner(run: Run, partner: Path) -> str | None:
    """Hash of the pipeline that a LoRA or ControlNet is used with, or of the VAE that a decoder replaces."""
    if run.kind == "pipeline":
        return None
    return hash_weights(partner / "vae") if run.kind == "decoder" else hash_model(partner)


def _check_alone(content: dict[str, Any], run: Run, path: Path) -> None:
    """Raises UserError if something else was measured together with what the run made."""
    others = {HASH_KEYS["lora"], HASH_KEYS["controlnet"]} - {HASH_KEYS[run.kind]}
    found = sorted(name.removesuffix("_sha256") for name in others if content.get(name) is not None)
    if found:
        raise UserError(
            f"'{path}' has scores of the {run.kind} together with a {found[0]}, which are not its own; move the file away."
        )
    changed = [name for name in ("scheduler", "timesteps") if content.get(name)]
    if changed:
        raise UserError(
            f"'{path}' was measured with {changed[0]} {content[changed[0]]}, and the card's code has the pipeline's own; "
            "measure again, or move the file away."
        )


def _check_called(number: Number, run: Run, settings: Settings, partner_hash: str | None, path: Path) -> None:
    """Raises UserError if a number is of another call than the card's code."""
    if number.partner_hash != partner_hash:
        what = "the VAE" if run.kind == "decoder" else "the pipeline"
        raise UserError(
            f"'{path}': {number.metric} was measured with {what} {number.partner_hash}, and the card's code uses "
            f"{partner_hash}; measure with that one, or name the other as --partner."
        )
    if number.steps is None or number.guidance_scale is None:
        return
    guided = number.guidance_scale if number.guidance_scale > 1 else 0.0
    called = settings.guidance_scale if settings.guidance_scale > 1 else 0.0
    if (number.steps, guided) != (settings.steps, called):
        more = (
            "; give these as --steps and --guidance_scale, or measure again"
            if run.for_base
            else "; measure again"
        )
        raise UserError(
            f"'{path}': {number.metric} was measured with {number.steps} step(s) and guidance {number.guidance_scale:g}, and "
            f"the card's code has {settings.steps} and {settings.guidance_scale:g}{more}."
        )


def hash_of_export(run: Run) -> str:
    """Hash of what the run exported, as score files name it."""
    if run.kind == "lora":
        return hash_lora(run.exported)
    return hash_model(run.exported) if run.kind == "pipeline" else hash_weights(run.exported)


def _numbers_of(content: dict[str, Any], kind: Kind, path: Path, source: str) -> list[Number]:
    protocol = content.get("protocol", {})
    name = str(protocol.get("name") if isinstance(protocol, dict) else protocol)
    sampled = kind != "decoder"
    numbers = []
    for metric, one in content["metrics"].items():
        try:
            settings = one["settings"]
            scale = content["lora_scale"] if kind == "lora" else None
            if kind == "controlnet":  # a file has several
                scale = settings["conditioning_scale"]
            number = Number(
                metric,
                float(one["value"]),
                one.get("low"),
                one.get("high"),
                int(one["samples"]),
                name,
                one["hash"],
                int(content["nfe"]) if sampled else None,
                float(content["guidance_scale"]) if sampled else None,
                None if scale is None else float(scale),
                content[PARTNER_KEYS[kind]] if kind in PARTNER_KEYS else None,
                source,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"'{path}': {metric} lacks a value, samples, hash or settings, or the file what it was measured with "
                f"({error!r})."
            ) from error
        _check(number, content.get(metric), settings, path)
        numbers.append(number)
    return numbers


def _check(number: Number, top: Any, settings: dict[str, Any], path: Path) -> None:
    """Raises UserError if a number contradicts the rest of its file."""
    for name in ("value", "low", "high", "guidance_scale", "scale"):
        found = getattr(number, name)
        if found is not None and not (isinstance(found, int | float) and math.isfinite(found)):
            raise UserError(
                f"'{path}': {name} of {number.metric} is {found!r}, and not a finite number; measure again."
            )
    counted = settings.get("samples")
    if number.samples < 1 or (isinstance(counted, int) and number.samples > counted):
        raise UserError(
            f"'{path}': {number.metric} says {number.samples} images, and its settings {counted}: the file was altered, "
            "measure again."
        )
    if isinstance(top, int | float) and float(top) != number.value:
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


def check_card(text: str, numbers: Sequence[Number], licence: str) -> None:
    """Checks that each number of a card is one of the run's, with all that it depends on.

    Args:
        text: the card: the table of its section "Measured", and the results in its header.
        numbers: those of the run's score files.
        licence: of the base, which the header has to name.

    Raises:
        UserError: for a number that is not found there, a card whose header cannot be parsed, or another licence.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if numbers and SECTION not in [line.strip() for line in text.splitlines()]:
        raise UserError(f"README.md has no section '{SECTION}' for the run's numbers; write the card again.")
    known = {_plain(number.cells()) for number in numbers} | {HEAD, ("---",) * len(HEAD)}
    for row in _rows(text):
        if _plain(_cells(row)) not in known:
            raise UserError(
                f"README.md has a row that the run's scores do not have: {row.strip()}. Write the card again, or measure again."
            )
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
        given = data.to_dict().get("license")
        results = (data.eval_results if isinstance(data, ModelCardData) else None) or []
    except Exception as error:  # huggingface_hub raises what yaml and its own checks raise
        raise UserError(
            f"the header of README.md cannot be parsed ({' '.join(str(error).split())})."
        ) from error
    if given != licence:
        raise UserError(
            f"the header of README.md has the license {given}, and what was made from the base is under its {licence}; write "
            "that there."
        )
    expected = [number.result() for number in numbers]
    for result in results:
        if result not in expected:
            raise UserError(
                f"the header of README.md gives {result.metric_type} {result.metric_value} with {result.metric_args}, which "
                "the run's scores do not have. Write the card again, or measure again."
            )


def _rows(text: str) -> list[str]:
    """Lines of tables in the section "Measured", and elsewhere those with a cell like a hash."""
    found, inside = [], False
    for line in text.splitlines():
        if line.lstrip().startswith(("# ", "## ")):
            inside = line.strip() == SECTION
        hashed = line.lstrip().startswith("|") and any(_is_hash(one) for one in _plain(_cells(line)))
        if hashed or (inside and "|" in line):
            found.append(line)
    return found


def _cells(row: str) -> list[str]:
    """Cells of a row of a table; a bar with a backslash in front is text."""
    return re.split(r"(?<!\\)\|", row.strip().removeprefix("|").removesuffix("|"))


def _plain(cells: Sequence[str]) -> tuple[str, ...]:
    return tuple(cell.strip().strip("`").strip() for cell in cells)


def _is_hash(cell: str) -> bool:
    return len(cell) == 12 and set(cell) <= set("0123456789abcdef")
