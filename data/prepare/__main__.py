"""The command line: `python -m data.prepare images|latents|pairs|verify --help`."""

from __future__ import annotations

import argparse
import sys

from data.prepare.common.subcommand import Subcommand
from data.prepare.images.command import IMAGES
from data.prepare.latents.command import LATENTS
from data.prepare.pairs.command import PAIRS
from data.prepare.verify.command import VERIFY
from sdxs_lightning.core.errors import RunStopped

SUBCOMMANDS: tuple[Subcommand, ...] = (IMAGES, LATENTS, PAIRS, VERIFY)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; exit codes as in `sdxs_lightning.core.errors`."""
    options = _parser().parse_args(arguments)
    try:
        sys.stdout.write(f"{options.run(options)}\n")
    except RunStopped as stop:
        sys.stderr.write(f"prepare {options.command}: {stop}\n")
        sys.exit(stop.exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description="Prepare data before a training.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for one in SUBCOMMANDS:
        child = commands.add_parser(
            one.name,
            help=one.summary,
            description=one.summary,
            epilog=one.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        one.add_arguments(child)
        child.set_defaults(run=one.run)
    return parser


if __name__ == "__main__":
    main()
