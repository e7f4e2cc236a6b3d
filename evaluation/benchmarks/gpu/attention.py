"""Section `attention`: backends of scaled dot product attention at the shapes of SD-1.5 and SDXL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from evaluation.benchmarks.gpu.section import SectionRun, seconds_of

SHAPES = {
    "SD-1.5 self, 64x64": (8, 4096, 4096, 40),
    "SD-1.5 cross, 64x64": (8, 4096, 77, 40),
    "SD-1.5 self, 32x32": (8, 1024, 1024, 80),
    "SDXL self, 64x64": (10, 4096, 4096, 64),
    "SDXL self, 32x32": (20, 1024, 1024, 64),
    "SDXL cross, 32x32": (20, 1024, 77, 64),
}
"""Heads, queries, keys, channels of a head."""
BATCH_SIZE = 4


def run(run: SectionRun) -> None:
    """Forward and backward per backend; xformers where it is installed."""
    for shape, (heads, queries, keys, width) in SHAPES.items():
        scale = 64 if run.tiny else 1
        query, key, value = (
            torch.randn(
                BATCH_SIZE, heads, max(1, length // scale), width, device=run.device, dtype=torch.bfloat16
            ).requires_grad_()
            for length in (queries, keys, keys)
        )
        for name, call in _backends(run.device).items():
            run.attempt(partial(_timed, call, query, key, value, run), shape=shape, backend=name)
        found = {name: run.measured(shape=shape, backend=name) for name in _backends(run.device)}
        both = {name: row["both_ms"] for name, row in found.items() if row is not None}
        if both:
            fastest = min(both, key=lambda name: both[name])
            run.add({"shape": shape, "backend": "fastest"}, both_ms=both[fastest], which=fastest)


def _backends(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value)

        return call

    def default(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value)

    def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

        moved = [each.transpose(1, 2) for each in (query, key, value)]
        result: Tensor = memory_efficient_attention(*moved)
        return result

    found = {"default": default, "math": sdpa(SDPBackend.MATH), "flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    if device.type == "cuda":
        found |= {
            "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
            "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
            "xformers": xformers,
        }
    return found


def _timed(
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run: SectionRun,
) -> dict[str, Any]:
    repeats = 2 if run.tiny else 20

    def both() -> None:
        call(query, key, value).sum().backward()

    with torch.no_grad():
        forward = seconds_of(lambda: call(query, key, value), run.device, repeats)
    return {"forward_ms": 1000 * forward, "both_ms": 1000 * seconds_of(both, run.device, repeats)}
