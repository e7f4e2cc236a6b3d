"""Bytes that a device sends in an iteration: weights that FSDP2 gathers, and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sdxs_lightning.memory_plan.hardware import Hardware
from sdxs_lightning.memory_plan.network_bytes import sharded_numel
from sdxs_lightning.training.plannable import PlannedNetwork
from sdxs_lightning.training.sharding import blocks_of


@dataclass(frozen=True)
class Traffic:
    """Bytes handed to the collectives in an iteration that updates every network, and what of it one device sends.

    Gradients are exact. Gathered weights are within some per cent: FSDP2 also prefetches the block before the first one that
    the backward pass needs, and gathers what is outside the blocks once for two passes of one backward pass.

    In a ring of n ranks, each sends (n - 1) / n of them in an all-gather or reduce-scatter, and twice that in an all-reduce.
    """

    gathered: int
    """Weights, all-gathered within a group of shards."""
    scattered: int
    """Gradients, reduce-scattered within a group of shards."""
    reduced: int
    """Shards of gradients, all-reduced across the replicas."""
    averaged: int
    """Gradients of networks that are not sharded, all-reduced over all processes."""
    shards: int
    replicas: int

    @property
    def sent_within(self) -> int:
        """Bytes that a device sends to the others of its group of shards."""
        return (self.gathered + self.scattered) * (self.shards - 1) // self.shards

    @property
    def sent_across(self) -> int:
        """Bytes that a device sends to its counterparts in other replicas."""
        return 2 * self.reduced * (self.replicas - 1) // self.replicas

    @property
    def sent_to_all(self) -> int:
        """Bytes that a device sends to average what is not sharded."""
        processes = self.shards * self.replicas
        return 2 * self.averaged * (processes - 1) // processes


@dataclass
class _Group:
    """Parameters that travel together, and how often in one micro-batch."""

    parameters: list[nn.Parameter]
    gathers_again: bool
    """Whether the backward pass gathers the weights again."""
    gathers: int = 0
    trained: list[nn.Parameter] = field(default_factory=list)
    """Those that got gradients."""


class TrafficCount:
    """Counts what travels while a step runs on the meta device.

    Args:
        networks: all networks of the stage.
        hardware: number of processes and shards, precision.
        accumulate: micro-batches per iteration; across the replicas gradients travel in the last one only.
    """

    def __init__(self, networks: Sequence[PlannedNetwork], hardware: Hardware, accumulate: int) -> None:
        self._hardware, self._accumulate = hardware, accumulate
        self._groups: dict[nn.Module, _Group] = {}
        self._whole: list[nn.Parameter] = []
        for network in networks:
            if network.sharded and hardware.shards > 1:
                for module, group in _groups_of(network.module):
                    self._groups.setdefault(module, group)
            elif network.role == "trained":
                self._whole += [p for p in network.module.parameters() if p.requires_grad]

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Context in which one micro-batch runs."""
        self.restart()
        handles = []
        for module, group in self._groups.items():
            # Not looked up by module in the hook: the encoder of a U-Net is another module with the same hooks.
            handles.append(module.register_forward_hook(partial(_passed, group)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def restart(self) -> None:
        """Forgets what came before the first micro-batch."""
        for group in self._groups.values():
            group.gathers, group.trained = 0, []

    def traffic(self) -> Traffic:
        """The traffic of an iteration of such micro-batches."""
        shards, replicas = self._hardware.shards, self._hardware.replicas
        gathered = scattered = reduced = 0
        for group in self._groups.values():
            weights = sum(self._gathered_bytes(p) for p in group.parameters)
            gradients = sum(sharded_numel(p, shards) for p in group.trained) * self._gradient_itemsize
            gathered += group.gathers * weights
            # Once, in however many passes of the backward pass they arise.
            scattered += gradients * shards
            reduced += gradients if replicas > 1 else 0
        averaged = sum(p.numel() * p.element_size() for p in self._whole) if shards * replicas > 1 else 0
        times = self._accumulate
        return Traffic(times * gathered, times * scattered, reduced, averaged, shards, replicas)

    def _gathered_bytes(self, parameter: Tensor) -> int:
        itemsize = (self._hardware.gathered or parameter.dtype).itemsize
        return sharded_numel(parameter, self._hardware.shards) * self._hardware.shards * itemsize

    @property
    def _gradient_itemsize(self) -> int:
        return 4 if self._hardware.weights is None else self._hardware.weights.itemsize


def _passed(group: _Group, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    differentiated = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))
    group.gathers += 2 if differentiated and group.gathers_again else 1
    trained = [parameter for parameter in group.parameters if parameter.requires_grad]
    if differentiated and trained:
        group.trained = trained


def _groups_of(module: nn.Module) -> Iterator[tuple[nn.Module, _Group]]:
    """The groups in which `training.sharding` shards a network, by the module whose forward pass gathers them."""
    units = [part for part in module.modules() if blocks_of(part)]
    for unit in units:
        inner: set[nn.Parameter] = set()
        for block in blocks_of(unit):
            parameters = list(block.parameters())
            inner.update(parameters)
            yield block, _Group(parameters, gathers_again=True)
        yield unit, _Group([p for p in unit.parameters() if p not in inner], gathers_again=True)
    if not units:
        # A head stays gathered after its forward pass.
        yield module, _Group(list(module.parameters()), gathers_again=False)
