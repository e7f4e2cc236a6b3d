"""Exports a student for other programs: `python -m sdxs_lightning.export_runtime MODEL --to onnx --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from sdxs_lightning.command_line import Option, run_command, terminated_as_exit
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError
from sdxs_lightning.core.option_bounds import LARGEST_SCALE, LARGEST_SIDE_PX, MOST_STEPS


@dataclass(frozen=True, kw_only=True)
class ExportRuntimeOptions:
    """Exports a student (a diffusers folder) for ONNX Runtime, OpenVINO, or programs that read a single file.

    onnx and openvino: one folder with text encoders, U-Net, decoder and encoder, for any batch and size; optimum's pipelines
    load it, and so does OneStepGenerator.load(DIR, backend=...). Its images are compared with PyTorch's on three prompts before
    the folder appears. single-file: .safetensors in the original layout of Stable Diffusion, and the tiny decoder in TAESD's.
    """

    EXAMPLES: ClassVar[str] = """\
python -m sdxs_lightning.export_runtime outputs/student/pipeline --to onnx --out exports/student-onnx
python -m sdxs_lightning.export_runtime outputs/student/pipeline --to openvino --dtype int8 --out exports/int8
python -m sdxs_lightning.export_runtime outputs/student/pipeline --to onnx --controlnet outputs/canny --out exports/canny
python -m sdxs_lightning.export_runtime outputs/student/pipeline --to single-file --out exports/student-files"""

    model: Annotated[str, Option(positional=True)]
    """Diffusers folder of a student."""
    to: Literal["onnx", "openvino", "single-file"]
    """What it is for."""
    dtype: Literal["fp32", "fp16", "int8"] | None = None
    """Of the weights: fp16 by default for a single file, else fp32; int8 for openvino only."""
    controlnet: Annotated[str | None, Option(metavar="DIR")] = None
    """ControlNet to export with it; the U-Net then takes its residuals (onnx, openvino)."""
    lora: Annotated[str | None, Option(metavar="FILE")] = None
    """LoRA to merge into the U-Net."""
    lora_scale: Annotated[float, Option(at_least=-LARGEST_SCALE, at_most=LARGEST_SCALE)] = 1.0
    """Weight of the LoRA."""
    out: Annotated[Path | None, Option(metavar="DIR")] = None
    """Folder to write; an earlier export there is replaced. By default MODEL-onnx, ... beside the model."""
    licence: str | None = None
    """Licence for the manifest; by default that of the model card."""
    steps: Annotated[int | None, Option(at_least=1, at_most=MOST_STEPS)] = None
    """Of a student of several steps; by default all that its scheduler has."""
    check_size_px: Annotated[int | None, Option(at_least=8, at_most=LARGEST_SIDE_PX, called=("size",))] = None
    """Side of the images that are compared; by default the trained one."""

    def __post_init__(self) -> None:
        if self.to != "openvino" and self.dtype == "int8":
            raise ValueError("--dtype int8 is for --to openvino, whose NNCF makes 8-bit weights.")
        if self.to == "single-file" and self.controlnet is not None:
            raise ValueError(
                "--controlnet is for onnx and openvino; programs that read single files load a ControlNet's own file."
            )
        given = {"--licence": self.licence, "--steps": self.steps, "--check_size_px": self.check_size_px}
        unused = [name for name, value in given.items() if value is not None]
        if self.to == "single-file" and unused:
            raise ValueError(f"{unused[0]} is for onnx and openvino; a single file holds weights alone.")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit codes as in `sdxs_lightning.core.errors`."""
    run_command("python -m sdxs_lightning.export_runtime", ExportRuntimeOptions, run, arguments)


def run(options: ExportRuntimeOptions) -> str:
    """Exports; returns a summary.

    Raises:
        UserError: for an unusable model or adapter, a missing extra, or an export whose images differ.
        CheckpointNotWritten: if the disk refuses.
    """
    out = options.out or _default_out(options)
    _check_replaceable(out, (options.model, options.controlnet, options.lora))
    from sdxs_lightning.callbacks.checkpoint_folder import write_failure

    try:
        with terminated_as_exit():
            return _export(options, out)
    except OSError as error:
        problem = write_failure(error)
        if problem is None:
            raise UserError(str(error)) from error
        raise CheckpointNotWritten(f"--out '{out}' could not be written: {problem}.") from error


def _check_replaceable(out: Path, sources: Sequence[str | None]) -> None:
    """Refuses to replace what is no earlier export, or holds what is read or the working folder, and to write into a source.

    Raises:
        UserError: if it would.
    """
    for one in (Path(source).resolve() for source in sources if source is not None):
        if one.is_dir() and one in out.resolve().parents:
            raise UserError(
                f"--out '{out}' is inside of '{one}', whose files would no longer be its own; give another folder."
            )
    if not out.exists():
        return
    kept = [Path(one) for one in sources if one is not None and Path(one).exists()] + [Path.cwd()]
    for one in kept:
        if out.resolve() in (one.resolve(), *one.resolve().parents):
            raise UserError(f"--out '{out}' would be replaced, and '{one}' is in it; give another folder.")
    from sdxs_lightning.inference.model_folder import MANIFEST

    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise UserError(f"--out '{out}' exists and is no earlier export; remove it, or give another folder.")


def _default_out(options: ExportRuntimeOptions) -> Path:
    model = Path(options.model)
    parts = [model.resolve().name, options.to] + ([options.dtype] if options.dtype else [])
    return model.resolve().parent / "-".join(parts)


def _export(options: ExportRuntimeOptions, out: Path) -> str:
    # Imported here, so that --help and refused options do not wait for torch.
    from sdxs_lightning.inference.exporting.export import export_runtime
    from sdxs_lightning.inference.exporting.graphs import Adapted
    from sdxs_lightning.inference.exporting.single_file import export_single_file

    adapted = Adapted(options.controlnet, options.lora, options.lora_scale)
    if options.to == "single-file":
        notes = export_single_file(options.model, out, options.dtype or "fp16", adapted)
        return "\n".join([*_sizes(out), *notes])
    found = export_runtime(
        options.model,
        out,
        options.to,
        options.dtype or "fp32",
        adapted,
        options.licence,
        options.check_size_px,
        options.steps,
    )
    return "\n".join(
        [
            *_sizes(out),
            f"largest difference from PyTorch in float32 on three prompts: {found.largest:.2g}, mean {found.mean:.2g} "
            "(pixels in [0, 1])",
        ]
    )


def _sizes(out: Path) -> list[str]:
    files = sorted(
        path for path in out.rglob("*") if path.suffix in (".onnx", ".onnx_data", ".bin", ".safetensors")
    )
    return [
        f"written to {out}:",
        *(f"  {file.relative_to(out).as_posix():<36} {file.stat().st_size / 1e6:10.1f} MB" for file in files),
    ]


if __name__ == "__main__":
    main()
