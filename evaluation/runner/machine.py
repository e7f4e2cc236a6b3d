"""Describes the machine of a measurement: versions, device, time per image."""

from __future__ import annotations

import platform
import statistics
import time
from importlib.metadata import version
from typing import Any

import torch

from evaluation.images.generate import ImageMaker


def versions() -> dict[str, str]:
    """Versions of the libraries that affect results."""
    names = (
        "torch",
        "lightning",
        "diffusers",
        "transformers",
        "open_clip_torch",
        "torchmetrics",
        "numpy",
        "pillow",
    )
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def device_name(device: torch.device) -> str:
    """Name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def milliseconds_per_image(maker: ImageMaker, caption: str, repeats: int = 5) -> float:
    """Latency at batch size 1: median time from caption to image in host memory, after one untimed call."""
    sample_id = torch.zeros(1, dtype=torch.int64)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        maker([caption], sample_id).cpu()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:])


def where(device: torch.device) -> dict[str, Any]:
    """Device and versions, for result files."""
    return {"device": device_name(device), "versions": versions()}
