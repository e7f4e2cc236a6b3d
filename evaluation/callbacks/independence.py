"""Refuses metric networks that training uses: a metric that is optimised is not meaningful."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdxs_lightning.core.errors import UserError

SAMPLED = 64
"""Number of values compared per weight."""
ROUNDING = 2.0**-7
"""Relative tolerance, as bfloat16 has 8 bits; the absolute one is 1e-6, for the smallest values of float16."""


def require_independent(measuring: Iterable[Any], training: Mapping[str, nn.Module]) -> None:
    """Check that no metric network is also used in training.

    Networks count as the same if they share the values of one weight, whatever its name and precision: a GAN may use only
    one tower of a CLIP, in bfloat16.

    Args:
        measuring: networks of the metrics; modules, or objects that hold modules.
        training: frozen image networks of the training, by their name in the configuration.

    Raises:
        UserError: if a network is used for both.
    """
    metric_weights = [
        (network, shape, values)
        for network in measuring
        for module in _modules(network)
        for shape, values in _weights(module)
    ]
    for name, trainer in training.items():
        for shape, values in _weights(trainer):
            for network, its_shape, its_values in metric_weights:
                if its_shape == shape and torch.allclose(values, its_values, rtol=ROUNDING, atol=1e-6):
                    used = getattr(network, "name", type(network).__name__)
                    raise UserError(
                        f"the student trains through {name}, which is the network '{used}' of its metrics, and a metric that "
                        f"was optimised measures nothing; change {name} or the metrics' protocol."
                    )


def _modules(network: Any) -> list[nn.Module]:
    """The module itself, or the modules in an object or in the CLIP that it wraps."""
    network = getattr(network, "clip", network)
    if isinstance(network, nn.Module):
        return [network]
    found = [value for value in vars(network).values() if isinstance(value, nn.Module)]
    assert found, f"{type(network).__name__} holds no network that could be compared"
    return found


def _weights(module: nn.Module) -> Iterator[tuple[torch.Size, Tensor]]:
    """Shape and evenly spaced values of each matrix or kernel; skips constants, which many networks share."""
    for weight in module.parameters():
        if weight.dim() < 2 or weight.numel() < SAMPLED:
            continue
        flat = weight.detach().reshape(-1)
        values = flat[torch.linspace(0, len(flat) - 1, SAMPLED).long().to(flat.device)].float().cpu()
        if values.unique().numel() > SAMPLED // 4:
            yield weight.shape, values
