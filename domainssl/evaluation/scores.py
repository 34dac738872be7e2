"""Scores with intervals: ratios of sums over items, resampled by person.

A score is computed with any weights on the items; a draw of the bootstrap is such a weighting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["AveragePrecision", "Partition", "Rate", "Score", "interval", "resampled"]

Array = NDArray[Any]


class Score(Protocol):
    """What can be computed with any weights on the items."""

    def over(self, weights: Array) -> Array:
        """Return the score per weighting and seed, (B, S), of weights (B, N)."""


@dataclass(frozen=True)
class Rate:
    """The mean over groups of sum(hits) / sum(counts); groups without counts do not count.

    Attributes:
        hits: (S, N, G) per seed, item and group.
        counts: (S, N, G).
    """

    hits: Array
    counts: Array

    @classmethod
    def of_hits(cls, hits: Array) -> Rate:
        """Return the mean of values (S, N), such as hits or average precisions; NaN is left out."""
        known = np.isfinite(hits)
        return cls(np.where(known, hits, 0.0)[..., None], known[..., None].astype(float))

    @classmethod
    def per_class(cls, found: Array, wanted: Array, classes: int) -> Rate:
        """Return the mean over classes of the share found, from classes (S, N) and (N,)."""
        is_class = (wanted[:, None] == np.arange(classes)).astype(float)  # (N, K)
        hits = (found == wanted)[..., None] * is_class
        return cls(hits, np.broadcast_to(is_class, hits.shape))

    def over(self, weights: Array) -> Array:
        """See `Score`."""
        return _mean_ratio(
            np.einsum("bn,sng->bsg", weights, self.hits, optimize=True),
            np.einsum("bn,sng->bsg", weights, self.counts, optimize=True),
        )


def _mean_ratio(hits: Array, counts: Array) -> Array:
    known = counts > 0
    ratio = np.where(known, hits / np.where(known, counts, 1.0), 0.0)
    number = known.sum(-1)
    return np.where(number > 0, ratio.sum(-1) / np.maximum(number, 1), np.nan)


@dataclass(frozen=True)
class Partition:
    """How far clusters agree with classes.

    Attributes:
        clusters: int (S, N).
        classes: int (N,).
        measure: `nmi` (normalised mutual information, arithmetic mean) or `ari` (adjusted Rand
            index).

    Source: Vinh et al., JMLR 2010; Hubert and Arabie, 1985. Equal to scikit-learn's.
    """

    clusters: Array
    classes: Array
    measure: str

    def over(self, weights: Array) -> Array:
        """See `Score`."""
        count = int(self.classes.max()) + 1
        of_class = np.eye(count)[self.classes]
        score = _nmi if self.measure == "nmi" else _ari
        out = []
        for clusters in self.clusters:
            of_cluster = np.eye(int(clusters.max()) + 1)[clusters]
            both = (of_cluster[:, :, None] * of_class[:, None]).reshape(len(clusters), -1)
            table = (weights @ both).reshape(len(weights), -1, count)  # (B, clusters, classes)
            out.append(score(table))
        return np.stack(out, axis=1)


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision of the items that have a label, ranked by its probability.

    Attributes:
        chances: float (S, N, K).
        has: float (N, K), 1 where an item has the label.
        known: bool (N, K), True where it is known whether it has.

    Source: scikit-learn's `average_precision_score`: sum over thresholds of the precision times the
    growth of the recall; equal chances share a threshold.
    """

    chances: Array
    has: Array
    known: Array

    def over(self, weights: Array) -> Array:
        """Return the mean over labels; see `Score`. Labels that no drawn item has do not count."""
        found = self.per_class(weights)
        counted = np.isfinite(found)
        total = np.where(counted, found, 0.0).sum(2)
        return np.where(counted.any(2), total / np.maximum(counted.sum(2), 1), np.nan)

    def per_class(self, weights: Array) -> Array:
        """Return the value per weighting, seed and label, (B, S, K); NaN without an item."""
        seeds, _, labels = self.chances.shape
        out = np.empty((len(weights), seeds, labels))
        for k in range(labels):
            known = self.known[:, k]
            for seed in range(seeds):
                chances = self.chances[seed, known, k]
                order = np.argsort(-chances, kind="stable")
                ranked = chances[order]
                ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
                drawn = weights[:, known][:, order]
                hits = (drawn * self.has[known, k][order]).cumsum(1)[:, ends]
                seen = drawn.cumsum(1)[:, ends]
                precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
                grown = np.diff(hits, axis=1, prepend=0.0)
                total = hits[:, -1]
                value = (precision * grown).sum(1) / np.where(total > 0, total, 1.0)
                out[:, seed, k] = np.where(total > 0, value, np.nan)
        return out


def _entropy(shares: Array) -> Array:
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1)


def _nmi(table: Array) -> Array:
    shares = table / table.sum((1, 2), keepdims=True)
    a, b = _entropy(shares.sum(2)), _entropy(shares.sum(1))
    mutual = a + b - _entropy(shares.reshape(len(shares), -1))
    mean = (a + b) / 2
    return np.where(mean > 1e-12, mutual / np.maximum(mean, 1e-12), 1.0)


def _ari(table: Array) -> Array:
    def pairs(x: Array) -> Array:
        return x * (x - 1) / 2

    both = pairs(table).sum((1, 2))
    a, b = pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    expected = a * b / np.maximum(pairs(table.sum((1, 2))), 1)
    room = (a + b) / 2 - expected
    return np.where(room > 1e-12, (both - expected) / np.where(room > 1e-12, room, 1.0), 1.0)


def resampled(persons: Array, draws: int, seed: int) -> Array:
    """Return weights of items in bootstrap draws, float64 (B, N).

    Persons are drawn with replacement, each with all its items, because items of one person are
    not independent.

    Args:
        persons: int (N,).
        draws: Number of draws.
        seed: Of the draws.
    """
    groups, own = np.unique(persons, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=draws)
    weights: Array = drawn[:, own].astype(float)
    return weights


def interval(values: Array, percent: float = 95.0) -> tuple[float, float]:
    """Return the percentile interval of bootstrap values (B,); NaN without finite ones."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    edge = (100 - percent) / 2
    low, high = np.percentile(finite, [edge, 100 - edge])
    return float(low), float(high)
