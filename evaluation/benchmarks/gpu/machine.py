"""Section `machine`: what the other numbers are relative to."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from evaluation.benchmarks.gpu.section import SectionRun, bf16_peak, seconds_of

PACKAGES = (
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "torchmetrics",
    "peft",
    "xformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "triton",
)


def run(run: SectionRun) -> None:
    """Versions, peak of bfloat16 products, bandwidths."""
    for name in PACKAGES:
        run.add({"what": name}, value=_version(name))
    run.add({"what": "python"}, value=platform.python_version())
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        run.add({"what": "nvidia-smi"}, value=said)
    run.attempt(lambda: {"value": bf16_peak(run)}, what="bf16 matmul, TFLOP/s")
    size = 2**20 if run.tiny else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)

    def copied(origin: torch.Tensor, moved: int) -> dict[str, float]:
        seconds = seconds_of(lambda: target.copy_(origin, non_blocking=True), run.device, repeats=10)
        return {"value": moved * size / seconds / 1e9}

    run.attempt(lambda: copied(source, 2), what="copy on the device (read + write), GB/s")
    if run.device.type == "cuda":
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        run.attempt(lambda: copied(pinned, 1), what="copy from pinned memory, GB/s")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
