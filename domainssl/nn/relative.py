"""Attention with learned terms per bucket of distance between patches.

`logits_ij = s q_i k_j^T + q'_i W[:, b(i, j)]`: a table W of one column per bucket, shared by heads
and multiplied with the query.
Source: iRPE (Wu et al. 2021), Euclidean method, contextual mode, on keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domainssl.errors import ConfigError
from domainssl.nn.attention import AttentionPath
from domainssl.nn.patching import grid_coordinates

__all__ = [
    "BUCKETS",
    "RelativeTable",
    "aligned_buckets",
    "bucket_table",
    "check_path",
    "legacy_buckets",
    "relative_attention",
]

BUCKETS = 8
_ZERO, _CLASS = 3, 7  # buckets 0 to 2 are for negative offsets, which distances do not have
_MAX_BIAS_ELEMENTS = 2**25  # entries held at once; above it queries are taken in rows


def _distance_buckets(a: Tensor, b: Tensor) -> Tensor:
    """Bucket of two patches, (N, D) and (K, D) -> int64 (N, K).

    Distance d rounded: 0 for d = 0, 1 for 1, 2 for 2 and 3, 3 beyond; plus 3.
    """
    squares = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1)
    distance = squares.sqrt().round()
    edges = torch.tensor([1.0, 2.0, 4.0], device=a.device)
    return torch.bucketize(distance, edges, right=True) + _ZERO


def _with_class_tokens(inner: Tensor, count: int) -> Tensor:
    return F.pad(inner, (count, 0, count, 0), value=_CLASS)


def bucket_table(
    grid: Sequence[int],
    device: torch.device | None = None,
    proportions: Sequence[float] | None = None,
) -> Tensor:
    """Return the buckets of a class token and all patches of a grid.

    Args:
        grid: Patches along each axis.
        device: Where to compute.
        proportions: Lengths of a patch's sides, in the unit of distances; None counts patches.

    Returns:
        int64 (1 + P, 1 + P).
    """
    coords = grid_coordinates(grid, device=device)
    if proportions is not None:
        coords = coords * torch.tensor(proportions, device=device)
    return _with_class_tokens(_distance_buckets(coords, coords), 1)


def aligned_buckets(table: Tensor, modalities: int) -> Tensor:
    """Buckets of a class token and M·P tokens: of their patches, whatever their modality."""
    index = torch.arange(1, len(table), device=table.device).repeat(modalities)
    index = F.pad(index, (1, 0))
    return table[index][:, index]


def legacy_buckets(table: Tensor, modalities: int) -> Tensor:
    """Buckets as the published code lays them: the whole sequence on the largest square.

    Positions before that square count as class tokens. Right for one modality on a square grid.
    """
    length = 1 + modalities * (len(table) - 1)
    side = math.isqrt(length)
    coords = grid_coordinates((side, side), device=table.device)
    return _with_class_tokens(_distance_buckets(coords, coords), length - side**2)


class RelativeTable(nn.Module):
    """One learned column per bucket."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, head_width, BUCKETS))

    def forward(self, q: Tensor) -> Tensor:
        """(B, Hd, Q, d) -> terms (B, Hd, Q, 8)."""
        return q @ self.lookup_table_weight[0].to(q.dtype)


def check_path(path: AttentionPath, where: str) -> None:
    """Refuse the kind of attention that has no learned terms.

    Args:
        path: What was asked for.
        where: Name of the setting, for the message.

    Raises:
        ConfigError: It is `flex`.
    """
    if path == "flex":
        raise ConfigError(
            f"{where}: got 'flex', which computes distance biases inside its kernel, but here "
            "every query has learned terms per bucket of distance, which are gathered; expected "
            "'fused' or 'math'. Set it to 'fused'."
        )


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Tensor,
    buckets: Tensor,
    key_valid: Tensor,
    *,
    dropout: float = 0.0,
    path: AttentionPath = "fused",
) -> Tensor:
    """Compute `softmax(q k^T / sqrt(d) + terms[.., b]) v` over the valid keys.

    Args:
        q: Queries, (B, Hd, Q, d).
        k: Keys, (B, Hd, K, d).
        v: Values, (B, Hd, K, d).
        terms: Term per query and bucket, (B, Hd, Q, 8).
        buckets: int64 (Q, K).
        key_valid: bool (B, K); at least one key of every item must be valid.
        dropout: On the attention weights.
        path: `fused` uses scaled_dot_product_attention, `math` writes the formula out in float32.

    Returns:
        (B, Hd, Q, d) in q's dtype.

    Raises:
        ConfigError: The path is `flex`.
    """
    check_path(path, "attention path")
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]

    def rows(q: Tensor, k: Tensor, v: Tensor, terms: Tensor, start: int) -> Tensor:
        part = buckets[start : start + q.shape[2]].expand(batch, heads, -1, -1)
        bias = terms.gather(-1, part).masked_fill(~key_valid[:, None, None], -math.inf)
        if path != "math":
            return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout_p=dropout)
        with torch.autocast(q.device.type, enabled=False):
            scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = F.dropout((scores + bias.float()).softmax(-1), dropout)
            return (weights @ v.float()).to(q.dtype)

    step = max(1, _MAX_BIAS_ELEMENTS // (batch * heads * keys))
    if queries <= step:
        return rows(q, k, v, terms, 0)
    out = []
    for start in range(0, queries, step):
        cut = slice(start, start + step)
        out.append(
            checkpoint(rows, q[:, :, cut], k, v, terms[:, :, cut], start, use_reentrant=False)
        )
    return torch.cat(out, dim=2)
