"""Muon for small convolutional networks: orthogonalised momentum for matrices, AdamW for everything else.

torch.optim.Muon rejects convolutions and needs a second optimizer for all other parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, steep at 0: five steps bring singular values of 0.01 and more close to 1."""
NEWTON_SCHULZ_STEPS = 5
SMALLEST_SIDE = 8
"""Matrices with fewer rows or columns use AdamW, such as the last convolution with its three outputs."""


def orthogonalised(matrices: Tensor) -> Tensor:
    """Approximates the nearest semi-orthogonal matrices: singular values end up between about 0.7 and 1.2.

    Args:
        matrices: (n, rows, columns), float.

    Returns:
        Same shape and dtype.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values at most 1
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(Optimizer):
    """Muon for weights, as matrices with one row per output, and AdamW for biases and narrow weights; one learning rate.

    Orthogonalised updates are scaled to the size of AdamW's, a root mean square of 0.2, so AdamW's learning rates carry over.

    Args:
        params: parameters or parameter groups.
        lr: learning rate of both.
        momentum: Nesterov momentum of Muon.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: decoupled weight decay of both.

    Raises:
        ValueError: for a negative learning rate.

    Source: as for `orthogonalised`; for the shared learning rate, Liu et al., arXiv:2502.16982, section 2.2.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr of Muon must not be negative, got {lr}.")
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one update; `closure` re-evaluates the loss, as in torch's optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            matrices = [parameter for parameter in learning if _is_matrix(parameter)]
            if matrices:
                self._orthogonal_step(matrices, group)
            for parameter in learning:
                if not _is_matrix(parameter):
                    self._adamw_step(parameter, group)
        return loss

    def _orthogonal_step(self, parameters: list[Tensor], group: Mapping[str, Any]) -> None:
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for parameter in parameters:
            alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
        for (rows, columns), members in alike.items():
            # Batched by shape, since the matrices are small and many.
            update = orthogonalised(torch.stack([self._direction(p, group["momentum"]) for p in members]))
            size = 0.2 * max(rows, columns) ** 0.5
            for parameter, matrix in zip(members, update, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(matrix.view(parameter.shape), alpha=-group["lr"] * size)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum as a matrix."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum).flatten(1).float()

    def _adamw_step(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(parameter.grad, 1 - beta1)
        square.lerp_(parameter.grad.square(), 1 - beta2)
        scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1 ** state["step"]))


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= SMALLEST_SIDE
