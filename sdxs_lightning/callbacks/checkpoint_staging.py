"""Copies of a checkpoint's state in host memory, from which it is written while training continues."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Place = tuple[Any, ...]
"""Keys and indices that lead to a tensor in a checkpoint."""


class Staging:
    """Host memory for the tensors of a checkpoint, allocated with the first one and reused by the later ones.

    A copy shares nothing with the state that training changes. Tensors on a CUDA device are copied into page-locked memory by
    the current stream, on which everything that later changes them is queued behind the copy, so the host does not wait.
    """

    def __init__(self) -> None:
        self._buffers: dict[Place, Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        self._device: torch.device | None = None

    def copy(self, checkpoint: dict[str, Any], rounding: Rounding) -> dict[str, Any]:
        """Copies a checkpoint; invalidates the previous copy.

        Args:
            checkpoint: nested dicts, lists and tuples of tensors and plain values.
            rounding: dtypes in which tensors are kept.

        Returns:
            The copy, with the same structure; complete after `wait`.
        """
        known, self._buffers = self._buffers, {}
        copied: dict[Any, Tensor] = {}
        self._copied = self._device = None

        def stage(place: Place, tensor: Tensor) -> Tensor:
            tensor, dtype = tensor.detach(), rounding.dtype_of(place, tensor)
            same = _memory(tensor), dtype
            if same not in copied:  # else it is tied to another one, and stays so
                buffer = known.get(place)
                if buffer is None or not _fits(buffer, tensor, dtype):
                    buffer = torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=tensor.is_cuda)
                _local(buffer).copy_(_local(tensor), non_blocking=tensor.is_cuda)
                self._buffers[place] = copied[same] = buffer
                if tensor.is_cuda:
                    self._device = tensor.device
            return copied[same]

        staged: dict[str, Any] = map_tensors(checkpoint, stage)
        if self._device is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))
        return staged

    def wait(self) -> None:
        """Waits until the copy is complete. Called by the thread that reads it."""
        if self._copied is not None:
            assert self._device is not None
            torch.cuda.set_device(
                self._device
            )  # a new thread's is the first one, where it would make a context
            self._copied.synchronize()


class Rounding:
    """Which tensors of a checkpoint are kept as bfloat16.

    Args:
        averages: names in the `state_dict` of averaged weights in float32, which are rounded like the tensors that the
            optimizers keep for each weight (Adam's moments); None rounds nothing.
    """

    def __init__(self, averages: frozenset[str] | None = None) -> None:
        self.averages = averages

    def dtype_of(self, place: Place, tensor: Tensor) -> torch.dtype:
        """The dtype in which the tensor at this place is kept."""
        if self.averages is None or tensor.dtype != torch.float32:
            return tensor.dtype
        moments = place[0] == "optimizer_states" and tensor.ndim > 0
        averaged = place[0] == "state_dict" and place[1] in self.averages
        return torch.bfloat16 if moments or averaged else tensor.dtype

    def rounded(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint with rounded tensors, in host memory; the others are not copied."""

        def round_off(place: Place, tensor: Tensor) -> Tensor:
            dtype = self.dtype_of(place, tensor)
            return tensor if dtype == tensor.dtype else tensor.to("cpu", dtype)

        rounded: dict[str, Any] = map_tensors(checkpoint, round_off)
        return rounded


def map_tensors(value: Any, function: Callable[[Place, Tensor], Tensor], place: Place = ()) -> Any:
    """A deep copy in which `function(place, tensor)` replaces each tensor."""
    if isinstance(value, Tensor):
        return function(place, value)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the class, and the versions that a state_dict has in `_metadata`
        for key, inner in value.items():
            copied[key] = map_tensors(inner, function, (*place, key))
        return copied
    if type(value) in (list, tuple):
        return type(value)(map_tensors(inner, function, (*place, i)) for i, inner in enumerate(value))
    return copy.deepcopy(value)


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    local = _local(tensor)
    if local.numel() == 0:
        return (id(tensor),)
    return local.device, local.data_ptr(), local.dtype, tensor.size(), local.size(), local.stride()


def _fits(buffer: Tensor, tensor: Tensor, dtype: torch.dtype) -> bool:
    if type(buffer) is not type(tensor) or buffer.dtype != dtype or buffer.size() != tensor.size():
        return False
    if isinstance(buffer, DTensor) and isinstance(tensor, DTensor) and buffer.placements != tensor.placements:
        return False
    return _local(buffer).stride() == _local(tensor).stride()
