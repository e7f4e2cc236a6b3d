"""The command line: `python -m data.prepare images|latents|pairs|verify --help`. It imports a command's code only to run it."""

from __future__ import annotations

from collections.abc import Sequence

from sdxs_lightning.command_line import Command, run_subcommand

COMMANDS = tuple(
    Command(name, f"data.prepare.{name}.options.{options}", f"data.prepare.{name}.command.run")
    for name, options in (
        ("images", "ImageOptions"),
        ("latents", "LatentOptions"),
        ("pairs", "PairOptions"),
        ("verify", "VerifyOptions"),
    )
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; exit codes as in `sdxs_lightning.core.errors`."""
    run_subcommand("python -m data.prepare", "Prepares data before a training.", COMMANDS, arguments)


if __name__ == "__main__":
    main()
