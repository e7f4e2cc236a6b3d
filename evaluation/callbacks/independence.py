"""A network that judges never trains: a score that was trained for says nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdxs_lightning.core.errors import UserError

SAMPLED = 64
"""Values of a weight that are compared."""
ROUNDING = 2.0**-7
"""By how much they may differ, relatively: bfloat16 keeps 8 bits. Absolutely 1e-6, for the smallest numbers of float16."""


def require_independent(judges: Iterable[Any], trainers: Mapping[str, nn.Module]) -> None:
    """Refuses a run that learns through a network by which it will be judged.

    Two networks count as one where they share the values of a weight, under whatever name and at whatever precision: a GAN
    may look through one tower of a CLIP only, in bfloat16.

    Args:
        judges: networks of the metrics; modules, or what holds them.
        trainers: frozen image networks of the training, by what the configuration calls them.

    Raises:
        UserError: where one is both.
    """
    judging = [
        (judge, shape, values)
        for judge in judges
        for module in _modules(judge)
        for shape, values in _weights(module)
    ]
    for name, trainer in trainers.items():
        for shape, values in _weights(trainer):
            for judge, its_shape, its_values in judging:
                if its_shape == shape and torch.allclose(values, its_values, rtol=ROUNDING, atol=1e-6):
                    raise UserError(
                        f"the student learns through {name}, which is the network '{_name(judge)}' that will judge it, and a "
                        f"score that was trained for says nothing; change {name} or the metrics' protocol."
                    )


def _modules(judge: Any) -> list[nn.Module]:
    """The network itself, or what a judge holds, be it through the CLIP that it wraps."""
    judge = getattr(judge, "clip", judge)
    if isinstance(judge, nn.Module):
        return [judge]
    found = [value for value in vars(judge).values() if isinstance(value, nn.Module)]
    assert found, f"{type(judge).__name__} holds no network that could be compared"
    return found


def _weights(module: nn.Module) -> Iterator[tuple[torch.Size, Tensor]]:
    """Shape and some values, evenly spread, of each matrix or kernel; constants, which networks begin with, tell nothing."""
    for weight in module.parameters():
        if weight.dim() < 2 or weight.numel() < SAMPLED:
            continue
        flat = weight.detach().reshape(-1)
        values = flat[torch.linspace(0, len(flat) - 1, SAMPLED).long().to(flat.device)].float().cpu()
        if values.unique().numel() > SAMPLED // 4:
            yield weight.shape, values


def _name(judge: Any) -> str:
    return str(getattr(judge, "name", type(judge).__name__))
