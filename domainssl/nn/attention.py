"""Multi-head attention with an optional distance bias that need not exist in memory at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from domainssl._torch import compile_variants
from domainssl.nn.alibi import DistanceBias, KeyMask

__all__ = ["AttentionPath", "attention"]

AttentionPath = Literal["fused", "math", "flex"]

# Bias entries held at once. Above it the queries are taken in blocks of rows; 2^24 float32
# entries are 64 MiB, which a block of a 64x64 grid with 16 heads still fits.
_MAX_BIAS_ELEMENTS = 2**24
_FLEX_VARIANTS = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: DistanceBias | None = None,
    *,
    path: AttentionPath = "fused",
    dropout: float = 0.0,
) -> Tensor:
    """Compute `softmax(q k^T / sqrt(d) + bias) v`.

    Args:
        q: Queries, (B, Hd, Q, d).
        k: Keys, (B, Hd, K, d).
        v: Values, (B, Hd, K, d).
        bias: Distance bias; added after scaling and itself unscaled.
        path: `fused` uses scaled_dot_product_attention with the bias in q's dtype; `flex`
            computes the bias inside the kernel, from the coordinates, in float32
            (FlexAttention, compiled on CUDA; elsewhere it is slow and for comparison only);
            `math` writes the formula out in float32, for tests and exact comparisons.
        dropout: Share of the softmax's entries that are dropped, from the global generator;
            `flex` then computes as `fused` does.

    Returns:
        (B, Hd, Q, d), in q's dtype.
    """
    if path == "math":
        return _attention_math(q, k, v, bias, dropout)
    if path == "flex" and bias is not None and not isinstance(bias, KeyMask) and not dropout:
        return _attention_flex(q, k, v, bias)
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    # an exported graph serves every size: its bias is never cut
    if torch.compiler.is_exporting() or math.prod(bias.shape) <= _MAX_BIAS_ELEMENTS:
        mask = bias.full(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return _attention_by_rows(q, k, v, bias, dropout)


def _attention_math(
    q: Tensor, k: Tensor, v: Tensor, bias: DistanceBias | None, dropout: float
) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
        if bias is not None:
            scores = scores + bias.full(torch.float32)
        return (F.dropout(scores.softmax(-1), dropout) @ v.float()).to(q.dtype)


@cache
def _flex() -> Callable[..., Tensor]:
    """Return FlexAttention, compiled once per process.

    `fullgraph` makes torch's limit of recompilations an error: past it, FlexAttention would fall
    back to scores in memory.
    """
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


def _attention_flex(q: Tensor, k: Tensor, v: Tensor, bias: DistanceBias) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    queries, keys, slopes = bias.queries.float(), bias.keys.float(), bias.slopes.float()
    valid, unplaced = bias.key_valid, bias.unplaced

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at_q = b if len(queries) > 1 else 0
        at_k = b if len(keys) > 1 else 0
        squares = [
            (queries[at_q, i, axis] - keys[at_k, j, axis]) ** 2 for axis in range(keys.shape[-1])
        ]
        distance = sum(squares[1:], squares[0]).sqrt()
        if unplaced:
            distance = torch.where((i < unplaced) | (j < unplaced), 0.0, distance)
        s = s - slopes[h] * distance
        return s if valid is None else torch.where(valid[b, j], s, float("-inf"))

    if q.is_cuda:
        # widths, shared or own coordinates, masks, gradients: more variants than the default of 8
        with compile_variants(_FLEX_VARIANTS):
            out = _flex()(q, k, v, score_mod=score)
    else:
        out = flex_attention(q, k, v, score_mod=score)
    assert isinstance(out, Tensor)
    return out


def _attention_by_rows(
    q: Tensor, k: Tensor, v: Tensor, bias: DistanceBias, dropout: float
) -> Tensor:
    """Attend in blocks of query rows; with gradients each block's bias is computed again."""
    batch, heads, queries, keys = bias.shape
    step = max(1, _MAX_BIAS_ELEMENTS // (batch * heads * keys))

    def block(part: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        rows = bias.rows(start, start + part.shape[2], part.dtype)
        return F.scaled_dot_product_attention(part, k, v, attn_mask=rows, dropout_p=dropout)

    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        parts = [
            checkpoint(block, q[:, :, i : i + step], k, v, i, use_reentrant=False)
            for i in range(0, queries, step)
        ]
        return torch.cat(parts, dim=2)
    memory = None
    if q.dtype == torch.float32:
        memory = q.new_empty((batch, heads, step, keys))
    out = torch.empty_like(q)
    for start in range(0, queries, step):
        part = q[:, :, start : start + step]
        rows = None if memory is None else memory[:, :, : part.shape[2]]
        mask = bias.rows(start, start + part.shape[2], q.dtype, rows)
        out[:, :, start : start + step] = F.scaled_dot_product_attention(
            part, k, v, attn_mask=mask, dropout_p=dropout
        )
    return out
