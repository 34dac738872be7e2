"""CROMA's training step against the list of its own matrix products, run back to back.

Every matrix product of one step (also those inside attention) is recorded with its very operands,
then the list is run again with nothing in between. What the step takes longer is normalisation of
the input, layer norms, activations, residuals, losses, and the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from domainssl.bench.models import batch_size, croma, forward_backward, made_up_batch
from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio

__all__ = ["Products", "goal", "measure", "recorded"]

_NAMES = ("mm", "mv", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
_PREFIXES = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")


class Products(TorchDispatchMode):
    """Records the matrix products that run while it is active.

    Attributes:
        calls: Operator, arguments and keyword arguments of each, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; remember it if it multiplies matrices."""
        name = func.overloadpacket.__name__
        if name in _NAMES or name.startswith(_PREFIXES):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        """Run all of them again."""
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)


def recorded(step: Callable[[], Any]) -> Products:
    """Return the products of a step, run once before as a warm-up."""
    step()
    products = Products()
    with products:
        step()
    return products


def goal(settings: Settings) -> Goal:
    """Return how much of a step its products should be."""
    return Goal("at least", 0.5 if settings.device.startswith("cuda") else 0.75)


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the share of its matrix products in the time of a step."""
    side = 32 if settings.quick else 120
    count = batch_size(settings)
    model, batch = croma(settings, side), made_up_batch(count, side, settings.device)
    step = forward_backward(model, batch, settings)
    products = recorded(step)
    rounds = settings.pick(5, 1, settings.rounds)
    pairs = interleaved(step, products.replay, rounds, settings.device)
    yield ratio(
        "matmul",
        "matrix products alone / forward and backward, time",
        pairs,
        goal(settings),
        f"batch {count}, {side} px, {len(products.calls)} products",
        ("step", "products"),
    )
    optimizer = torch.optim.AdamW(model.parameters())

    def whole() -> None:
        step()
        optimizer.step()

    pairs = interleaved(whole, products.replay, max(1, rounds // 2), settings.device)
    yield ratio(
        "matmul",
        "matrix products alone / forward, backward and AdamW, time",
        pairs,
        None,
        f"batch {count}; AdamW does not depend on the batch",
        ("step", "products"),
    )
