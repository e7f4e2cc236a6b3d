"""`python -m evaluation` lists the commands of this package and runs them: `python -m evaluation evaluate --help`."""

from __future__ import annotations

from collections.abc import Sequence

from sdxs_lightning.command_line import Command, run_subcommand

COMMANDS = (
    Command("evaluate", "evaluation.evaluate.EvaluateOptions", "evaluation.runner.commands.evaluate"),
    Command("compare", "evaluation.compare.CompareOptions", "evaluation.compare.compare"),
    Command("latency", "evaluation.latency.LatencyOptions", "evaluation.benchmarks.latency.command.latency"),
    Command("reference", "evaluation.reference.ReferenceOptions", "evaluation.runner.commands.reference"),
)
DESCRIPTION = """FID, CLIP score and other metrics of text-to-image models, under named protocols (evaluation/README.md).
Benchmarks: python -m evaluation.benchmarks.NAME with NAME one of tables, passes, step_profile, score_precision,
score_repair, throughput, coverage, start_up, gpu, runtime_exports."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_subcommand("python -m evaluation", DESCRIPTION, COMMANDS, arguments)


if __name__ == "__main__":
    main()
