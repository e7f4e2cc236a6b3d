"""CUDA's memory behaviour on the meta device: fused attention without an N x N matrix, and autocast.

torch has neither for meta tensors: attention falls back to the unfused formula, and autocast ignores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOWER = frozenset(
    "conv1d conv2d conv3d conv_transpose2d prelu addmm matmul __matmul__ __rmatmul__ einsum mm mv linear baddbmm bmm "
    "scaled_dot_product_attention".split()
)
"""Functions that run in the lower precision. Source: torch/docs/source/amp.md, "CUDA ops that can autocast to float16"."""

FLOAT32 = frozenset(
    "pow __pow__ __rpow__ exp log rsqrt softplus layer_norm group_norm l1_loss mse_loss smooth_l1_loss huber_loss "
    "binary_cross_entropy_with_logits cosine_similarity cdist dist norm prod sum cumsum softmax log_softmax "
    "interpolate upsample_nearest2d upsample_bilinear2d".split()
)
"""Functions that run in float32. Same source; upsampling is in torch/aten/src/ATen/autocast_mode.h."""


class AsOnCuda(TorchFunctionMode):
    """Mode in which functions on meta tensors allocate memory as on CUDA.

    Args:
        autocast: the lower precision of "bf16-mixed" or "16-mixed"; None disables autocast.
        at_backward: called at the start of a backward pass.
    """

    def __init__(
        self, autocast: torch.dtype | None = None, at_backward: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self._autocast = autocast
        self._at_backward = at_backward
        self._casts: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property such as .shape, by far the most frequent
            return func(*args, **kwargs)
        if name == "backward":
            return self._backward(args[0])
        if name == "grad" and func is torch.autograd.grad:
            return self._grad(*args, **kwargs)
        if self._autocast is not None and name in LOWER:
            args, kwargs = self._mapped(self._lower, args, kwargs)
        elif self._autocast is not None and name in FLOAT32:
            args, kwargs = self._mapped(_float32, args, kwargs)
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def forget_casts(self) -> None:
        """Frees the lower-precision copies of the weights, as at the end of autocast."""
        self._casts.clear()

    @contextmanager
    def islands(self) -> Iterator[None]:
        """Context in which `torch.autocast(...)` changes this mode, since torch's own rejects the meta device."""
        autocast = torch.autocast
        torch.autocast = self._island  # type: ignore[assignment,misc]
        try:
            yield
        finally:
            torch.autocast = autocast  # type: ignore[misc]

    @contextmanager
    def _island(
        self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **_: Any
    ) -> Iterator[None]:
        outside = self._autocast
        self._autocast = (dtype or outside) if enabled else None
        try:
            yield
        finally:
            self._autocast = outside

    def _backward(self, loss: Tensor) -> None:
        self._run_engine((loss,), (), None, keep=False, differentiable=False)

    def _grad(
        self,
        outputs: Tensor | Sequence[Tensor],
        inputs: Tensor | Sequence[Tensor],
        grad_outputs: Tensor | Sequence[Tensor] | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        **_: Any,
    ) -> tuple[Tensor, ...]:
        keep = create_graph if retain_graph is None else retain_graph
        given = None if grad_outputs is None else _tuple(grad_outputs)
        return self._run_engine(_tuple(outputs), _tuple(inputs), given, keep, create_graph)

    def _run_engine(
        self,
        outputs: tuple[Tensor, ...],
        inputs: tuple[Tensor, ...],
        gradients: tuple[Tensor, ...] | None,
        keep: bool,
        differentiable: bool,
    ) -> tuple[Tensor, ...]:
        """Returns gradients with respect to `inputs`; without inputs accumulates them into all trainable weights."""
        self._at_backward()
        # torch disables the mode while it handles a function, but recomputation of checkpointed blocks needs it. All public
        # entry points of the engine are such functions, so the engine is called directly.
        with self:
            engine = torch.autograd.Variable._execution_engine
            result: tuple[Tensor, ...] = engine.run_backward(
                outputs,
                gradients or tuple(map(torch.ones_like, outputs)),
                keep,
                differentiable,
                inputs,
                allow_unreachable=not inputs,
                accumulate_grad=not inputs,
            )
        return result

    def _mapped(
        self, cast: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return value
        # Autocast keeps the copy of a trainable weight until its outermost context ends, after the training step.
        if value.dtype == torch.float32 and value.requires_grad and value.is_leaf:
            if id(value) not in self._casts:
                self._casts[id(value)] = value.to(self._autocast)
            return self._casts[id(value)]
        return value.to(self._autocast)


def _tuple(tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    result: Tensor = _FusedAttention.apply(query, key, value)
    return result


class _FusedAttention(torch.autograd.Function):
    """Allocates like flash and memory-efficient attention: saves query, key, value, output, and one float32 per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *batch, heads, rows, _ = query.shape
        # In the kernels' layout, so that the caller's transpose and reshape return a view.
        output = query.new_empty(*batch, rows, heads, value.shape[-1]).transpose(-3, -2)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(*batch, heads, rows, dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, rows = ctx.saved_tensors
        workspace = torch.empty_like(rows), torch.empty_like(query, dtype=torch.float32)  # noqa: F841
        return tuple(torch.empty_like(tensor) for tensor in (query, key, value))
