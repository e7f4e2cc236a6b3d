"""Coverage of the metrics' 95 % intervals: `python -m evaluation.benchmarks.coverage --out FILE.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from sdxs_lightning.command_line import Option, run_command


@dataclass(frozen=True, kw_only=True)
class CoverageOptions:
    """Simulates how often the metrics' 95 % intervals cover the true mean."""

    EXAMPLES: ClassVar[str] = (
        "python -m evaluation.benchmarks.coverage --out evaluation/results/coverage.json"
    )

    counts: Annotated[tuple[int, ...], Option(at_least=2)] = (100, 1000, 5000)
    """Numbers of images."""
    metrics: tuple[str, ...] = ()
    """Metrics; by default all."""
    scale: float = 1.0
    """Factor of the numbers of trials."""
    out: Annotated[Path | None, Option(metavar="FILE.json")] = None
    """Result to write, or to extend by other numbers of images or other metrics."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(
        "python -m evaluation.benchmarks.coverage",
        CoverageOptions,
        "evaluation.benchmarks.interval_coverage.run",
        arguments,
    )


if __name__ == "__main__":
    main()
