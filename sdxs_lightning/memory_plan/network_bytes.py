"""Exact bytes of a network's weights, gradients and optimizer state, per device."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdxs_lightning.training.plannable import PlannedNetwork, Role
from sdxs_lightning.training.sharding import blocks_of

PROBE_SHAPE = 8, 8


@dataclass(frozen=True)
class NetworkBytes:
    """One network on one device; counts are of the complete network, bytes of the device's shard."""

    name: str
    role: Role
    parameters: int
    trainable: int
    weights: int
    """Bytes of parameters and buffers."""
    gradients: int
    optimizer: int
    dtype: str
    """Dtype of the stored weights."""

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


def each_network_bytes(networks: Iterable[PlannedNetwork], shards: int) -> tuple[NetworkBytes, ...]:
    """The bytes of several networks; weights that an average shares with the trained network before it count there only."""
    counted: set[int] = set()
    found = []
    for network in networks:
        found.append(network_bytes(network, shards, counted))
        counted |= {id(parameter) for parameter in network.module.parameters()}
    return tuple(found)


def network_bytes(network: PlannedNetwork, shards: int, counted: Collection[int] = ()) -> NetworkBytes:
    """Computes the bytes of a network; gradients have the dtype of their weights, as in torch.

    Args:
        network: the network.
        shards: among how many processes it is sharded.
        counted: ids of parameters to leave out.
    """
    shards = shards if network.sharded else 1
    parameters = [p for p in network.module.parameters() if id(p) not in counted]
    trainable = [p for p in parameters if p.requires_grad] if network.role == "trained" else []
    buffers = sum(buffer.nbytes for buffer in network.module.buffers())
    state = state_per_element(network) if trainable else 0
    return NetworkBytes(
        name=network.name,
        role=network.role,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in trainable),
        weights=sum(sharded_numel(p, shards) * p.element_size() for p in parameters) + buffers,
        gradients=sum(sharded_numel(p, shards) * p.element_size() for p in trainable),
        optimizer=sum(sharded_numel(p, shards) for p in trainable) * state,
        dtype=str(parameters[0].dtype).removeprefix("torch.") if parameters else "",
    )


def sharded_numel(parameter: Tensor, shards: int) -> int:
    """Number of elements on the first device; FSDP2 shards the first dimension and rounds up."""
    if shards == 1 or parameter.ndim == 0:
        return parameter.numel()
    return -(-parameter.shape[0] // shards) * math.prod(parameter.shape[1:])


def state_per_element(network: PlannedNetwork) -> int:
    """Bytes of optimizer state per trained element: 8 for AdamW on float32, 0 for plain SGD.

    Measured on a real step of a small parameter. A scalar per tensor (the step counter) is ignored.
    """
    optimizer, _ = _probe(network)
    optimizer.step()
    count = math.prod(PROBE_SHAPE)
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(
        value.element_size() for value in state if isinstance(value, Tensor) and value.numel() == count
    )


def update_workspace(network: PlannedNetwork, shards: int) -> int:
    """Temporary bytes of the optimizer's step.

    On CUDA torch's optimizers update all tensors of a dtype together ("foreach") and need a copy of them, unless they are fused
    or `foreach` is off.
    """
    optimizer, _ = _probe(network)
    group = optimizer.param_groups[0]
    if "foreach" not in group or group.get("fused") or group["foreach"] is False:
        return 0
    trainable = [p for p in network.module.parameters() if p.requires_grad]
    return sum(sharded_numel(p, shards) * max(4, p.element_size()) for p in trainable)


def gathered_bytes(network: PlannedNetwork, compute_dtype: torch.dtype | None) -> int:
    """Upper bound of the bytes that FSDP2 holds besides the shards while the network runs.

    Forward: the unsharded weights of a group, and of the next one, which is being gathered. Backward, in addition: the group's
    unsharded gradients, and float32 copies of these and of the previous group's, which are being reduced.
    """
    groups = [_group_bytes(group, compute_dtype) for group in _groups(network.module)]
    rest, *blocks = groups
    blocks = blocks or [_Group(0, 0, 0)]
    forward = max(one.weights + following.weights for one, following in _neighbours(blocks))
    if network.role != "trained":
        return rest.weights + forward
    backward = max(
        one.weights + one.gradients + previous.weights + one.reduced + previous.reduced
        for one, previous in _neighbours(blocks)
    )
    return rest.weights + max(forward, backward)


class _Group(NamedTuple):
    """Bytes of weights that are gathered together."""

    weights: int
    gradients: int
    """Bytes of the trainable weights, in the dtype in which they are gathered."""
    reduced: int
    """Bytes of the trainable weights in float32."""


def _neighbours(blocks: Sequence[_Group]) -> Iterator[tuple[_Group, _Group]]:
    """Yields each group with the larger of its neighbours."""
    for index, block in enumerate(blocks):
        beside = [*blocks[max(index - 1, 0) : index], *blocks[index + 1 : index + 2]]
        yield block, max(beside, default=_Group(0, 0, 0))


def _groups(module: nn.Module) -> list[list[Tensor]]:
    """Parameters that are gathered together: first those outside the blocks, then each block's."""
    blocks: list[list[Tensor]] = [
        list(block.parameters()) for part in module.modules() for block in blocks_of(part)
    ]
    known = {id(p) for block in blocks for p in block}
    rest: list[Tensor] = [p for p in module.parameters() if id(p) not in known]
    return [rest, *blocks]


def _group_bytes(group: Sequence[Tensor], dtype: torch.dtype | None) -> _Group:
    def size(parameter: Tensor) -> int:
        return parameter.numel() * (parameter.element_size() if dtype is None else dtype.itemsize)

    learning = [p for p in group if p.requires_grad]
    return _Group(sum(map(size, group)), sum(map(size, learning)), sum(p.numel() * 4 for p in learning))


def _probe(network: PlannedNetwork) -> tuple[Optimizer, nn.Parameter]:
    assert network.optimizer is not None, f"{network.name} is trained and names no optimizer"
    dtype = next(p.dtype for p in network.module.parameters() if p.requires_grad)
    parameter = nn.Parameter(torch.zeros(PROBE_SHAPE, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    return network.optimizer([parameter]), parameter
