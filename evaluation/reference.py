"""Write what FID and others compare with: `python -m evaluation.reference --protocol clean --images val2014 --out val.npz`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data.prepare.common.machine import choose_device
from evaluation.images.image_sets import open_images
from evaluation.images.samples import StoredSamples
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.protocols.image_protocol import ImageProtocol
from evaluation.protocols.metric_table import shared_networks
from evaluation.protocols.names import REFERENCE_METRICS
from evaluation.protocols.protocols import NAMES, PROTOCOLS, find_protocol, get_protocol
from evaluation.protocols.references import write_reference
from evaluation.runner.evaluator import EvaluationRequest, Resources, build_pass
from evaluation.runner.passes import run_pass
from evaluation.runner.requests import parse_weights
from evaluation.runner.scores import measure_reference
from sdxs_lightning.core.errors import RunStopped, UserError

EPILOG = """examples:
  python -m evaluation.reference                                   # the toy world's, again after training another CLIP
  python -m evaluation.reference --protocol coco2014-30k-256 --images val2014 --out coco2014.npz
  python -m evaluation.reference --protocol clean --images val2017.zip --metrics fid kid --out val2017.npz"""


def write_toy(name: str) -> str:
    """The statistics of a protocol of the toy world; returns what to tell."""
    protocol = get_protocol(name)
    statistics = measure_reference(protocol, FrozenClip(protocol.path(protocol.clip)))
    statistics.save(protocol.path(protocol.reference))
    return f"{name}: {statistics.count} images of the {protocol.split} split -> {protocol.reference}"


def write_images(protocol: ImageProtocol, options: argparse.Namespace) -> str:
    """The references of a protocol of published images; returns what to tell.

    Raises:
        UserError: for images or metrics that do not fit.
    """
    if options.images is None or options.out is None:
        raise UserError(f"protocol {protocol.name} needs --images, the real ones, and --out FILE.npz.")
    names = options.metrics or [
        one.metric for one in protocol.measurements if one.metric in REFERENCE_METRICS
    ]
    measurements = [protocol.measurement(name) for name in names]
    wrong = [name for name in names if name not in REFERENCE_METRICS]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)} compares with nothing; references are of {', '.join(REFERENCE_METRICS)}."
        )
    weights = tuple(sorted(parse_weights(text) for text in options.weights))
    networks = shared_networks(weights)
    identities = {one: networks.identity(one) for one in measurements}
    samples = StoredSamples(open_images(options.images))
    resources = Resources(choose_device(options.device), options.processes, options.batch_size)
    request = EvaluationRequest(protocol, samples, tuple(names), weights=weights)
    with tempfile.TemporaryDirectory(prefix="reference-") as temporary:
        work = options.work or Path(temporary)
        origin = samples.origin()
        job = build_pass(samples, measurements, identities, origin, request, resources, work, real=True)
        parts = run_pass(job, "reference")
    digest = samples.source.digest()
    files = [
        write_reference(
            options.out, metric_pass.measurement, identities[metric_pass.measurement], part.rows, digest
        )
        for metric_pass, part in parts.items()
    ]
    return f"{protocol.name}: {samples.count} images -> {', '.join(map(str, files))}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.reference",
        description="Measure the real images that FID compares with, and write their statistics (npz: mu, sigma).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--protocol", nargs="+", default=list(PROTOCOLS), choices=NAMES, metavar="NAME")
    add("--images", metavar="SET", help="real images: a folder, a .zip file or .tar shards")
    add("--out", type=Path, metavar="FILE.npz", help="other metrics' files lie beside it")
    add("--metrics", nargs="+", metavar="NAME", help="default: the protocol's")
    add("--batch_size", type=int, default=100, help="images at once (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add("--processes", type=int, metavar="N", help="default: one a GPU or core, where there is enough to do")
    add("--weights", nargs="+", default=[], metavar="KIND=PATH", help="judges from here: inception, ...")
    add("--work", type=Path, metavar="DIR", help="keeps what is measured, to go on after a stop")
    options = parser.parse_args(arguments)
    try:
        for name in options.protocol:
            protocol = find_protocol(name)
            told = write_images(protocol, options) if isinstance(protocol, ImageProtocol) else write_toy(name)
            sys.stdout.write(f"{told}\n")
    except (RunStopped, OSError, ValueError) as error:
        sys.exit(f"reference: {error}")


if __name__ == "__main__":
    main()
