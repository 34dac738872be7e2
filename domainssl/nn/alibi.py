"""Attention with linear biases from coordinates: `-slope_h * |p_i - p_j|`, in any dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["DistanceBias", "KeyMask", "alibi_slopes", "pairwise_distance"]

_MAX_DISTANCES = 2**24  # kept at once, 64 MiB: one 64x64 grid


def alibi_slopes(heads: int) -> Tensor:
    """Return the slope of every head, (Hd,).

    For a power of two `m_i = 2^(-8(i+1)/heads)`; otherwise the slopes of the next smaller power
    of two, followed by every second slope of the next larger one.

    Source: ALiBi (Press et al. 2022). torchgeo's CROMA uses the first formula for every number
    of heads, which differs for 6, 10 and 12.
    """

    def geometric(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(heads))
    slopes = geometric(power)
    if power < heads:
        slopes += geometric(2 * power)[0::2][: heads - power]
    return torch.tensor(slopes)


def pairwise_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return Euclidean distances, (..., Q, D) and (..., K, D) -> (..., Q, K), in float32."""
    a, b = a.float(), b.float()
    if torch.compiler.is_exporting():  # ONNX has no cdist, and graphs change nothing in place
        parts = [a[..., i, None] - b[..., None, :, i] for i in range(a.shape[-1])]
        return torch.stack([part.square() for part in parts]).sum(0).sqrt()
    if not a.is_cuda:
        with torch.autocast(a.device.type, enabled=False):
            return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    # cdist's CUDA kernel gives a block of threads to every pair: 1 ms for 256 items of 56 tokens
    squares = [(a[..., i, None] - b[..., None, :, i]).square_() for i in range(a.shape[-1])]
    return sum(squares[1:], squares[0]).sqrt_()


class DistanceBias:
    """The additive attention bias of a set of queries and keys, computed when it is asked for.

    The bias is never stored as a per-item copy of a table: it follows from the coordinates of
    the tokens at hand, once per pass, and in blocks of query rows where all of it would be large.

    Args:
        queries: Coordinates of the queries, (B, Q, D), or (1, Q, D) when items share them.
        keys: Coordinates of the keys, (B, K, D) or (1, K, D).
        slopes: Slope per head, (Hd,).
        key_valid: bool (B, K); False keys are never attended to. An item without any valid key
            attends to all of them, so that its (unused) output stays finite.
        unplaced: So many leading queries and keys have no place, such as a class token: their
            bias is 0 in both directions, whatever their coordinates.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        slopes: Tensor,
        key_valid: Tensor | None = None,
        unplaced: int = 0,
    ) -> None:
        self.queries = queries
        self.keys = keys
        self.unplaced = unplaced
        self.slopes = slopes
        self.key_valid = key_valid
        if key_valid is not None:
            self.key_valid = key_valid | ~key_valid.any(dim=1, keepdim=True)
        self._full: dict[torch.dtype, Tensor] = {}
        self._distance: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B or 1, Hd, Q, K)."""
        batch = max(len(self.queries), len(self.keys))
        if self.key_valid is not None:
            batch = max(batch, len(self.key_valid))
        return batch, len(self.slopes), self.queries.shape[1], self.keys.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the bias of the query rows `start:stop`, (B or 1, Hd, stop - start, K).

        Args:
            start: First row.
            stop: Row after the last one.
            dtype: Of the result.
            out: Memory of that shape, used if `dtype` is float32 and all keys are valid: fresh
                pages for every block cost more than the arithmetic.
        """
        distance = self._distances(start, stop).unsqueeze(1)
        slopes = -self.slopes.view(1, -1, 1, 1).float()
        if out is not None and dtype == torch.float32 and self.key_valid is None:
            bias = torch.mul(slopes, distance, out=out)
        else:
            bias = (slopes * distance).to(dtype)
        if self.key_valid is not None:
            bias = bias.masked_fill(~self.key_valid[:, None, None, :], float("-inf"))
        return bias

    def _distances(self, start: int, stop: int) -> Tensor:
        """Return distances of some rows; all of them are kept when rows are taken in blocks."""
        queries = self.queries.shape[1]
        size = max(len(self.queries), len(self.keys)) * queries * self.keys.shape[1]
        if size > _MAX_DISTANCES or stop - start >= queries:
            return self._between(start, stop)
        if self._distance is None:
            self._distance = self._between(0, queries)
        return self._distance[:, start:stop]

    def _between(self, start: int, stop: int) -> Tensor:
        """Compute the distances of some rows, zero from and to tokens without a place."""
        found = pairwise_distance(self.queries[:, start:stop], self.keys)
        if self.unplaced:
            found[:, :, : self.unplaced] = 0
            found[:, : max(0, self.unplaced - start)] = 0
        return found

    def full(self, dtype: torch.dtype) -> Tensor:
        """Return the whole bias, (B or 1, Hd, Q, K); computed once and shared by all layers."""
        if dtype not in self._full:
            self._full[dtype] = self.rows(0, self.queries.shape[1], dtype)
        return self._full[dtype]


class KeyMask(DistanceBias):
    """The bias of attention without positions: minus infinity on keys that do not count.

    Args:
        key_valid: bool (B, K); False keys are never attended to, except in items that have none.
    """

    def __init__(self, key_valid: Tensor) -> None:
        none = torch.zeros(1, key_valid.shape[1], 1, device=key_valid.device)
        super().__init__(none, none, none.new_zeros(1), key_valid)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, 1, 1, K): equal for all heads and queries."""
        assert self.key_valid is not None
        return self.key_valid.shape[0], 1, 1, self.key_valid.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the bias, (B, 1, 1, K), the same for all rows and in memory of its own."""
        assert self.key_valid is not None
        bias = torch.zeros(self.shape, dtype=dtype, device=self.key_valid.device)
        return bias.masked_fill(~self.key_valid[:, None, None, :], float("-inf"))
