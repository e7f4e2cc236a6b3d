"""How fast the parts around the networks are: `python -m evaluation.benchmarks.throughput data|resume|metrics --out FILE.json`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from evaluation.runner.machine import where

_COMMANDS = {
    "data": "reading shards, against the webdataset package on the same files",
    "resume": "kill -9 at random moments, and whether what follows is what would have followed",
    "metrics": "the metrics, against other packages",
}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks.throughput",
        description="Benchmarks of everything that surrounds the networks. Timings mean something as ratios within one run.",
        epilog="example: python -m evaluation.benchmarks.throughput data --out evaluation/results/throughput_data.json",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in arguments[:1]:  # the others' packages need not be there
            module: Any = importlib.import_module(f"evaluation.benchmarks.throughput_{name}")
            module.add_arguments(command)
        command.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        result = module.run(options)
    except (OSError, ValueError) as error:
        sys.exit(f"throughput {options.command}: {error}")
    text = json.dumps(result | where(torch.device("cpu")), indent=2)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    if result.get("failed"):
        sys.exit(f"throughput {options.command}: {result['failed']}")


if __name__ == "__main__":
    main()
