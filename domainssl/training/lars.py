"""LARS: stochastic gradient descent whose step is measured by the length of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARS"]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum.

        g <- g + weight_decay * p
        g <- g * trust * |p| / |g|        factor 1 where one of both is zero
        m <- momentum * m + g
        p <- p - lr * m

    Args:
        params: Parameters or groups; a group with `adapt: False` is neither scaled nor decayed.
        lr: Learning rate.
        momentum: Share of the last step that is kept.
        trust: Step length over parameter length (eta).
        weight_decay: Decay of adapted parameters.

    Source: You et al. 2017, in the form of the released Barlow Twins and DeCUR code.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        trust: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "trust": trust,
                "weight_decay": weight_decay,
                "adapt": True,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if group["adapt"]:
            grad = grad + group["weight_decay"] * parameter
            length, step = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(grad)
            is_scaled = (length > 0) & (step > 0)
            grad = grad * torch.where(is_scaled, group["trust"] * length / step, 1.0)
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(group["momentum"]).add_(grad)
        parameter.sub_(state["momentum"], alpha=float(group["lr"]))
