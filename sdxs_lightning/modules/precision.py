"""Float32 arithmetic inside a run in mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, autocast casts nothing; what bfloat16 would spoil stands in here, and its inputs are float32.

    Args:
        device: of the tensors; the meta device has no autocast to switch off.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
