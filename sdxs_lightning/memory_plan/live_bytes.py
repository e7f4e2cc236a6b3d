"""Counts the bytes of live tensors on the meta device, where they use no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Mode that tracks the storage of every tensor that an operation returns until it is freed.

    Views share a storage, which counts once. Excludes the overhead of CUDA's caching allocator (rounding to 512 bytes,
    fragmentation) and workspaces inside kernels.

    Args:
        modules: modules whose parameters and buffers are not counted.
        shapes: cached shapes of an earlier count.
    """

    def __init__(self, modules: Iterable[nn.Module] = (), shapes: ShapeMemory | None = None) -> None:
        super().__init__()
        self.live = 0
        """Currently live bytes, including gradients."""
        self.gradients = 0
        """Live bytes of gradients that an optimizer will read."""
        self.line: list[tuple[int, int]] = []
        """(live, gradients) after each increase."""
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self._held = [tensor.untyped_storage() for tensor in tensors]
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._held}
        self._gradient_storages: set[int] = set()
        self._shapes = shapes or ShapeMemory()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._shapes.call(func, args, kwargs or {})
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        return result

    def add(self, size: int, gradients: bool = False) -> None:
        """Counts bytes without a tensor, such as a gradient shard; negative bytes are subtracted."""
        self.live += size
        self.gradients += size if gradients else 0
        self.line.append((self.live, self.gradients))

    def mark_gradient(self, gradient: Tensor) -> None:
        """Counts this tensor as a gradient from now on."""
        storage = gradient.untyped_storage()
        self._track(storage)
        key = storage._cdata
        if key not in self._gradient_storages and key in self._known:
            self._gradient_storages.add(key)
            self.gradients += storage.nbytes()

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        # torch keeps the Python object of a storage alive as long as the storage itself.
        self._known[key] = weakref.ref(storage, lambda _: self._untrack(key, size))
        self.live += size
        self.line.append((self.live, self.gradients))

    def _untrack(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size
        if key in self._gradient_storages:
            self._gradient_storages.remove(key)
            self.gradients -= size


class ShapeMemory:
    """Caches the result shapes of operations, which torch computes in Python and networks repeat many times.

    Makes the plan of SDXL several times faster. Operations whose result shares storage with an argument are not cached.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._fresh: dict[Any, bool] = {}
        """Whether an operation's results are new tensors, by its schema."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of an operation on the meta device."""
        fresh = self._fresh.get(func)
        if fresh is None:
            fresh = self._fresh[func] = all(value.alias_info is None for value in func._schema.returns)
        if not fresh:
            return func(*args, **kwargs)
        try:
            key = func, _description(args), _description(tuple(kwargs.items()))
            known = self._known.get(key)
        except TypeError:  # an unhashable argument
            return func(*args, **kwargs)
        if known is not None:
            return _made(known)
        result = func(*args, **kwargs)
        if func is torch.ops.aten.convolution.default and _is_channels_last(args[1]):
            # As in cuDNN; on the meta device torch considers the input's format only.
            result = torch.empty_like(result, memory_format=torch.channels_last)
        outputs = result if isinstance(result, tuple | list) else (result,)
        if all(output is None or isinstance(output, Tensor) for output in outputs):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            storages = [one.untyped_storage()._cdata for one in (*inputs, *outputs) if one is not None]
            devices = {one.device.type for one in (*inputs, *outputs) if one is not None}
            own = {one.untyped_storage()._cdata for one in outputs if one is not None}
            if devices == {"meta"} and all(storages.count(storage) == 1 for storage in own):
                self._known[key] = _shape(result)
        return result


def _is_channels_last(weight: Tensor) -> bool:
    # By the strides, as in torch, since a 1x1 weight is contiguous in either format.
    return weight.ndim == 4 and weight.stride()[1] == 1 and weight.stride()[3] == weight.shape[1] > 1


def _description(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "tensor", value.dtype, value.device, tuple(value.shape), value.stride()
    if isinstance(value, tuple | list):
        return tuple(map(_description, value))
    return type(value), value


def _shape(result: Any) -> Any:
    if isinstance(result, tuple | list):
        return type(result), [_shape(one) for one in result]
    return None if result is None else (tuple(result.shape), result.stride(), result.dtype)


def _made(shape: Any) -> Any:
    if shape is None:
        return None
    if isinstance(shape[0], type):
        return shape[0](map(_made, shape[1]))
    size, stride, dtype = shape
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")
