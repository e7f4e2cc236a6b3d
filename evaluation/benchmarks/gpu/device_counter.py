"""Counts kernel launches and host synchronisations without a GPU: the meta device stands for it.

Whatever brings a value from the device to the host, or copies pageable memory there and waits for the copy, is an operation
that the dispatcher sees on every device.
"""

from __future__ import annotations

import math
import os
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[3]
OURS = tuple(f"{ROOT / folder}{os.sep}" for folder in ("sdxs_lightning", "evaluation", "tests"))
"""Folders of our code; the virtual environment may lie beside them."""
META = torch.device("meta")
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Of a `_foreach` kernel, by the number of its lists; aten/src/ATen/native/cuda/MultiTensorApply.cuh."""
BLOCKS_PER_LAUNCH, CHUNK_ELEMENTS = 320, 65536
"""Likewise: a block works on a chunk of one tensor."""
READS = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal"})
"""Give the host a value."""
SIZED_BY_VALUES = frozenset(
    {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor"}
)
"""The host has to know the size of the result."""


class DeviceCounter(TorchDispatchMode):
    """Mode that counts what operations on the meta device would launch on a GPU, and where the host would wait for it.

    A value that is asked for is 1; numbers that depend on it are therefore wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        """Kernel launches by operation. An operation is one launch, and one of lists as many as their chunks need."""
        self.waits: list[str] = []
        """Operation, and the line of this repository that asked for it, of each host synchronisation."""

    def __enter__(self) -> DeviceCounter:
        self._factories = _Factories(self)
        self._factories.__enter__()
        entered: DeviceCounter = super().__enter__()
        return entered

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._factories.__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in given if tensor.device == META]
        if there and name in READS:
            self.wait(name)
            return True if name in ("is_nonzero", "equal") else _one(there[0].dtype)
        if name in ("_to_copy", "copy_") and self._copies_across(name, args, kwargs, there):
            self.wait(name)
            if _to(name, args, kwargs) != META:
                return torch.ones(there[0].shape, dtype=kwargs.get("dtype") or there[0].dtype)
        self._check_index(name, args, there)
        result = func(*args, **kwargs)
        if name not in SIZED_BY_VALUES:
            self._launched(func, name, args, result)
        return result

    @property
    def total(self) -> int:
        """Launches of all operations."""
        return sum(self.launches.values())

    def _copies_across(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], there: list[Tensor]
    ) -> bool:
        """Whether it is a copy between host and device for which the host waits."""
        source, target = (args[1] if name == "copy_" else args[0]).device, _to(name, args, kwargs)
        if (source == META) == (target == META):
            return False
        return not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))

    def _check_index(self, name: str, args: tuple[Any, ...], there: list[Tensor]) -> None:
        if not there:
            return
        if name in SIZED_BY_VALUES:
            self.wait(name)
        elif name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            for index in args[1]:
                if index is None:
                    continue
                if index.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{name} with a mask")
                elif index.device != META:
                    self.wait(f"{name} with an index on the host")

    def _launched(self, func: Any, name: str, args: tuple[Any, ...], result: Any) -> None:
        produced = [leaf for leaf in tree_leaves((result, args)) if isinstance(leaf, Tensor)]
        if not any(tensor.device == META for tensor in produced) or _only_views_or_allocates(func, name):
            return
        if "_foreach_" in name or name.startswith("_fused_"):
            lists = [arg for arg in args if isinstance(arg, list) and arg and isinstance(arg[0], Tensor)]
            self.launches[name] += _launches_of_lists(lists[0], len(lists)) if lists else 1
        else:
            self.launches[name] += 1

    def wait(self, what: str) -> None:
        """Notes a host synchronisation."""
        frames = traceback.extract_stack()
        own = [f for f in frames if f.filename.startswith(OURS) and f.filename != __file__]
        where = own[-1] if own else frames[-4]
        outside = next(
            (f for f in reversed(frames) if "torch/" not in f.filename and f.filename != __file__), where
        )
        line = f"{what} at {Path(where.filename).name}:{where.lineno}"
        if outside.filename != where.filename:
            line += f", in {Path(outside.filename).name}:{outside.lineno} ({outside.line})"
        self.waits.append(line)


class _Factories(TorchFunctionMode):
    """torch.tensor(..., device=...) makes a tensor on the host and copies it where no dispatch mode can see it."""

    def __init__(self, counter: DeviceCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        makes_one = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if makes_one and torch.device(kwargs.get("device") or "cpu") == META:
            self._counter.wait("tensor")
        return func(*args, **kwargs)


def _to(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    if name == "copy_":
        device: torch.device = args[0].device
        return device
    return torch.device(kwargs["device"]) if kwargs.get("device") is not None else args[0].device


def _one(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _only_views_or_allocates(func: Any, name: str) -> bool:
    if name.startswith(
        ("empty", "new_empty", "detach", "lift", "_reshape_alias", "_unsafe_view", "set_", "resize_")
    ):
        return True
    returned = [one.alias_info for one in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def _launches_of_lists(tensors: list[Tensor], lists: int) -> int:
    chunks = sum(math.ceil(max(tensor.numel(), 1) / CHUNK_ELEMENTS) for tensor in tensors)
    by_tensors = math.ceil(len(tensors) / TENSORS_PER_LAUNCH[min(lists, 5)])
    return max(by_tensors, math.ceil(chunks / BLOCKS_PER_LAUNCH))
