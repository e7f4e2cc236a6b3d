"""Rows of section `inference` by ONNX Runtime: the whole step as one graph, by each provider that is there."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evaluation.benchmarks.gpu.section import SectionRun, seconds_of
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.inference.exporting.graphs import Part
from sdxs_lightning.inference.exporting.onnx_files import write_onnx
from sdxs_lightning.inference.onnx_networks import PROVIDERS

if TYPE_CHECKING:
    from evaluation.benchmarks.gpu.inference import Student

INPUTS = ("sample", "prompts", "pooled", "time_ids")


class _Step(nn.Module):
    """A student's step as a function of tensors in a row; `pooled` and `time_ids` are SDXL's."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.unet, self.decoder = student.unet, student.decoder
        self.student = [student]  # in a list, so that its networks are not registered twice

    def forward(self, sample: Tensor, prompts: Tensor, *sizes: Tensor) -> tuple[Tensor]:
        added = dict(zip(("pooled_prompt_embeds", "add_time_ids"), sizes, strict=False))
        return (self.student[0].generate(sample, Conditioning(prompt_embeds=prompts, **added)),)


def onnx_rows(run: SectionRun, kind: str, make: Callable[[], Student]) -> None:
    """A row for each provider; it says so if the installed ONNX Runtime does not have it."""
    names = ("cuda", "tensorrt") if run.device.type == "cuda" else ("cpu",)
    for name in names:
        labels = {
            "kind": kind,
            "what": "student, one step and tiny decoder",
            "mode": f"ONNX Runtime, {PROVIDERS[name][0]}",
        }
        missing = _missing(name)
        if missing:
            run.add(labels, not_run=missing)
        else:
            run.attempt(partial(_measure, run, PROVIDERS[name], make), batch_size=1, **labels)


def _missing(name: str) -> str | None:
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return None if PROVIDERS[name][0] in available else f"this ONNX Runtime has only {', '.join(available)}"


def _measure(run: SectionRun, providers: tuple[str, ...], make: Callable[[], Student]) -> dict[str, Any]:
    import onnxruntime

    student = make()
    given = student.conditioning
    values = (student.noise, given.prompt_embeds, given.pooled_prompt_embeds, given.add_time_ids)
    inputs = {name: value for name, value in zip(INPUTS, values, strict=True) if value is not None}
    expected = student()
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(Part("student", _Step(student), inputs, ["images"], {}, {}), Path(folder))
        begun = time.monotonic()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(Path(folder) / "model.onnx"), options, providers=list(providers)
        )
        # Contiguous, unlike `expected` from networks that are channels last.
        images = torch.empty(expected.shape, dtype=expected.dtype, device=expected.device)
        call = _bound(session, inputs, images)
        call()
        started = time.monotonic() - begun
        difference = (images.float() - expected.float()).abs().mean() / 255
        # Its own stream, so that events of torch's would not see it; each call ends with a synchronisation.
        seconds = seconds_of(call, torch.device("cpu"), repeats=2 if run.tiny else 20)
    return {
        "milliseconds": 1000 * seconds,
        "images_per_second": len(images) / seconds,
        "start_seconds": started,
        "mean_difference": float(difference),
        "provider": session.get_providers()[0],
    }


def _bound(session: Any, inputs: dict[str, Tensor], images: Tensor) -> Callable[[], None]:
    """A call that reads and writes torch's memory."""
    import numpy as np

    dtypes = {torch.float16: np.float16, torch.float32: np.float32, torch.uint8: np.uint8}
    binding = session.io_binding()
    place = (images.device.type, images.device.index or 0)
    wanted = {one.name for one in session.get_inputs()}
    kept = {name: value.contiguous() for name, value in inputs.items() if name in wanted}
    for name, value in kept.items():
        binding.bind_input(name, *place, dtypes[value.dtype], tuple(value.shape), value.data_ptr())
    binding.bind_output("images", *place, dtypes[images.dtype], tuple(images.shape), images.data_ptr())
    if images.device.type == "cuda":
        torch.cuda.synchronize()

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    call.kept = kept  # type: ignore[attr-defined]  # the binding holds addresses only
    return call
