"""Exports a student for ONNX Runtime or OpenVINO: reference images by PyTorch, the files, their images beside the reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.export import add_vocabulary, new_folder
from sdxs_lightning.inference.exporting.graphs import Adapted, Part, parts
from sdxs_lightning.inference.exporting.manifest import manifest, residual_inputs
from sdxs_lightning.inference.exporting.onnx_files import write_onnx
from sdxs_lightning.inference.generator import OneStepGenerator
from sdxs_lightning.inference.model_folder import MANIFEST, ModelFolder

Runtime = Literal["onnx", "openvino"]
Precision = Literal["fp32", "fp16", "int8"]
PROMPTS = ("a red circle above a blue square", "a photo of a cat", "a large green star on a white background")
LIMITS: Mapping[str, tuple[float, float]] = {"fp32": (1e-3, 1e-4), "fp16": (0.5, 0.02), "int8": (0.75, 0.05)}
"""Largest and mean difference from PyTorch in float32, of pixels in [0, 1], beyond which an export is broken. Its graphs have
the same operations; float32 leaves about 1e-6 of difference, multiplied by sigma / alpha = 14.6 at timestep 999."""


@dataclass(frozen=True)
class Difference:
    """Pixels in [0, 1] of an export against PyTorch in float32."""

    largest: float
    mean: float


def export_runtime(
    folder: str | Path,
    out: Path,
    runtime: Runtime,
    precision: Precision = "fp32",
    adapted: Adapted | None = None,
    licence: str | None = None,
    check_size: int | None = None,
    steps: int | None = None,
) -> Difference:
    """Writes an export, completely or not at all; an existing folder is replaced.

    Args:
        folder: diffusers folder of a student.
        out: folder to write.
        runtime: what runs it.
        precision: of the weights; for ONNX, fp16 is also that of inputs and arithmetic.
        adapted: ControlNet and LoRA to export with it.
        licence: for the manifest; None takes the model card's.
        check_size: side of the images of the comparison, pixels; None is the trained size.
        steps: as in `OneStepGenerator.load`.

    Returns:
        The difference from PyTorch on three prompts.

    Raises:
        UserError: for an unusable model or adapter, a missing extra, or an export whose images differ from PyTorch's.
        OSError: if the files cannot be written.
    """
    adapted = adapted or Adapted()
    if runtime == "onnx" and precision == "int8":
        raise UserError(
            "int8 is for --to openvino: ONNX Runtime's processors quantise convolutions with activations, for which they need "
            "calibration images; give fp16, or openvino."
        )
    _require(runtime)
    model = ModelFolder.read(folder, "torch", steps)
    expected = _reference(model, adapted, check_size, steps)
    with new_folder(out) as written:
        written.mkdir()
        try:
            residuals = _write_parts(model, written, runtime, precision, adapted)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error
        content = manifest(model, runtime, precision, adapted, residuals, licence)
        _write_rest(model, written, runtime, content)
        difference = _compared(written, runtime, expected, check_size, bool(adapted.controlnet), steps)
        _check(difference, precision, runtime)
        content |= {"largest_difference": difference.largest, "mean_difference": difference.mean}
        _write_json(written / MANIFEST, content)
    return difference


def _require(runtime: Runtime) -> None:
    """Raises UserError without the extra, before minutes of work."""
    if runtime == "openvino":
        from sdxs_lightning.inference.openvino_networks import import_openvino

        import_openvino()
    else:
        from sdxs_lightning.inference.onnx_networks import import_onnxruntime

        import_onnxruntime()
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"exports need the package onnx; install it with `uv sync --extra {runtime}`."
        ) from error


def _reference(model: ModelFolder, adapted: Adapted, size: int | None, steps: int | None) -> Tensor:
    """PyTorch's images of the prompts; the networks are gone when this returns."""
    generator = OneStepGenerator.load(
        model.path,
        controlnet=adapted.controlnet,
        lora=adapted.lora,
        lora_scale=adapted.lora_scale,
        device="cpu",
        steps=steps,
    )
    return _images(generator, size, adapted.controlnet is not None)


def _images(generator: OneStepGenerator, size: int | None, controlled: bool) -> Tensor:
    """(3, 3, H, W) in [0, 1], one prompt after the other."""
    height, width = (size, size) if size else generator.model.size
    control = None
    if controlled:
        noise = torch.Generator().manual_seed(0)
        control = torch.randint(0, 256, (1, 3, height, width), generator=noise, dtype=torch.uint8)
    images = [
        generator.sample([prompt], [seed], control_images=control, size=(height, width))
        for seed, prompt in enumerate(PROMPTS)
    ]
    return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)


def _write_parts(
    model: ModelFolder, written: Path, runtime: Runtime, precision: Precision, adapted: Adapted
) -> list[tuple[str, int, int]]:
    """Writes all networks; returns the U-Net's inputs for residuals."""
    residuals: list[tuple[str, int, int]] = []
    half = runtime == "onnx" and precision == "fp16"
    for part in parts(model, adapted, torch.float16 if half else torch.float32):
        folder = written / part.name
        folder.mkdir()
        _write_part(part, folder, runtime, precision)
        _write_json(folder / "config.json", {**part.config})
        if part.name == "unet" and adapted.controlnet is not None:
            residuals = residual_inputs(part.module.unet)
    return residuals


def _write_part(part: Part, folder: Path, runtime: Runtime, precision: Precision) -> None:
    if runtime == "onnx":
        write_onnx(part, folder)
        return
    from sdxs_lightning.inference.exporting.openvino_files import write_openvino

    write_openvino(part, folder, precision)


def _write_rest(model: ModelFolder, written: Path, runtime: Runtime, content: Mapping[str, Any]) -> None:
    """Tokenizers, scheduler, model_index.json and manifest."""
    for name in ("scheduler", *(one.replace("text_encoder", "tokenizer") for one in model.encoders)):
        shutil.copytree(model.path / name, written / name)
        add_vocabulary(written / name)
    index: dict[str, Any] = json.loads((model.path / "model_index.json").read_text())
    network = ["diffusers", "OnnxRuntimeModel"] if runtime == "onnx" else ["optimum", "OVModel"]
    for name in ("vae", "unet", *model.encoders):
        index.pop(name, None)
    index |= {
        path.name: network
        for path in sorted(written.iterdir())
        if path.name.startswith(("vae_", "unet", "text_"))
    }
    _write_json(written / "model_index.json", index)
    _write_json(written / MANIFEST, content)


def _compared(
    written: Path, runtime: Runtime, expected: Tensor, size: int | None, controlled: bool, steps: int | None
) -> Difference:
    generator = OneStepGenerator.load(written, backend=runtime, device="cpu", steps=steps)
    difference = (_images(generator, size, controlled) - expected).abs()
    return Difference(float(difference.max()), float(difference.mean()))


def _check(found: Difference, precision: Precision, runtime: str) -> None:
    largest, mean = LIMITS[precision]
    # Not "greater": NaN is broken too.
    if not (found.largest <= largest and found.mean <= mean):
        raise UserError(
            f"the {precision} export differs from PyTorch by up to {found.largest:.2g} and {found.mean:.2g} on average (pixels "
            f"in [0, 1]), and {largest:g} and {mean:g} are the limits, so nothing was written; try --dtype fp32, and report it "
            f"if it differs too: this {runtime} may compute an operation wrongly."
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
