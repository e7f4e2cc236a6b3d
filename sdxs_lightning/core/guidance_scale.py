"""Reading a guidance scale: 1 means no guidance everywhere; imports no torch."""

from __future__ import annotations

import sys

from sdxs_lightning.core.option_bounds import LARGEST_SCALE


def read_guidance_scale(name: str, value: float) -> float:
    """Checks a guidance scale; 0, which diffusers' examples of few-step models write for no guidance, is read as 1.

    In uncond + w (cond - uncond), 0 would drop the prompt.

    Args:
        name: option or setting, for messages.
        value: as given.

    Returns:
        A number of at least 1 and at most LARGEST_SCALE.

    Raises:
        ValueError: for other numbers outside these bounds, or NaN.
    """
    if value == 0:
        sys.stderr.write(f"{name} 0 is read as 1: no guidance.\n")
        return 1.0
    if not 1 <= value <= LARGEST_SCALE:
        raise ValueError(
            f"{name} is {value}, but must be a number of at least 1 and at most {LARGEST_SCALE}, where 1 means no guidance."
        )
    return value
