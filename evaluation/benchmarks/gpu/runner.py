"""Runs the sections, each in a process of its own, and writes JSON and a table."""

from __future__ import annotations

import json
import multiprocessing
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from evaluation.benchmarks.gpu.options import SECTIONS, GpuOptions
from evaluation.benchmarks.gpu.section import run_section
from sdxs_lightning.core.errors import UserError

PRELOADED = ["evaluation.benchmarks.gpu.distillation", "evaluation.benchmarks.gpu.stages"]
OVERRUN = 3.0
"""A section may take so many times its expected seconds."""
SHORTEST_SECONDS = 5.0
"""Less than this is not worth the start of a process."""


def run(options: GpuOptions) -> str:
    """Runs what the options ask for and returns the table.

    Raises:
        UserError: without a GPU, or for an earlier file of another machine or another size.
    """
    if options.dry_run:
        return _expected(options)
    machine = _machine(options.device)
    results = _earlier(options, machine)
    deadline = time.monotonic() + 60 * options.minutes
    names = [name for name in SECTIONS if name in options.only or not options.only]
    for name in names:
        if options.resume and results["sections"].get(name, {}).get("status") == "complete":
            continue
        left = deadline - time.monotonic()
        if left < SHORTEST_SECONDS:
            results["sections"].setdefault(name, {"status": "did not fit", "rows": []})
        else:
            results["sections"][name] = _run_section(
                name, options, min(left, OVERRUN * SECTIONS[name].seconds)
            )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return as_table(results)


def _machine(device: str) -> dict[str, str]:
    if device == "cpu":
        return {"device": f"{platform.machine()} CPU"}
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "there is no GPU that torch can use; run on one, or check the command with --device cpu --tiny."
        )
    return {"device": torch.cuda.get_device_name()}


def _earlier(options: GpuOptions, machine: dict[str, str]) -> dict[str, Any]:
    fresh: dict[str, Any] = {"machine": machine, "tiny": options.tiny, "sections": {}}
    if not options.out.is_file():
        return fresh
    try:
        earlier: dict[str, Any] = json.loads(options.out.read_text())
        same = (earlier["machine"], earlier["tiny"]) == (machine, options.tiny)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{options.out}' is not a result of this command; give another --out.") from error
    if not same:
        raise UserError(
            f"'{options.out}' is of {earlier['machine']}{' at tiny size' if earlier['tiny'] else ''}, this run of {machine}"
            f"{' at tiny size' if options.tiny else ''}; give another --out."
        )
    return earlier


def _run_section(name: str, options: GpuOptions, seconds: float) -> dict[str, Any]:
    """The rows that a section wrote until its end, however it ended."""
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log.txt"
        # A fork server that has imported torch and diffusers saves each section their imports; it never touches the GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        arguments = (SECTIONS[name].implementation, rows, seconds, options.device, options.tiny, log)
        process = context.Process(target=run_section, args=arguments, daemon=False)
        started = time.monotonic()
        process.start()
        process.join(seconds)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        lines = rows.read_text().splitlines() if rows.exists() else []
        section: dict[str, Any] = {
            "status": {0: "complete", None: "out of time"}.get(code, f"failed with exit code {code}"),
            "seconds": round(time.monotonic() - started, 1),
            "rows": [json.loads(line) for line in lines],
        }
        if code:
            section["error"] = log.read_text()[-2000:]
        return section


def as_table(results: dict[str, Any]) -> str:
    """Markdown: a table per section, its status above."""
    lines = [f"# {results['machine']['device']}{' (tiny sizes)' if results['tiny'] else ''}"]
    for name, section in results["sections"].items():
        lines += ["", f"## {name}: {section['status']}", ""]
        columns = list(dict.fromkeys(key for row in section["rows"] for key in row))
        if columns:
            lines += [_line(columns), _line(["---"] * len(columns))]
            lines += [_line([_shown(row.get(column, "")) for column in columns]) for row in section["rows"]]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _expected(options: GpuOptions) -> str:
    names = [name for name in SECTIONS if name in options.only or not options.only]
    lines = [_line(["section", "seconds", "GiB"]), _line(["---"] * 3)]
    lines += [_line([name, str(SECTIONS[name].seconds), str(SECTIONS[name].gigabytes)]) for name in names]
    total = sum(SECTIONS[name].seconds for name in names)
    return "\n".join([*lines, "", f"{total:.0f} s in all, of {60 * options.minutes:.0f} s"])
