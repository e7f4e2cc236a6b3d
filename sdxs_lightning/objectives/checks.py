"""Argument checks shared by the objectives."""

import math

from torch import Tensor


def check_weight(objective: str, **weights: float) -> None:
    """Raises ValueError unless all weights are positive and finite."""
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(
                f"{name} of {objective} must be positive, got {weight}; to switch the objective off, set it "
                "to null."
            )


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError unless all shapes are equal, since broadcasting would silently give a wrong loss."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must agree, got {got}.")
