"""DeCUR's loss from N x N Gram matrices against the same loss from D x D correlations.

Both sides take the same standardised projections of two views per modality and compute the four
terms; values and gradients are checked to be equal before anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from domainssl.bench.models import peak_memory
from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio
from domainssl.losses.decorrelation import (
    CorrelationForm,
    decur_cross,
    redundancy,
    standardize,
)

__all__ = ["measure"]

_COMMON_RATIO = 0.875
_TOLERANCE = 1e-4
_Projections = dict[str, Tensor]


def measure(settings: Settings) -> Iterator[Row]:
    """Yield time and peak memory of the loss, then both with the standardisation before it."""
    count = settings.pick(256, 16, settings.batch)
    width = 128 if settings.quick else 8192
    rounds = settings.pick(5, 1, settings.rounds)
    z = _projections(count, width, settings.device)
    note = f"N {count}, D {width}, forward and backward"
    is_gpu = settings.device.startswith("cuda")
    for what, is_raw in (("DeCUR's loss", False), ("DeCUR's loss and standardisation", True)):
        sides = {form: _step(z, form, is_raw) for form in ("gram", "matrix")}
        _check_equal(z, sides["gram"], sides["matrix"])
        pairs = interleaved(sides["gram"], sides["matrix"], rounds, settings.device)
        yield ratio(
            "decur",
            f"{what}, D x D form / Gram form, time",
            pairs,
            Goal("at least", 5.0) if not is_raw else None,
            note,
            ("Gram", "D x D"),
        )
        peaks = {form: peak_memory(step, settings.device) for form, step in sides.items()}
        yield Row(
            subject="decur",
            what=f"{what}, Gram form / D x D form, peak memory",
            values=(peaks["gram"] / peaks["matrix"],),
            unit="",
            goal=Goal("at most", 0.05) if not (is_raw or is_gpu) else None,
            note=f"{note}, beyond projections and their gradients; "
            + ", ".join(f"{form} {peak / 2**20:.0f} MiB" for form, peak in peaks.items()),
        )


def _projections(count: int, width: int, device: str) -> _Projections:
    """Return standardised projections (N, D) of two views of two modalities that correlate."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(count, width, generator=generator)
    z = {}
    for name in ("first_1", "first_2", "second_1", "second_2"):
        noise = torch.randn(count, width, generator=generator)
        z[name] = standardize(shared + noise).to(device).requires_grad_()
    return z


def _step(z: _Projections, form: str, is_raw: bool) -> Callable[[], Tensor]:
    """Return forward and backward of the loss; gradients are added to those that are there.

    Args:
        z: Projections.
        form: `gram` or `matrix`.
        is_raw: Standardise them first.
    """

    def step() -> Tensor:
        x = {name: standardize(value) for name, value in z.items()} if is_raw else z
        loss = _loss(x, form)  # type: ignore[arg-type]
        loss.backward()
        return loss.detach()

    return step


def _loss(z: _Projections, form: CorrelationForm) -> Tensor:
    """Compute the loss as `DeCUR` weights its terms, ()."""
    first = redundancy(z["first_1"], z["first_2"], form=form).weighted(0.0051)
    second = redundancy(z["second_1"], z["second_2"], form=form).weighted(0.0051)
    common = round(_COMMON_RATIO * z["first_1"].shape[1])
    parts = decur_cross(z["first_1"], z["second_1"], common, form=form)
    return (first + second + (parts[0] + parts[1]) / 2) / 3


def _check_equal(z: _Projections, gram: Callable[[], Tensor], matrix: Callable[[], Tensor]) -> None:
    """Compare value and gradients, each relative to its largest entry.

    Raises:
        RuntimeError: They differ by more than rounding.
    """
    found = []
    for step in (gram, matrix):
        for value in z.values():
            value.grad = torch.zeros_like(value)
        loss = step()
        gradients = [value.grad for value in z.values() if value.grad is not None]
        found.append([loss, *(gradient.clone() for gradient in gradients)])
    for ours, other in zip(*found, strict=True):
        difference = (ours - other).abs().max() / other.abs().max()
        if not difference <= _TOLERANCE:
            raise RuntimeError(
                f"bench decur: the two forms differ by {difference.item():.2g} of the largest "
                "entry in value or gradient; their times cannot be compared."
            )
