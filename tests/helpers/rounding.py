"""How far float32 rounding alone may move weights, whatever CPU, thread count or kernel computes the sums.

Two ways of adding up the same gradient differ by a few units in the last place of its largest contributions. An optimizer
passes that on times its Lipschitz constant in the gradient, and adds the rounding of the weight itself, once per update:

- SGD: lr;
- Adam: 2 lr / eps. The update is lr m / (sqrt(v) + eps); m and sqrt(v) are averages of the gradients, and a norm of them,
  so each moves by no more than the gradient does, and eps bounds the divisor from below. The usual eps of 1e-8 makes that
  constant 2e8 lr: where a gradient is rounding noise, the sign of the update is chance. `ADAM_EPS` keeps the comparison
  meaningful, and is no larger than typical gradients here, so that the second moment still shapes the update.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ADAM_EPS = 1e-3
EPSILON = torch.finfo(torch.float32).eps
UNITS_IN_THE_LAST_PLACE = 32
"""Of the gradient's norm, per update. 8 were seen to be reached on one CPU; the rest is room for other kernels, and for
what one update's difference does to the next gradient."""


def tolerance_of(
    weight: Tensor, optimizer: Literal["sgd", "adam"], lr: float, updates: int, norm: float
) -> float:
    """Largest difference that rounding explains.

    Args:
        weight: where one of the two runs arrived.
        optimizer: "adam" is Adam or AdamW with `eps=ADAM_EPS`.
        lr: largest learning rate of the run.
        updates: of this weight.
        norm: largest gradient norm, after clipping.
    """
    lipschitz = lr if optimizer == "sgd" else 2 * lr / ADAM_EPS
    gradient_rounding = UNITS_IN_THE_LAST_PLACE * EPSILON * norm
    weight_rounding = EPSILON * float(weight.abs().max())
    return updates * (lipschitz * gradient_rounding + weight_rounding)
