"""Exports a model of full size with random weights once for each runtime: sizes, differences from PyTorch, peak memory.

python -m evaluation.benchmarks.runtime_exports --random_weights sdxs-512 --controlnet --work work/ --out exports.json
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from evaluation.latency import MODELS
from evaluation.reports.result_file import write_result
from evaluation.runner.memory import peak_resident_bytes
from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

EXPORTS = ("onnx-fp32", "onnx-fp16", "openvino-fp16", "openvino-int8", "single-file-fp16")


@dataclass(frozen=True, kw_only=True)
class RuntimeExportsOptions:
    """Exports a model of random weights for each runtime, and notes sizes, differences and memory."""

    EXAMPLES: ClassVar[str] = """\
python -m evaluation.benchmarks.runtime_exports --random_weights sdxs-512 --controlnet --work work/ --out exports.json"""

    random_weights: Annotated[str, Option(choices=MODELS)]
    """Architecture of the model."""
    exports: Annotated[tuple[str, ...], Option(choices=EXPORTS)] = EXPORTS
    """What to export."""
    controlnet: bool = False
    """Export a ControlNet of random weights too."""
    check_size_px: Annotated[int | None, Option(at_least=8)] = None
    """Side of the images that are compared; by default the trained one."""
    work: Annotated[Path | None, Option(metavar="DIR")] = None
    """Folder that keeps the model."""
    out: Annotated[Path | None, Option(metavar="FILE.json")] = None
    """Result; entries of other models and exports in it are kept."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    program = "python -m evaluation.benchmarks.runtime_exports"
    run_command(program, RuntimeExportsOptions, run, arguments)


def run(options: RuntimeExportsOptions) -> str:
    """Exports in a process each, so that peaks are its own; returns a table."""
    from evaluation.benchmarks.latency.random_models import random_model

    known = _known(options.out)
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="exports-")))
        work.mkdir(parents=True, exist_ok=True)
        model = random_model(options.random_weights, work)
        controlnet = _random_controlnet(model) if options.controlnet else None
        rows = {row["export"]: row for row in known.get(options.random_weights, [])}
        for name in options.exports:
            rows[name] = _exported(name, model, controlnet, work, options.check_size_px)
            # After each, since one takes minutes and the next may need more memory.
            if options.out is not None:
                result = known | {options.random_weights: list(rows.values())}
                write_result(options.out, result)
    return table(list(rows.values()))


def _known(out: Path | None) -> dict[str, Any]:
    """What the result file has; makes its folder, so that a wrong path stops before the exports."""
    if out is None:
        return {}
    out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: sizes in MB by part, differences, and peak memory over the float32 weights."""
    parts = list(dict.fromkeys(name for row in rows for name in row["megabytes"]))
    head = [
        "",
        *(f"{name}, MB" for name in parts),
        "largest difference",
        "mean difference",
        "peak memory / fp32 weights",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        sizes = [f"{row['megabytes'][name]:.0f}" if name in row["megabytes"] else "" for name in parts]
        found = [f"{row[key]:.1g}" if key in row else "" for key in ("largest_difference", "mean_difference")]
        lines.append([row["export"], *sizes, *found, f"{row['peak_over_weights']:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _random_controlnet(model: Path) -> Path:
    """A ControlNet whose residuals are small and not 0."""
    import torch
    from diffusers import UNet2DConditionModel

    from sdxs_lightning.families.weights import load_network
    from sdxs_lightning.networks.controlnet import controlnet_from_unet, save_controlnet

    folder = model.with_name(f"{model.name}-controlnet")
    if not folder.is_dir():
        controlnet = controlnet_from_unet(load_network(UNet2DConditionModel, model / "unet"))
        with torch.no_grad():
            for one in controlnet.controlnet_down_blocks.parameters():
                one.normal_(0, 0.01)
        save_controlnet(controlnet, folder)
    return folder


def _exported(
    name: str, model: Path, controlnet: Path | None, work: Path, size: int | None
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_export, args=(name, model, controlnet, work, size, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] | str = ours.recv()
    except EOFError as error:
        process.join()
        raise UserError(
            f"the export {name} of '{model}' ended with exit code {process.exitcode} and without a result; is there enough "
            "memory? Exports before it are kept, and --exports names which to make."
        ) from error
    process.join()
    if isinstance(found, str):
        raise UserError(f"the export {name} of '{model}' failed: {found}")
    return found


def _export(
    name: str, model: Path, controlnet: Path | None, work: Path, size: int | None, connection: Connection
) -> None:
    try:
        connection.send(_measured_export(name, model, controlnet, work, size))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def _measured_export(
    name: str, model: Path, controlnet: Path | None, work: Path, size: int | None
) -> dict[str, Any]:
    from sdxs_lightning.inference.exporting.export import export_runtime
    from sdxs_lightning.inference.exporting.graphs import Adapted
    from sdxs_lightning.inference.exporting.single_file import export_single_file

    runtime, _, precision = name.rpartition("-")
    out = work / f"{model.name}-{name}"
    row: dict[str, Any] = {"export": name}
    adapted = Adapted(controlnet)
    if runtime == "single-file":
        export_single_file(model, out, precision)
    else:
        kind: Any = runtime
        weights: Any = precision
        found = export_runtime(model, out, kind, weights, adapted, check_size=size)
        row |= {"largest_difference": found.largest, "mean_difference": found.mean}
        row["check_px"] = size
    sizes: dict[str, float] = {}
    for file in sorted(out.rglob("*")):
        if file.suffix in (".onnx", ".onnx_data", ".bin", ".safetensors"):
            part = file.parent.name if file.parent != out else file.name
            sizes[part] = sizes.get(part, 0.0) + file.stat().st_size / 1e6
    stored = sum(
        file.stat().st_size for file in model.glob("*/*.safetensors") if file.parent.name != "vae_large"
    )
    stored += sum(file.stat().st_size for file in (controlnet or work / "none").glob("*.safetensors"))
    peak = peak_resident_bytes() / (2 * stored)  # stored in half precision
    return row | {"megabytes": sizes, "peak_over_weights": peak}


if __name__ == "__main__":
    main()
