"""Score images: `python -m evaluation.evaluate --model DIR | --images SET --protocol NAME --out FILE.json`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from data.prepare.common.machine import choose_device
from evaluation.images.samples import DTYPES, ModelSamples, PipelineImages
from evaluation.protocols.protocols import NAMES
from evaluation.reports.html_report import write_report
from evaluation.reports.tables import result_markdown
from evaluation.runner.evaluator import EvaluationRequest, EvaluationResult, Resources, run_evaluation
from evaluation.runner.machine import milliseconds_per_image, where
from evaluation.runner.requests import build_request
from sdxs_lightning.core.errors import RunStopped

__all__ = ["PipelineImages", "main"]

EPILOG = """examples:
  python -m evaluation.evaluate --model outputs/quickstart/pipeline --protocol toy --out student.json
  python -m evaluation.evaluate --model DIR --steps 25 --guidance_scale 7.5 --protocol coco2014-30k-256 \\
      --captions captions_val2014.json --reference val2014 --out teacher.json
  python -m evaluation.evaluate --images samples.zip --protocol clean --reference real.npz --metrics fid --out samples.json

A run that was stopped goes on where it stood when the command is given again with the same --out."""


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], EvaluationResult, EvaluationRequest]:
    """Measures what the options ask for.

    Raises:
        RunStopped: with one sentence, for whatever the user can mend.
    """
    started = time.perf_counter()
    device = choose_device(options.device)
    request = build_request(options)
    if isinstance(request.samples, ModelSamples):
        request.samples.check()
    with ExitStack() as stack:
        work = options.work or (options.out and options.out.with_suffix(".work"))
        work = Path(work or stack.enter_context(tempfile.TemporaryDirectory(prefix="evaluation-")))
        resources = Resources(device, options.processes, options.batch_size)
        evaluated = run_evaluation(request, resources, work, options.pictures)
    result = describe(options, request, evaluated, torch.device(device))
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result, evaluated, request


def describe(
    options: argparse.Namespace, request: EvaluationRequest, evaluated: EvaluationResult, device: torch.device
) -> dict[str, Any]:
    """The result file: what was measured, the numbers, how they were obtained."""
    result: dict[str, Any] = {}
    if isinstance(request.samples, ModelSamples):
        result |= {"model": options.model, **request.samples.origin()}
    else:
        result |= {"images": options.images, **request.samples.origin(), "formats": request.samples.formats}
    result |= {name: entry["value"] for name, entry in evaluated.metrics.items()}
    result["samples"] = request.samples.count
    if isinstance(request.samples, ModelSamples) and request.captions:
        maker = request.samples.maker(device)
        result["ms_per_image"] = milliseconds_per_image(maker, request.captions[0])
    named = {"name": request.protocol.name, "version": request.protocol.version}
    source = {"source": request.protocol.source}
    result["protocol"] = {**(named if request.fingerprint is None else request.fingerprint[1]), **source}
    return {**result, "metrics": evaluated.metrics, **where(device)}


def write_files(
    out: Path, result: dict[str, Any], evaluated: EvaluationResult, request: EvaluationRequest
) -> None:
    """FILE.json, FILE.md and FILE.html."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    out.with_suffix(".md").write_text(result_markdown(result))
    write_report(
        out.with_suffix(".html"), result, evaluated.images, request.captions, evaluated.reference_images
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = _parser().parse_args(arguments)
    try:
        result, evaluated, request = evaluate(options)
        if options.out is not None:
            write_files(options.out, result, evaluated, request)
    except (RunStopped, OSError, ValueError) as error:
        sys.exit(f"evaluate: {error}")
    sys.stdout.write(result_markdown(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.evaluate",
        description="FID, CLIP score and other numbers of a model or of images, under a named protocol.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="diffusers pipeline folder (SD or SDXL kind)")
    what.add_argument("--images", metavar="SET", help="folder, .zip file or .tar shards of images")
    add = parser.add_argument
    add("--protocol", default="toy", choices=NAMES, metavar="NAME", help=f"{', '.join(NAMES)} (default: toy)")
    add("--captions", metavar="FILE", help="prompts: COCO's json, or txt, json, csv, tsv, parquet")
    add("--reference", metavar="SET|NPZ", help="real images, or the npz of `python -m evaluation.reference`")
    add("--metrics", nargs="+", metavar="NAME", help="default: the protocol's; also " + ", ".join(FURTHER))
    add(
        "--samples",
        type=_count,
        metavar="N",
        help="another number of images than the protocol's; another hash",
    )
    add("--steps", type=_count, default=1, help="network calls of the model (default: %(default)s)")
    add("--guidance_scale", type=float, default=0.0, help="0 means none (default: %(default)s)")
    add("--seed", type=int, help="of the noise (default: the protocol's)")
    add(
        "--image_px",
        type=_count,
        metavar="PX",
        help="side of the images (default: the protocol's, or the model's)",
    )
    add("--precision", choices=list(DTYPES), default="fp32", help="of the model (default: %(default)s)")
    add("--batch_size", type=_count, default=100, help="images at once (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add(
        "--processes",
        type=_count,
        metavar="N",
        help="default: one a GPU or core, where there is enough to do",
    )
    add(
        "--weights",
        nargs="+",
        default=[],
        metavar="KIND=PATH",
        help="judges from here: inception, clip_text, ...",
    )
    add("--pictures", type=int, default=24, metavar="N", help="in the HTML report (default: %(default)s)")
    add("--work", type=Path, metavar="DIR", help="what is measured so far (default: FILE.work beside --out)")
    add("--out", type=Path, metavar="FILE.json", help="writes FILE.json, FILE.md and FILE.html")
    return parser


FURTHER = (
    "patch_fid",
    "kid",
    "precision_recall",
    "cmmd",
    "fd_dinov2",
    "clip_score",
    "pickscore",
    "hpsv2",
    "diversity",
)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of 1 or more")
    return int(text)


if __name__ == "__main__":
    main()
