"""Runs the sections, each in a process of its own, and writes JSON and a table."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from evaluation.benchmarks.gpu.options import SECTIONS, GpuOptions
from evaluation.benchmarks.gpu.section import Row, Task, run_section
from evaluation.reports.result_file import write_result
from sdxs_lightning.command_line import terminated_as_exit
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError

PRELOADED = ["evaluation.benchmarks.gpu.distillation", "evaluation.benchmarks.gpu.stages"]
OVERRUN = 2.0
"""A section may take so many times its expected seconds."""
SHORTEST_SECONDS = 5.0
"""Less than this is not worth the start of a process."""
ROOT = Path(__file__).resolve().parents[3]
_MACHINE = """
import json, torch
found = {} if not torch.cuda.is_available() else {
    "device": torch.cuda.get_device_name(), "gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30)}
print(json.dumps(found))
"""


def run(options: GpuOptions) -> str:
    """Runs what the options ask for and returns the table.

    Raises:
        UserError: without a GPU, or for an earlier file of another machine or another size.
        CheckpointNotWritten: if the file cannot be written.
    """
    if options.dry_run:
        return _expected(options)
    with terminated_as_exit():
        return _measured(options)


def _measured(options: GpuOptions) -> str:
    """Runs the sections and returns the table."""
    deadline = time.monotonic() + 60 * options.minutes
    machine = _machine(options.device)
    results = _earlier(options, machine)
    _write(options.out, results)  # a folder that cannot be written is found before the first minute of a GPU
    names = [name for name in SECTIONS if name in options.only or not options.only]
    for name in names:
        earlier = results["sections"].get(name, {"status": "did not fit", "rows": []})
        if options.resume and earlier["status"] == "complete" and not _failed(earlier["rows"]):
            continue
        left = deadline - time.monotonic()
        if left < SHORTEST_SECONDS:
            results["sections"].setdefault(name, earlier)
            _write(options.out, results)
            continue
        # The last one may take all that is left.
        expected = left if name == names[-1] else min(left, SECTIONS[name].seconds)
        section, stopped = _run_section(
            name, options, min(left, OVERRUN * expected), expected, earlier["rows"]
        )
        results["sections"][name] = section
        _write(options.out, results)
        if stopped is not None:
            raise stopped
    return as_table(results)


def _write(out: Path, results: dict[str, Any]) -> None:
    try:
        write_result(out, results)
    except OSError as error:
        raise CheckpointNotWritten(f"--out '{out}' could not be written: {error}") from error


def _machine(device: str) -> dict[str, Any]:
    """What tells machines apart; asked in a process of its own, since this one is to leave the whole GPU to the sections."""
    if device == "cpu":
        return {"device": f"{platform.machine()} CPU"}
    asked = subprocess.run([sys.executable, "-c", _MACHINE], capture_output=True, text=True, check=False)
    found: dict[str, Any] = json.loads(asked.stdout or "{}")
    if not found:
        raise UserError(
            "there is no GPU that torch can use; run on one, or check the command with --device cpu --tiny."
        )
    return found


def _earlier(options: GpuOptions, machine: dict[str, Any]) -> dict[str, Any]:
    fresh: dict[str, Any] = {"machine": machine, "tiny": options.tiny, "sections": {}}
    if not options.out.is_file():
        return fresh
    try:
        earlier: dict[str, Any] = json.loads(options.out.read_text())
        same = (earlier["machine"], earlier["tiny"]) == (machine, options.tiny)
        for section in earlier["sections"].values():
            _check_section(section)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{options.out}' is not a result of this command; give another --out.") from error
    if not same:
        raise UserError(
            f"'{options.out}' is of {earlier['machine']}{' at tiny size' if earlier['tiny'] else ''}, this run of {machine}"
            f"{' at tiny size' if options.tiny else ''}; give another --out."
        )
    return earlier


def _check_section(section: dict[str, Any]) -> None:
    """Raises an error of Python for what `_run_section` does not return."""
    for row in section["rows"]:
        row["labels"].items()
    section["status"].strip()


def _failed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "error" in row]


def _run_section(
    name: str, options: GpuOptions, seconds: float, expected: float, earlier: list[Row]
) -> tuple[dict[str, Any], BaseException | None]:
    """The rows that a section wrote until its end, in the place of its earlier ones, and what ends the command with it.

    However the section ended: by itself, killed, or by Ctrl-C or SIGTERM, which are for the command and returned.
    """
    known = [row for row in earlier if "error" not in row] if options.resume else []
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log.txt"
        task = Task(
            implementation=SECTIONS[name].implementation,
            rows=str(rows),
            seconds=seconds,
            expected_seconds=expected,
            device=options.device,
            tiny=options.tiny,
            log=str(log),
            files=str(options.files.resolve()),
            known=known,
        )
        started = time.monotonic()
        code, stopped = None, None
        try:
            code = _exit_code(task)
        except (KeyboardInterrupt, SystemExit) as error:
            stopped = error
        lines = [json.loads(line) for line in _whole_lines(rows)]
        section: dict[str, Any] = {
            "status": "interrupted" if stopped else _status(code),
            "seconds": round(time.monotonic() - started, 1),
            "rows": _merged(earlier, [line for line in lines if "labels" in line]),
        }
        if code != 0 and lines and "begun" in lines[-1]:
            section["ended_in"] = lines[-1]["begun"]
        if code:
            section["error"] = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        return section, stopped


def _exit_code(task: Task) -> int | None:
    """Runs a section; None if it was killed at its time."""
    # A fork server that has imported torch and diffusers saves each section their imports, unless it asked CUDA for GPUs
    # meanwhile; with NVML it does not.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_section, args=(task,), daemon=False)
    process.start()
    assert process.pid is not None
    try:
        process.join(task.seconds)
        return process.exitcode
    finally:
        try:  # pytest and train.py, which sections start, would keep the GPU
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()  # it was not yet the leader of its group
        process.join()


def _status(code: int | None) -> str:
    if code is None:
        return "out of time"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"failed with exit code {code}" if code else "complete"


def _whole_lines(file: Path) -> list[str]:
    """All but a last line that the end of the process cut."""
    return file.read_text().split("\n")[:-1] if file.exists() else []


def _merged(earlier: list[Row], measured: list[Row]) -> list[Row]:
    """Rows by their labels: what was measured now replaces what was measured then."""
    by_labels = {json.dumps(row["labels"], sort_keys=True): row for row in [*earlier, *measured]}
    return list(by_labels.values())


def as_table(results: dict[str, Any]) -> str:
    """Markdown: a table per section, its status above; at the end what did not fit."""
    lines = [f"# {results['machine']['device']}{' (tiny sizes)' if results['tiny'] else ''}"]
    for name, section in results["sections"].items():
        ended = f", in {_listed(section['ended_in'])}" if "ended_in" in section else ""
        lines += ["", f"## {name}: {section['status']}{ended}", ""]
        rows = [row["labels"] | {key: row[key] for key in row if key != "labels"} for row in section["rows"]]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if columns:
            lines += [_line(columns), _line(["---"] * len(columns))]
            lines += [_line([_shown(row.get(column, "")) for column in columns]) for row in rows]
    unfinished = [name for name, one in results["sections"].items() if one["status"] != "complete"]
    if unfinished:
        lines += ["", f"Not complete: {', '.join(unfinished)}; go on with --resume."]
    return "\n".join(lines)


def _listed(labels: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in labels.items())


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("\n", " ").replace("|", "\\|")


def _expected(options: GpuOptions) -> str:
    names = [name for name in SECTIONS if name in options.only or not options.only]
    lines = [_line(["section", "seconds", "GiB"]), _line(["---"] * 3)]
    lines += [_line([name, str(SECTIONS[name].seconds), str(SECTIONS[name].gigabytes)]) for name in names]
    total = sum(SECTIONS[name].seconds for name in names)
    return "\n".join([*lines, "", f"{total:.0f} s in all, of {60 * options.minutes:.0f} s"])
