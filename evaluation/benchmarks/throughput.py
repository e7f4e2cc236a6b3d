"""Speed of everything around the networks: `python -m evaluation.benchmarks.throughput data|index|resume|metrics|shards`.

Timings are meaningful as ratios within one run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar

from sdxs_lightning.command_line import Command, Option, run_subcommand
from sdxs_lightning.core.errors import RunStopped

PROGRAM = "python -m evaluation.benchmarks.throughput"
Count = Annotated[int, Option(at_least=1)]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options of every benchmark."""

    out: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(Output):
    """Times reading shards against the webdataset package on the same files."""

    EXAMPLES: ClassVar[str] = f"{PROGRAM} data --out evaluation/results/throughput_data.json"

    jpegs: Count = 2000
    """JPEG samples."""
    latents: Count = 2000
    """Latent samples."""
    index_samples: Count = 1_000_000
    """Samples of the index whose resume is timed."""
    workers: Count = 2
    """Worker processes."""
    step_seconds: float = 0.25
    """Duration of a training step that uses no CPU."""
    memory_seconds: float = 60.0
    """Duration of the memory trace."""
    repeats: Count = 3
    """Repeats of every timing."""
    plot: Path | None = None
    """PNG file of memory against time."""


@dataclass(frozen=True, kw_only=True)
class IndexOptions(Output):
    """Opens the index of a large set in several processes at once: the packed index against a sidecar for each shard."""

    EXAMPLES: ClassVar[str] = f"{PROGRAM} index --out evaluation/results/throughput_index.json"

    shards: Count = 10_000
    """Shards; the files are sparse."""
    samples_per_shard: Count = 1000
    """Samples of each."""
    processes: Count = 8
    """Processes of the node that open the packed index."""
    sidecar_processes: Count = 1
    """Processes that open the sidecars (memory: 650 MB each)."""
    folder: Path | None = None
    """Parent of the temporary folder of the set (1.3 GB); by default that of the system."""


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(Output):
    """Kills runs with SIGKILL at random steps and checks that each resumed run equals the uninterrupted one."""

    EXAMPLES: ClassVar[str] = f"{PROGRAM} resume --kills 50 --out evaluation/results/resume_kills.json"

    kills: Count = 50
    """Number of trials."""
    workers: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of worker processes to choose from."""
    seed: int = 0
    """Seed of the moments of the kills."""


@dataclass(frozen=True, kw_only=True)
class MetricsOptions(Output):
    """Times the metrics against other packages."""

    EXAMPLES: ClassVar[str] = f"{PROGRAM} metrics --out evaluation/results/throughput_metrics.json"

    dimensions: Count = 2048
    """Dimensions of the features (Inception: 2048)."""
    samples: Count = 5000
    """Images per side, more than dimensions."""
    few: Count = 500
    """Images per side, fewer than dimensions."""
    ranks: Count = 8
    """Gloo processes that exchange their states."""
    repeats: Count = 3
    """Repeats of every timing; the fastest counts, since the machine may be busy."""
    torchmetrics_sync: bool = False
    """Also times torchmetrics' own exchange (memory: ranks x 130 MB each)."""


@dataclass(frozen=True, kw_only=True)
class ShardsOptions(Output):
    """Times making small shards by claims and by Ray (extra ray) against a plain loop, one process each."""

    EXAMPLES: ClassVar[str] = f"{PROGRAM} shards --out evaluation/results/throughput_shards.json"

    shards: Annotated[int, Option(at_least=2)] = 1000
    """Shards of each way."""
    images: Count = 32
    """Images of a shard."""
    repeats: Count = 2
    """Repeats of every timing; the fastest counts, since the machine may be busy."""


_OPTIONS = {
    "data": "DataOptions",
    "index": "IndexOptions",
    "resume": "ResumeOptions",
    "metrics": "MetricsOptions",
    "shards": "ShardsOptions",
}
COMMANDS = tuple(
    Command(
        name, f"evaluation.benchmarks.throughput.{options}", f"evaluation.benchmarks.throughput.run_{name}"
    )
    for name, options in _OPTIONS.items()
)


def _run(name: str, options: Output) -> str:
    """Run a benchmark and write its result.

    Raises:
        RunStopped: if the benchmark found a failure.
    """
    import torch  # after the options were parsed

    from evaluation.runner.machine import where
    from evaluation.user_errors import as_user_errors

    run: Callable[[Any], dict[str, Any]] = import_module(f"evaluation.benchmarks.throughput_{name}").run
    with as_user_errors():
        result = run(options)
        text = json.dumps(result | where(torch.device("cpu")), indent=2)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text + "\n")
    if result.get("failed"):
        sys.stdout.write(f"{text}\n")
        raise RunStopped(result["failed"])
    return text


run_data, run_index, run_resume, run_metrics, run_shards = (partial(_run, name) for name in _OPTIONS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_subcommand(PROGRAM, "Benchmarks of everything around the networks.", COMMANDS, arguments)


if __name__ == "__main__":
    main()
