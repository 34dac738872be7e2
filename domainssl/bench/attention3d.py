"""Attention over the patches of a volume: bias computed from coordinates, or held in memory.

The other side computes the bias of every head and pair once, keeps it for all layers, as a bias
table does, and hands it to the same fused attention; the third side also writes the scores out.
All give the same values and gradients, which is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.bench.models import peak_memory
from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio
from domainssl.nn.alibi import DistanceBias, alibi_slopes
from domainssl.nn.attention import attention
from domainssl.nn.patching import grid_coordinates, patch_proportions

__all__ = ["measure"]

_PATCH, _SPACING = 8, (1.0, 1.0, 2.0)
_LAYERS = 4
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the ratios of times and those of peak memory."""
    grid, heads, width = ((3, 2, 2), 2, 8) if settings.quick else ((16, 16, 8), 16, 64)
    generator = torch.Generator().manual_seed(0)
    count = settings.pick(1, 2, settings.batch)
    shape = (3, count, heads, math.prod(grid), width)
    q, k, v = torch.randn(shape, generator=generator).to(settings.device).unbind()
    inputs = [t.requires_grad_() for t in (q, k, v)]
    sides = torch.tensor(patch_proportions(_PATCH, _SPACING), device=settings.device)
    coords = (grid_coordinates(grid, device=sides.device) * sides).expand(count, -1, -1)
    slopes = alibi_slopes(heads).to(settings.device)

    def computed() -> Layer:
        bias = DistanceBias(coords, coords, slopes)
        return lambda q, k, v: attention(q, k, v, bias, path=settings.attention)

    def held() -> Layer:
        bias = DistanceBias(coords, coords, slopes).full(q.dtype)
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def written_out() -> Layer:
        bias = DistanceBias(coords, coords, slopes)
        return lambda q, k, v: attention(q, k, v, bias, path="math")

    ours, other, plain = (_step(side, inputs) for side in (computed, held, written_out))
    for side in (other, plain):
        _check_equal(ours(), side())
    voxels = " x ".join(str(n * _PATCH) for n in grid)
    note = (
        f"batch {count}, {voxels} voxels in patches of {_PATCH}, {heads} heads of {width}, "
        f"{_LAYERS} layers, forward and backward"
    )
    rounds = settings.pick(5, 1, settings.rounds)
    peaks = [peak_memory(side, settings.device) for side in (ours, other, plain)]
    for name, side, peak in (("held", other, peaks[1]), ("written out", plain, peaks[2])):
        pairs = interleaved(ours, side, rounds, settings.device)
        yield ratio("attention3d", f"{name} / ours, time", pairs, None, note, ("ours", name))
        yield Row(
            subject="attention3d",
            what=f"ours / {name}, peak memory",
            values=(peaks[0] / peak,),
            unit="",
            goal=Goal("at most", 0.5),
            note=f"{note}; ours {peaks[0] / 2**20:.0f} MiB, {name} {peak / 2**20:.0f} MiB",
        )


def _step(make: Callable[[], Layer], inputs: list[Tensor]) -> Callable[[], Tensor]:
    """Return what runs the layers and their backward pass, its result and gradients in a row."""

    def step() -> Tensor:
        layer, (q, k, v) = make(), inputs
        for _ in range(_LAYERS):
            q = layer(q, k, v)
        gradients = torch.autograd.grad(q.square().mean(), inputs)
        return torch.cat([t.detach().flatten() for t in (q, *gradients)])

    return step


def _check_equal(ours: Tensor, other: Tensor) -> None:
    difference, size = float((ours - other).norm()), float(other.norm())
    if difference > 1e-3 * size:
        raise RuntimeError(
            f"bench attention3d: the sides differ by {difference:.3g} of {size:.3g}; their times "
            "cannot be compared."
        )
