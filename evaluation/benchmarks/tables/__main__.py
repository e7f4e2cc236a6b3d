"""The toy world's tables: `python -m evaluation.benchmarks.tables COMMAND`.

Nine commands measure and write a score file (JSON), two compute from score files, and `show` prints their tables. Existing
measurements for the same weights and protocol are kept, so an interrupted command resumes when it is run again.
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.benchmarks.tables.options import PROGRAM
from sdxs_lightning.command_line import Command, run_subcommand

PACKAGE = "evaluation.benchmarks.tables"

COMMANDS = tuple(
    Command(name, f"{PACKAGE}.options.{options}Options", f"{PACKAGE}.{run}.{name}")
    for name, options, run in (
        ("recipes", "Recipes", "scores"),
        ("unets", "UNets", "scores"),
        ("teacher", "Teacher", "scores"),
        ("quality", "Quality", "quality"),
        ("decoder", "Decoder", "decoder_quality"),
        ("size_conditioning", "SizeConditioning", "size_conditioning"),
        ("lora", "Lora", "lora"),
        ("image_to_image", "ImageToImage", "image_to_image"),
        ("guidance", "Guidance", "guidance"),
        ("seeds", "Seeds", "score_files"),
        ("paired", "Paired", "score_files"),
        ("show", "Show", "score_files"),
    )
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_subcommand(
        PROGRAM, "Measures the toy world's tables and prints them as Markdown.", COMMANDS, arguments
    )


if __name__ == "__main__":
    main()
