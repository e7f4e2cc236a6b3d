"""Floating point operations of a training step, counted once for each kind of iteration, and peaks of GPUs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PEAK_TFLOPS = (
    (r"\bB200\b", 2250.0),
    (r"\bGB200\b", 2500.0),
    (r"\bH100 (80GB HBM3|SXM)|\bH200\b|\bGH200\b", 989.4),
    (r"\bH100 NVL\b", 835.5),
    (r"\bH100\b", 756.5),
    (r"\bH20\b", 148.0),
    (r"\bA100\b|\bA800\b", 312.0),
    (r"\bL40S\b", 362.05),
    (r"\bL40\b", 181.05),
    (r"\bL4\b", 121.0),
    (r"\bA40\b", 149.7),
    (r"\bA10\b", 125.0),
    (r"\bRTX 6000 Ada\b", 364.2),
    (r"\bRTX A6000\b", 154.8),
    (r"\bRTX 4090\b", 165.2),
    (r"\bRTX 3090\b", 71.0),
    (r"\bMI300X\b", 1307.4),
)
"""Dense bfloat16 TFLOP/s, accumulated in float32, by names of `torch.cuda.get_device_name`; the first that matches counts.

Source: the makers' data sheets: NVIDIA's of each product (half of the figure that is given with sparsity) and of the Ada and
Ampere GA102 architectures, AMD's of the Instinct MI300X.
"""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Peak of a GPU in bfloat16 or float16; None for a CPU, an unlisted GPU, and a precision that has another peak.

    Args:
        device: of the training.
        precision: the Trainer's: "bf16-mixed", "32-true", ...
    """
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Peak by a GPU's name; None if it is not listed, or a part of a GPU (MIG)."""
    if " MIG " in name:
        return None
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, name)), None)


class StepFlops:
    """Counts the operations of the second step of each kind, by torch's formulas for matrix products and convolutions.

    The first may do what is done once, such as making pairs or compiling. They are those of this process: forward and backward
    passes of trained and frozen networks. What gradient checkpointing computes again is left out, since it brings the training
    no further.
    """

    def __init__(self) -> None:
        self.known: dict[str, int | None] = {}
        """Operations by kind; None for kinds seen once."""
        self._counter: FlopCounterMode | None = None
        self._kind = ""

    def begin(self, kind: str, module: nn.Module) -> bool:
        """Begins a step.

        Args:
            kind: whatever the number of operations depends on.
            module: the stage.

        Returns:
            Whether it is an ordinary step: neither the first of its kind nor the one that is counted, which is slower.
        """
        self._kind = kind
        if kind not in self.known:
            self.known[kind] = None
            return False
        if self.known[kind] is not None:
            return True
        recomputes = any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
        self._counter = _WithoutRecomputation() if recomputes else FlopCounterMode(display=False)
        self._counter.__enter__()
        return False

    def end(self) -> int:
        """Ends the step; its number of operations, 0 where it is not known yet."""
        if self._counter is not None:
            self.known[self._kind] = self._counter.get_total_flops()
            self.stop()
        return self.known[self._kind] or 0

    def stop(self) -> None:
        """Ends counting, also where the step failed. Idempotent."""
        if self._counter is not None:
            counter, self._counter = self._counter, None
            counter.__exit__(None, None, None)


class _WithoutRecomputation(FlopCounterMode):
    """Leaves out what runs within a backward pass with gradients enabled: a checkpointed block that is computed again.

    So are second derivatives, such as an R1 penalty's, in a stage that has checkpointed blocks.
    """

    def __init__(self) -> None:
        super().__init__(display=False)

    def _count_flops(self, func_packet: Any, out: Any, *rest: Any) -> Any:
        if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            return out
        return super()._count_flops(func_packet, out, *rest)
