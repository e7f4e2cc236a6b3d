"""The difference of two networks as a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sdxs_lightning.networks.lora_files import Adapters, LowRank

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_OVERSAMPLING = 16
_SEED = 0


class Extraction(NamedTuple):
    """A LoRA, and how much of the difference it holds."""

    adapters: Adapters
    share: float
    """Share of the squared difference of the adapted layers, in [0, 1]."""
    left_out: int
    """Changed tensors that no adapter covers: biases, norms, layers that are no targets."""


@torch.no_grad()
def extract_lora(
    base: UNet2DConditionModel, tuned: UNet2DConditionModel, rank: int, targets: Sequence[str]
) -> Extraction:
    """The best approximation of `tuned - base` of a rank in each layer, in the Frobenius norm.

    Args:
        base: where the LoRA will be loaded.
        tuned: of the same shape.
        rank: of the matrices; less in layers that are smaller.
        targets: ends of the names of the layers.

    Raises:
        ValueError: for networks of different shapes, with NaN or infinity, or without a difference.

    Source: Eckart-Young; the randomised decomposition is Halko et al., arXiv:0909.4061, algorithm 4.4.
    """
    before, after = base.state_dict(), tuned.state_dict()
    if {name: tensor.shape for name, tensor in before.items()} != {
        name: tensor.shape for name, tensor in after.items()
    }:
        raise ValueError(
            "the two U-Nets have different layers, so their difference is no LoRA; give a network and a fine-tune of it."
        )
    adapters: Adapters = {}
    whole, kept, left_out = 0.0, 0.0, 0
    for name, old in before.items():
        if _equal_but_for_rounding(old, after[name]):
            continue
        change = after[name].float() - old.float()
        if not change.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinity in one of the two U-Nets; give networks that draw."
            )
        layer = name.removesuffix(".weight")
        if not any(f".{layer}".endswith(f".{target}") for target in targets) or change.dim() not in (2, 4):
            left_out += 1
            continue
        adapters[layer], values = low_rank(change, rank)
        whole, kept = whole + float(change.square().sum()), kept + values
    if not adapters:
        raise ValueError(
            "the two U-Nets do not differ in any of the target layers; there is nothing to extract."
        )
    return Extraction(adapters, min(kept / whole, 1.0), left_out)


def _equal_but_for_rounding(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors are the same, or one of them the other as stored in half precision, whose rounding is no tuning."""
    if torch.equal(old, new):
        return True
    return any(
        torch.equal(one.to(half).float(), other.float())
        for half in (torch.float16, torch.bfloat16)
        for one, other in ((old, new), (new, old))
    )


def low_rank(change: Tensor, rank: int) -> tuple[LowRank, float]:
    """The update, and its squared norm."""
    matrix = change.flatten(1)
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= rank + _OVERSAMPLING:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        right = right.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            left, values, right = torch.svd_lowrank(matrix, rank + _OVERSAMPLING, niter=4)
    values = values[:rank]
    root = values.sqrt()
    up, down = left[:, :rank] * root, (right[:, :rank] * root).T
    down = down.reshape(rank, *change.shape[1:])
    up = up[:, :, None, None] if change.dim() == 4 else up
    return LowRank(down.contiguous(), up.contiguous(), float(rank)), float(values.square().sum())
