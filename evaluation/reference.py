"""Write the reference statistics of a protocol: `python -m evaluation.reference` (again after training another CLIP)."""

from __future__ import annotations

import argparse

from evaluation.features import FrozenClip
from evaluation.protocols import PROTOCOLS, get_protocol
from evaluation.scores import measure_reference


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.reference",
        description="Measure the real images that FID compares with, and write their statistics (npz: mu, sigma).",
        epilog="example: python -m evaluation.reference --protocol toy toy-val",
    )
    parser.add_argument(
        "--protocol", nargs="+", default=list(PROTOCOLS), choices=list(PROTOCOLS), metavar="NAME"
    )
    for name in parser.parse_args(arguments).protocol:
        protocol = get_protocol(name)
        statistics = measure_reference(protocol, FrozenClip(protocol.path(protocol.clip)))
        statistics.save(protocol.path(protocol.reference))
        print(f"{name}: {statistics.count} images of the {protocol.split} split -> {protocol.reference}")


if __name__ == "__main__":
    main()
