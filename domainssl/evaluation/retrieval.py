"""Does one sensor find the other: retrieval of partners, or of items of the same class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from domainssl.evaluation.probes import standardize

__all__ = ["Side", "class_retrieval", "recall_at_1"]


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


@dataclass(frozen=True, kw_only=True)
class Side:
    """Queries, or the gallery they are looked up in.

    Attributes:
        features: (N, E).
        labels: Class of every item, int (N,).
        groups: Items of one number are of one person, int (N,).
    """

    features: Tensor
    labels: Tensor
    groups: Tensor


def class_retrieval(queries: Side, gallery: Side, k: int = 5) -> dict[str, float]:
    """Rank the gallery for every query, and tell how early items of the query's class come.

    Both sides are standardised by themselves, because the level and scale of features differ
    between sensors; similarity is the cosine. Items of the query's own person are left out.
    Queries without an item of their class in the gallery do not count.

    Args:
        queries: Items of one sensor.
        gallery: Items of another one.
        k: Nearest items that `P@k` looks at.

    Returns:
        `P@1` and `P@<k>`, the share of the query's class among the nearest items; `mAP`, the mean
        over queries of the average precision; `chance`, the share of that class in the gallery.
        NaN without a query that counts.

    Source: Manning et al., Introduction to Information Retrieval (2008), section 8.4.
    """
    a, b = (
        torch.nn.functional.normalize(standardize(side.features), dim=1)
        for side in (queries, gallery)
    )
    is_other = queries.groups.unsqueeze(1) != gallery.groups
    is_hit = (queries.labels.unsqueeze(1) == gallery.labels) & is_other
    counts = is_hit.any(1)
    order = (
        (a @ b.T).masked_fill(~is_other, -torch.inf).argsort(dim=1, descending=True, stable=True)
    )
    ranked = is_hit.gather(1, order)[counts].double()  # (Q, G), the nearest item first
    candidates, relevant = is_other[counts].sum(1), ranked.sum(1)
    places = torch.arange(1, len(b) + 1)
    precision = ranked.cumsum(1) / places
    found = {f"P@{n}": ranked[:, :n].sum(1) / candidates.clamp(max=n) for n in sorted({1, k})}
    found["mAP"] = (precision * ranked).sum(1) / relevant
    found["chance"] = relevant / candidates
    return {name: float(value.mean()) for name, value in found.items()}
