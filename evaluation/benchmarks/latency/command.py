"""Implementation of `evaluation.latency`."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.prepare.common.machine import choose_device
from evaluation.benchmarks.latency.random_models import random_model
from evaluation.benchmarks.latency.report import chart, table
from evaluation.benchmarks.latency.subjects import Subject, serve_quietly
from evaluation.reports.result_file import write_result
from evaluation.runner.machine import where
from evaluation.user_errors import as_user_errors
from sdxs_lightning.command_line import terminated_as_exit
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.model_hash import hash_model
from sdxs_lightning.inference.exporting.export import export_runtime
from sdxs_lightning.inference.exporting.graphs import Adapted
from sdxs_lightning.inference.model_folder import ModelFolder
from sdxs_lightning.networks.controlnet import controlnet_folder

if TYPE_CHECKING:
    from evaluation.latency import LatencyOptions

PAPER = {"paper-512": ("sdxs-512", "sd15", 16), "paper-1024": ("sdxs-1024", "sdxl", 32)}
"""Student, base and its steps of SDXS's table, arXiv:2403.16627."""


@as_user_errors()
def latency(options: LatencyOptions) -> str:
    """Measures, writes the files, returns the table."""
    options = _resolved(options)
    with ExitStack() as stack:
        stack.enter_context(terminated_as_exit())
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latency-")))
        work.mkdir(parents=True, exist_ok=True)
        subjects = _subjects(options, work)
        rows = measure(subjects, options.batch_sizes, options.repetitions)
    result = {
        "command": command_line(sys.argv[1:]),
        "clock": options.clock,
        "threads": options.threads,
        "repetitions": options.repetitions,
        **where(torch.device(choose_device(options.device))),
        "rows": with_ratios(rows, options.ratios_only),
    }
    page = table(result)
    if options.out is not None:
        write_result(options.out, result)
        options.out.with_suffix(".md").write_text(page + "\n")
        chart(result, options.out.with_suffix(".png"))
    return page


def _resolved(options: LatencyOptions) -> LatencyOptions:
    """With the values of a preset, and default steps of a base."""
    if options.preset is not None:
        student, base, steps = PAPER[options.preset]
        return replace(options, preset=None, random_weights=student, baseline=base, steps=steps)
    if options.baseline is not None and options.steps is None:
        return replace(options, steps=16)
    return options


def _subjects(options: LatencyOptions, work: Path) -> list[Subject]:
    """Everything to measure; writes random models and exports."""
    folder = options.model or str(random_model(str(options.random_weights), work))
    common: dict[str, Any] = {
        "dtype": options.dtype,
        "device": choose_device(options.device),
        "size_px": options.size_px,
        "threads": options.threads,
        "clock": options.clock,
    }
    steps = len(ModelFolder.read(folder, "torch").plan.steps)
    stock: dict[str, Any] = {"steps": steps, "controlnet": options.controlnet, **common}
    subjects = [Subject("student, diffusers", "stock", folder, **stock)]
    if (Path(folder) / "vae_large").is_dir():
        subjects.insert(
            0, Subject("student, diffusers, KL decoder", "stock", folder, kl_decoder=True, **stock)
        )
    subjects += [_student(name, folder, options, work, common) for name in options.backend]
    if options.baseline is not None:
        subjects.append(_base(options, work, common))
    return subjects


def _base(options: LatencyOptions, work: Path, common: dict[str, Any]) -> Subject:
    assert options.baseline is not None and options.steps is not None
    folder = options.baseline
    if not (Path(folder) / "model_index.json").is_file():
        folder = str(random_model(folder, work))
    guided = f", guidance {options.guidance_scale:g}" if options.guidance_scale > 1 else ""
    return Subject(
        f"base, {options.steps} steps{guided}",
        "base",
        folder,
        composed=options.composed_baseline,
        controlnet=options.baseline_controlnet,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        **common,
    )


def _student(name: str, folder: str, options: LatencyOptions, work: Path, common: dict[str, Any]) -> Subject:
    backend, _, kind = name.partition("-")
    if backend == "torch":
        return Subject(
            f"student, {name}",
            "generator",
            folder,
            compiled=kind == "compiled",
            controlnet=options.controlnet,
            **common,
        )
    precision = kind or "fp32"
    runtime: Any = backend
    chosen: Any = precision
    export = work / export_name(folder, backend, precision, options.controlnet)
    if not export.is_dir():
        export_runtime(
            folder, export, runtime, chosen, Adapted(options.controlnet), check_size=options.size_px
        )
    return Subject(f"student, {backend} {precision}", "generator", str(export), backend=runtime, **common)


def export_name(folder: str, backend: str, precision: str, controlnet: str | None) -> str:
    """Name of an export in --work; it contains the hashes of its networks, since every training calls its folder `pipeline`."""
    name = f"{Path(folder).resolve().name}-{hash_model(folder)}-{backend}-{precision}"
    return name if controlnet is None else f"{name}-control-{hash_model(controlnet_folder(controlnet))}"


def measure(
    subjects: Sequence[Subject], batch_sizes: Sequence[int], repetitions: int
) -> list[dict[str, Any]]:
    """Rows of seconds: one for each subject and batch size, calls of all subjects in turn.

    Raises:
        UserError: if a subject fails, or memory does not hold all of them at once.
    """
    context = multiprocessing.get_context("spawn")
    free_before = available_bytes()
    processes, pipes = [], []
    times: dict[tuple[int, int], list[dict[str, float]]] = {}
    peaks: list[float] = []
    try:
        for subject in subjects:
            ours, theirs = context.Pipe()
            with _thread_limit(subject.threads):
                process = context.Process(target=serve_quietly, args=(subject, theirs), daemon=True)
                process.start()
            processes.append(process)
            pipes.append(ours)
            _answer(ours, subject)  # loaded one after the other, so that their peaks do not add up
            check_memory(len(pipes), len(subjects), free_before, available_bytes())
        for batch_size in batch_sizes:
            for repetition in range(repetitions + 1):
                for i, (subject, pipe) in enumerate(zip(subjects, pipes, strict=True)):
                    pipe.send(batch_size)
                    found = _answer(pipe, subject)
                    if repetition:  # the first call compiles and allocates
                        times.setdefault((i, batch_size), []).append(found)
        for subject, pipe in zip(subjects, pipes, strict=True):
            pipe.send(None)
            peaks.append(_answer(pipe, subject))
    finally:
        for pipe in pipes:
            pipe.close()  # ends a process that waits for its next call
        for process in processes:
            process.join(5)
            process.terminate()
    return [_row(subjects[i], size, calls, peaks[i]) for (i, size), calls in sorted(times.items())]


def command_line(arguments: Sequence[str]) -> str:
    """The command that measured, without the folders of this machine."""
    kept, skip = ["python -m evaluation.latency"], False
    for argument in arguments:
        if skip or argument.startswith(("--work=", "--out=")):
            skip = False
        elif argument in ("--work", "--out"):
            skip = True
        else:
            kept.append(argument)
    return " ".join(kept)


def available_bytes() -> int | None:
    """Memory that processes can still get; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(values["MemAvailable"].split()[0]) * 1024


def check_memory(loaded: int, count: int, before: int | None, now: int | None) -> None:
    """Refuses to go on if another subject of the average size would not fit: each would read its weights again at each turn.

    Raises:
        UserError: with the numbers.
    """
    if before is None or now is None or loaded == count:
        return
    average = (before - now) / loaded
    if now < average:
        raise UserError(
            f"{loaded} of {count} models that take turns use {(before - now) / 2**30:.1f} GiB, and {now / 2**30:.1f} GiB are "
            "left: measure fewer --backend at once (the student in diffusers and the base are in every run)."
        )


class _thread_limit:  # noqa: N801 (a context manager)
    """OMP_NUM_THREADS of processes that are started in the block."""

    def __init__(self, threads: int | None) -> None:
        self._threads = threads
        self._before = os.environ.get("OMP_NUM_THREADS")

    def __enter__(self) -> None:
        if self._threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(self._threads)

    def __exit__(self, *_: object) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)
        if self._before is not None:
            os.environ["OMP_NUM_THREADS"] = self._before


def _answer(pipe: Any, subject: Subject) -> Any:
    try:
        found = pipe.recv()
    except EOFError as error:
        raise UserError(f"{subject.name}: its process ended; is there enough memory?") from error
    if isinstance(found, str) and found != "ready":
        raise UserError(f"{subject.name}: {found}")
    return found


def _row(subject: Subject, batch_size: int, calls: list[dict[str, float]], peak: float) -> dict[str, Any]:
    totals = sorted(one["end_to_end"] for one in calls)
    names = [name for name in calls[0] if name != "end_to_end"]
    low, high = (totals[0], totals[-1]) if len(totals) < 4 else _quartiles(totals)
    median = statistics.median(totals)
    return {
        "subject": subject.name,
        "batch_size": batch_size,
        "seconds": median,
        "low": low,
        "high": high,
        "components": {name: statistics.median(one[name] for one in calls) for name in names},
        "images_per_second": batch_size / median,
        "peak_megabytes": peak,
        **({"composed": True} if subject.composed else {}),
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    first, _, third = statistics.quantiles(values, n=4)
    return first, third


def with_ratios(rows: list[dict[str, Any]], ratios_only: bool) -> list[dict[str, Any]]:
    """Adds how many times faster than the first row of its batch size, and than the base, each row is.

    With `ratios_only` all seconds are divided by those of the first row, and images per second are left out.
    """
    result = []
    for row in rows:
        group = [one for one in rows if one["batch_size"] == row["batch_size"]]
        first = group[0]["seconds"]
        base = next((one["seconds"] for one in group if one["subject"].startswith("base")), None)
        added = {"times_faster_than_first": first / row["seconds"]}
        if base is not None:
            added["times_faster_than_base"] = base / row["seconds"]
        changed = dict(row)
        if ratios_only:
            for key in ("seconds", "low", "high"):
                changed[key] = row[key] / first
            changed["components"] = {name: one / first for name, one in row["components"].items()}
            del changed["images_per_second"]
            changed["relative"] = True
        result.append(changed | added)
    return result
