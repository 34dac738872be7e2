"""CROMA's training step against the list of its own matrix products, run back to back.

Every matrix product of one step (also those inside attention) is recorded with its very operands,
then the list is run again with nothing in between. What the step takes longer is normalisation of
the input, layer norms, activations, residuals, losses, and the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from domainssl._torch import TorchDispatchMode
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
    if settings.device.startswith("cuda"):
        yield _fraction_of_peak(step, settings, rounds, f"batch {count}, {side} px")
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


def _fraction_of_peak(step: Callable[[], Any], settings: Settings, rounds: int, note: str) -> Row:
    """Return the step's operations per second over those of one large product, in one run.

    The operations are counted, not estimated: matrix products and attention of both passes.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    side = 1024 if settings.quick else 8192
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=settings.device, dtype=dtype) for _ in range(2))
    pairs = interleaved(step, lambda: [a @ b for _ in range(10)], rounds, settings.device)
    own, peak = counter.get_total_flops(), 10 * 2 * side**3
    return Row(
        subject="matmul",
        what=f"operations per second of the step / of a {side} x {side} product",
        values=tuple((own / ours) / (peak / theirs) for ours, theirs in pairs),
        note=f"{note}; {own / 1e12:.2f} TFLOP a step, {dtype}",
    )
