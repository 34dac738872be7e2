"""Tell the target of a hidden token from those of others: Galileo's PatchDisc and AllDisc."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from domainssl.distributed import RowLayout, all_reduce_sum, gather, global_mean, row_layout
from domainssl.nn.precision import full

__all__ = ["standardized", "token_discrimination"]

_MAX_ELEMENTS = 2**24  # similarities held at once; above it they are taken item by item


def _batch_terms(
    prediction: Tensor, target: Tensor, keys: Tensor, usable: Tensor, temperature: float
) -> Tensor:
    """(b, K, E), (b, K, E), (R, E) and bool (R,) -> cross-entropies (b, K)."""
    logits = prediction @ keys.T / temperature
    logits = logits.masked_fill(~usable, torch.finfo(logits.dtype).min)
    return logits.logsumexp(-1) - (prediction * target).sum(-1) / temperature


def _among_all(
    p: Tensor, t: Tensor, counted: Tensor, temperature: float, gathers: bool,
    layout: RowLayout | None,
) -> Tensor:  # fmt: skip
    keys, usable = t.flatten(0, 1), counted.flatten()
    if gathers:
        layout = layout or row_layout(keys)
        keys, usable = (gather(x, "detach", layout) for x in (keys, usable))
    step = max(1, _MAX_ELEMENTS // (p.shape[1] * len(keys)))
    if len(p) <= step:
        return _batch_terms(p, t, keys, usable, temperature)
    return torch.cat([
        checkpoint(_batch_terms, a, b, keys, usable, temperature, use_reentrant=False)
        for a, b in zip(p.split(step), t.split(step), strict=True)
    ])  # fmt: skip


def _item_terms(prediction: Tensor, target: Tensor, usable: Tensor, temperature: float) -> Tensor:
    """(b, K, E), (b, K, E) and bool (b, K) -> cross-entropies (b, K)."""
    logits = prediction @ target.transpose(1, 2) / temperature
    logits = logits.masked_fill(~usable.unsqueeze(1), torch.finfo(logits.dtype).min)
    return logits.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2)


def standardized(rows: Tensor, counted: Tensor) -> Tensor:
    """Subtract the mean of every feature over the counted rows of all ranks, divide by its spread.

    The spread is the unbiased standard deviation plus 1e-4.

    Args:
        rows: (..., E).
        counted: bool (...).

    Source: the option `pred2unit` of Galileo's released code.

    Examples:
        >>> rows = torch.tensor([[0.0], [2.0], [9.0]])
        >>> standardized(rows, torch.tensor([True, True, False]))[:2].round().tolist()
        [[-1.0], [1.0]]
    """
    with torch.autocast(rows.device.type, enabled=False):
        x, weight = full(rows), counted.unsqueeze(-1)
        axes = tuple(range(counted.ndim))
        count = all_reduce_sum(counted.sum().to(x.dtype))
        mean = all_reduce_sum(torch.where(weight, x, 0.0).sum(axes)) / count.clamp(min=1)
        squares = all_reduce_sum(torch.where(weight, (x - mean).square(), 0.0).sum(axes))
        # the smallest number keeps the gradient of the root finite where all rows are alike
        variance = (squares / (count - 1).clamp(min=1)).clamp(min=torch.finfo(x.dtype).tiny)
        return (x - mean) / (variance.sqrt() + 1e-4)


def token_discrimination(
    prediction: Tensor,
    target: Tensor,
    counted: Tensor,
    temperature: float = 0.1,
    *,
    candidates: Literal["item", "batch"] = "item",
    gathers: bool = True,
    counts_empty: bool = False,
    layout: RowLayout | None = None,
) -> Tensor:
    """Find the target of every predicted token among those of its item, or of all items.

    `L = 2 t · mean over items of mean over tokens of CE(cos(p_i, t_j) / t over j, i)`.

    Args:
        prediction: (B, K, E); normalised here.
        target: Constants, (B, K, E); normalised here.
        counted: bool (B, K); False tokens neither ask nor answer.
        temperature: t.
        candidates: Targets of the same item (`item`, PatchDisc) or of all (`batch`, AllDisc).
        gathers: Of `batch`: candidates of all ranks, else of this one, so that the loss depends on
            the number of ranks.
        counts_empty: Items without a token count as zero in the mean, else not at all.
        layout: Rows of every rank, items times tokens (`row_layout`); None asks.

    Returns:
        The loss, (); its mean over ranks is that of one process with the joined batch. Without
        any token a zero that is connected to the prediction.

    Source: Tseng et al. 2025 (arXiv 2502.09356), section 3.3, and the released code.

    Examples:
        >>> rows = torch.eye(2).unsqueeze(0)
        >>> yes = torch.ones(1, 2, dtype=torch.bool)
        >>> round(float(token_discrimination(rows, rows, yes, temperature=1.0)), 4)
        0.6265
    """
    with torch.autocast(prediction.device.type, enabled=False):
        p = F.normalize(full(prediction), dim=-1)
        t = F.normalize(full(target.detach()), dim=-1)
        if candidates == "item":
            terms = _item_terms(p, t, counted, temperature)
        else:
            terms = _among_all(p, t, counted, temperature, gathers, layout)
        tokens = counted.sum(1).to(terms.dtype)
        each = torch.where(counted, terms, 0.0).sum(1) / tokens.clamp(min=1)
        items = torch.ones_like(tokens) if counts_empty else (tokens > 0).to(terms.dtype)
        return 2 * temperature * global_mean(each.sum(), items.sum())
