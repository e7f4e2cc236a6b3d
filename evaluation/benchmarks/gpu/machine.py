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
    "xformers",
    "onnxruntime-gpu",
    "triton",
)


def run(run: SectionRun) -> None:
    """Versions, peak of bfloat16 products, bandwidths."""
    for name in PACKAGES:
        try:
            run.add(what=name, value=version(name))
        except PackageNotFoundError:
            run.add(what=name, value="not installed")
    run.add(what="python", value=platform.python_version())
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        run.add(what="nvidia-smi", value=subprocess.run(query, capture_output=True, text=True).stdout.strip())
    run.add(what="bf16 matmul, TFLOP/s", value=bf16_peak(run))
    size = 2**20 if run.tiny else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), run.device, repeats=10)
    run.add(what="copy on the device (read + write), GB/s", value=2 * size / seconds / 1e9)
    if run.device.type == "cuda":
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        seconds = seconds_of(lambda: target.copy_(host, non_blocking=True), run.device, repeats=5)
        run.add(what="copy from pinned memory, GB/s", value=size / seconds / 1e9)
