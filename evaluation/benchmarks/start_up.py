"""Start-up time of the commands: `python -m evaluation.benchmarks.start_up --out evaluation/results/start_up.json`."""

from __future__ import annotations

import io
import os
import platform
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from PIL import Image

from evaluation.reports.result_file import write_result
from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.errors import UserError

ROOT = Path(__file__).parents[2]
BASELINE = "import torch"


@dataclass(frozen=True, kw_only=True)
class StartUpOptions:
    """Times --help, a refused option and small runs of the commands against `import torch`.

    Every repeat runs all commands once, so that a busy machine affects all of them alike. Printed and stored are medians of
    the elapsed and of the CPU time, and their ratios to `import torch` in the same run.
    """

    EXAMPLES: ClassVar[str] = (
        "python -m evaluation.benchmarks.start_up --out evaluation/results/start_up.json"
    )

    out: Annotated[Path | None, Option(metavar="FILE.json")] = None
    """Result."""
    repeats: Annotated[int, Option(at_least=1)] = 3
    """Runs of each command."""


class TimedCommand(NamedTuple):
    """A command with its expected exit code and time."""

    arguments: tuple[str, ...]
    """Arguments of the interpreter."""
    exit_code: int = 0
    goal: float | None = None
    """Maximum ratio of its time to that of `import torch`."""


def commands(shards: Path) -> dict[str, TimedCommand]:
    """Timed commands by name.

    Args:
        shards: folder for `verify`.
    """
    light = 0.3
    found = {
        BASELINE: TimedCommand(("-c", "import torch")),
        "import lightning.pytorch": TimedCommand(("-c", "import lightning.pytorch")),
        "import torch, diffusers": TimedCommand(("-c", "import torch, diffusers")),
        "data.prepare": TimedCommand(("-m", "data.prepare"), 0, light),
        "evaluation": TimedCommand(("-m", "evaluation"), 0, light),
    }
    for module in (
        "data.prepare images",
        "data.prepare latents",
        "data.prepare pairs",
        "data.prepare verify",
    ):
        found[f"{module} --help"] = TimedCommand(("-m", *module.split(), "--help"), 0, light)
    for module in ("evaluate", "compare", "reference"):
        found[f"evaluation.{module} --help"] = TimedCommand(
            ("-m", f"evaluation.{module}", "--help"), 0, light
        )
    found["sdxs_lightning.prune --help"] = TimedCommand(("-m", "sdxs_lightning.prune", "--help"), 0, light)
    for module in ("data.prepare pairs", "evaluation.evaluate", "sdxs_lightning.prune"):
        refused = ("-m", *module.split(), "--no_such_option", "1")
        found[f"{module} --no_such_option"] = TimedCommand(refused, UserError.exit_code, light)
    quickstart = ("train.py", "--config", "configs/quickstart.yaml", "--print_config")
    return found | {
        "data.prepare verify FOLDER": TimedCommand(("-m", "data.prepare", "verify", str(shards)), 0, 1.5),
        "train.py --help": TimedCommand(("train.py", "--help"), 0, light),
        "train.py --print_config": TimedCommand(quickstart, 0, 3.0),
        "train.py --no_such_option": TimedCommand(
            (*quickstart[:-1], "--no_such_option", "1"), UserError.exit_code, light
        ),
    }


def measure(timed: Mapping[str, TimedCommand], repeats: int) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield medians of each command and their ratios to the baseline after each repeat.

    Raises:
        UserError: for a command with an unexpected exit code.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, command in timed.items():
            seconds[name].append(_run(name, command))
        medians = {
            name: [statistics.median(one) for one in zip(*rows, strict=True)]
            for name, rows in seconds.items()
        }
        elapsed, cpu = medians[BASELINE]
        yield {
            name: {
                "seconds": round(median[0], 3),
                "cpu_seconds": round(median[1], 3),
                "ratio": round(median[0] / elapsed, 3),
                "cpu_ratio": round(median[1] / cpu, 3),
                "goal": timed[name].goal,
            }
            for name, median in medians.items()
        }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Result as aligned text; commands above their goal are marked."""
    lines = [f"{'':<36}seconds   ratio  CPU ratio   goal"]
    for name, row in rows.items():
        goal = "" if row["goal"] is None else f"{row['goal']:.1f}"
        above = "  above" if row["goal"] is not None and row["ratio"] > row["goal"] else ""
        lines.append(
            f"{name:<36}{row['seconds']:7.2f} {row['ratio']:7.2f} {row['cpu_ratio']:10.2f} {goal:>6}{above}"
        )
    return "\n".join(lines)


def run(options: StartUpOptions) -> str:
    """Measure, and write the file after every repeat.

    Raises:
        UserError: for a command with an unexpected exit code.
    """
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _write_shard(Path(folder))
        for repeat, rows in enumerate(measure(commands(Path(folder)), options.repeats), 1):
            load = {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 2)}
            result = {"commands": rows, "repeats": repeat, "python": platform.python_version(), **load}
            if options.out is not None:
                write_result(options.out, result)
    return table(rows)


def _run(name: str, command: TimedCommand) -> tuple[float, float]:
    """Elapsed and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run(
        [sys.executable, *command.arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode != command.exit_code:
        last = (ended.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise UserError(
            f"'{name}' ended with exit code {ended.returncode} instead of {command.exit_code}: {last}"
        )
    return elapsed, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _write_shard(folder: Path) -> None:
    """One shard of eight images."""
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(8):
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), (30 * i, 10, 10)).save(stream, "JPEG")
            for extension, content in (("jpg", stream.getvalue()), ("txt", f"image {i}".encode())):
                member = tarfile.TarInfo(f"{i:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command("python -m evaluation.benchmarks.start_up", StartUpOptions, run, arguments)


if __name__ == "__main__":
    main()
