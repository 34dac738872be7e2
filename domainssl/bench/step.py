"""CROMA's training step against the same model as published: scores, bias and softmax in memory.

The other side repeats the bias table of the whole grid for every item of the batch, gathers the
rows and columns of the visible tokens from it, and writes `softmax(q k^T / sqrt(d) + bias) v` out,
which is what the released pretraining code does. Both sides give the same loss, which is checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import domainssl.backbones.croma as croma_module
import domainssl.nn.blocks as blocks_module
from domainssl.bench.models import (
    batch_size,
    croma,
    forward_backward,
    made_up_batch,
    peak_memory,
)
from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio
from domainssl.modality import Batch
from domainssl.nn.alibi import DistanceBias, pairwise_distance
from domainssl.nn.blocks import compile_blocks, set_attention_path
from domainssl.nn.patching import grid_coordinates
from domainssl.objectives.croma import CROMA

__all__ = ["materialised", "measure"]

_SIDE, _PATCH = 120, 8


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the ratio of times and those of memory."""
    side = 32 if settings.quick else _SIDE
    count = batch_size(settings)
    model, batch = croma(settings, side), made_up_batch(count, side, settings.device)
    other = forward_backward(model, batch, settings, lambda: materialised(side // _PATCH))
    if settings.compile:  # the other sides stay as they are, on a model of equal weights
        compiled = croma(settings, side)
        compile_blocks(compiled)
        ours = forward_backward(compiled, batch, settings)
    else:
        ours = forward_backward(model, batch, settings)
    free = forward_backward(model, batch, settings, lambda: _with(_values))
    plain = forward_backward(model, batch, settings, lambda: _with(_unbiased))
    _check_equal(ours(), other(), settings)
    rounds = settings.pick(5, 1, settings.rounds)
    pairs = interleaved(ours, other, rounds, settings.device)
    note = f"batch {count}, {side} px, forward and backward{', compiled' * settings.compile}"
    is_gpu = settings.device.startswith("cuda")
    yield ratio(
        "step",
        "materialised / ours, time",
        pairs,
        Goal("at least", 3.0 if is_gpu else 1.0),
        note,
        ("ours", "materialised"),
    )
    if settings.attention == "flex":
        yield _flex_against_fused(model, batch, settings, ours, rounds, note)
    yield from _memory(
        {"ours": ours, "materialised": other, "unbiased": plain, "no attention": free},
        settings,
        note,
    )


def _flex_against_fused(
    model: CROMA, batch: Batch, settings: Settings, flex: Any, rounds: int, note: str
) -> Row:
    """Return the time of the plain path over that of FlexAttention, in one run."""

    @contextmanager
    def fused() -> Iterator[None]:
        set_attention_path(model.backbone, "fused")
        try:
            yield
        finally:
            set_attention_path(model.backbone, "flex")

    pairs = interleaved(
        flex, forward_backward(model, batch, settings, fused), rounds, settings.device
    )
    return ratio("step", "fused / flex, time", pairs, None, note, ("flex", "fused"))


def _memory(runs: dict[str, Any], settings: Settings, note: str) -> Iterator[Row]:
    """Yield ratios of peak memory: what biases and scores add, what attention adds, all of it.

    `unbiased` is fused attention without any bias, `no attention` hands the values through.
    """
    peaks = {}
    for name, run in runs.items():  # gradients of the run before are there to be added to
        peaks[name] = peak_memory(lambda run=run: run(keep=True), settings.device)  # type: ignore[misc]
    for what, floor in (
        ("that biases and scores add to attention", "unbiased"),
        ("that attention adds to the step", "no attention"),
    ):
        mine, theirs = (peaks[name] - peaks[floor] for name in ("ours", "materialised"))
        yield Row(
            subject="step",
            what=f"ours / materialised, peak memory {what}",
            values=(mine / max(theirs, 1),),
            unit="",
            goal=Goal("at most", 0.5),
            note=f"{note}; ours {_mib(mine)}, materialised {_mib(theirs)}",
        )
    absolute = ", ".join(f"{name} {_mib(peak)}" for name, peak in peaks.items())
    yield Row(
        subject="step",
        what="ours / materialised, peak memory of the whole step",
        values=(peaks["ours"] / peaks["materialised"],),
        note=f"beyond weights, gradients and batch: {absolute}",
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def _check_equal(ours: Tensor, other: Tensor, settings: Settings) -> None:
    tolerance = 2e-2 if settings.precision == "bf16" else 1e-4
    if not torch.allclose(ours, other, rtol=tolerance):
        raise RuntimeError(
            f"bench step: the two sides differ, loss {ours.item():.6f} and {other.item():.6f}; "
            "their times cannot be compared."
        )


class _TabledBias(DistanceBias):
    """The bias gathered from one table of the whole grid per item."""

    side = 0
    tables: dict[tuple[int, torch.device], Tensor] = {}

    def _table(self) -> Tensor:
        """Return the bias of the whole grid, (1, Hd, N, N), kept between steps as published."""
        place = (self.side, self.slopes.device)
        if place not in self.tables:
            grid = grid_coordinates((self.side, self.side), device=self.slopes.device)
            distance = pairwise_distance(grid, grid)
            self.tables[place] = -self.slopes.view(1, -1, 1, 1) * distance
        return self.tables[place]

    def full(self, dtype: torch.dtype) -> Tensor:
        """Return the bias of the visible tokens, (B, Hd, Q, K)."""
        if torch.float32 not in self._full:
            rows, columns = (
                (c[..., 0] * self.side + c[..., 1]).long() for c in (self.queries, self.keys)
            )
            tokens, heads = self.side**2, len(self.slopes)
            index = rows.unsqueeze(2) * tokens + columns.unsqueeze(1)  # (B, Q, K)
            every = self._table().repeat(len(rows), 1, 1, 1).flatten(2)  # (B, Hd, N·N)
            wanted = index.flatten(1).unsqueeze(1).expand(-1, heads, -1)
            bias = every.gather(2, wanted).unflatten(2, index.shape[1:])
            self._full[torch.float32] = bias
        return self._full[torch.float32]


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Any = None, **how: Any) -> Tensor:
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        scores = scores + bias.full(scores.dtype)
    return scores.softmax(-1) @ v


def _values(q: Tensor, k: Tensor, v: Tensor, bias: Any = None, **how: Any) -> Tensor:
    return v


@contextmanager
def materialised(side: int) -> Iterator[None]:
    """Let CROMA compute attention as published while the context is open.

    Args:
        side: Patches per side of the grid.
    """
    bias = type("_Tabled", (_TabledBias,), {"side": side})
    with _replaced(croma_module, "DistanceBias", bias):
        with _replaced(blocks_module, "attention", _attention):
            yield


def _unbiased(q: Tensor, k: Tensor, v: Tensor, bias: Any = None, **how: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _with(function: Any) -> Any:
    return _replaced(blocks_module, "attention", function)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
