"""Does one sensor find the other: retrieval across modalities."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["recall_at_1"]


def recall_at_1(queries: Tensor, gallery: Tensor) -> float:
    """Return how often the most similar gallery item is the query's own partner.

    Both sides are centred first, because the offset between sensors says nothing about items.

    Args:
        queries: (N, E).
        gallery: (N, E); row i is the partner of query i.

    Returns:
        Share of hits; chance is 1 / N. Of several equally similar items the first counts.
    """
    if len(queries) < 2:
        return float("nan")
    a, b = (
        torch.nn.functional.normalize(x.float() - x.float().mean(0), dim=1)
        for x in (queries, gallery)
    )
    hits = 0
    for rows in torch.arange(len(a)).split(1024):
        hits += int(((a[rows] @ b.T).argmax(1) == rows).sum())
    return hits / len(a)
