"""Float32 arithmetic inside a run in mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, autocast casts nothing; what bfloat16 would spoil stands in here, and its inputs are float32.

    Args:
        device: of the tensors.
    """
    # torch has no autocast of the meta device; the memory plan puts its own in the place of torch.autocast.
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
