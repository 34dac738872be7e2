"""Probes of items with any number of labels: neighbours, a linear and an MLP probe per label.

Labels are 0 or 1 per item and class, NaN where unknown. Measured are mAP, the mean over classes of
the average precision, and the mean F1 of what is more likely than not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainssl.errors import DataError
from domainssl.evaluation.features import Items
from domainssl.evaluation.probes import one_thread
from domainssl.evaluation.protocols import MLP_WIDTH, STRENGTHS, Found, similar_items
from domainssl.evaluation.scores import AveragePrecision, Rate

__all__ = ["LABEL_PROTOCOLS", "LabelFit", "kept_labels"]

Array = NDArray[Any]
_LEAST = 2  # training items that a label must have, and must lack
_FOLDS = 3
_MOST = 2000  # training items that the strength of the linear probe is chosen on


@dataclass(frozen=True, kw_only=True)
class LabelFit:
    """Features and labels of two splits.

    Attributes:
        train: (N, E), standardised.
        train_labels: float (N, K), NaN where unknown.
        train_persons: int (N,).
        test: (M, E), by the statistics of `train`.
        test_labels: float (M, K).
        seeds: Of what is random.
    """

    train: Array
    train_labels: Array
    train_persons: Array
    test: Array
    test_labels: Array
    seeds: tuple[int, ...] = (0, 1, 2)


def kept_labels(train: Items, test: Items, where: str) -> tuple[list[int], list[str]]:
    """Return the labels that can be evaluated, and notes about those that cannot.

    Raises:
        DataError: Both splits have no label in common that some items have and some lack.
    """
    assert train.multi is not None and test.multi is not None
    counts = [(int((train.multi[:, k] == v).sum()), int((test.multi[:, k] == v).sum()))
              for k in range(train.multi.shape[1]) for v in (1, 0)]  # fmt: skip
    pairs = list(zip(counts[::2], counts[1::2], strict=True))
    kept = [
        k for k, (has, lacks) in enumerate(pairs)
        if min(has[0], lacks[0]) >= _LEAST and min(has[1], lacks[1]) >= 1
    ]  # fmt: skip
    if not kept:
        raise DataError(
            f"evaluate: none of the {len(pairs)} labels of {where} is on at least {_LEAST} "
            "training items and missing on others, and likewise in the measured split."
        )
    lost = len(pairs) - len(kept)
    if not lost:
        return kept, []
    return kept, [
        f"{lost} of {len(pairs)} labels are left out: on fewer than {_LEAST} training items, on "
        "nearly all of them, or none to measure on"
    ]


def _found(protocol: str, chances: Array, fit: LabelFit) -> list[Found]:
    """Return mAP and F1 of probabilities, (S, M, K)."""
    known = np.isfinite(fit.test_labels)
    has = np.where(known, fit.test_labels, 0.0)
    score = AveragePrecision(chances, has, known)
    share = has.sum(0) / np.maximum(known.sum(0), 1)
    predicted = (chances > 0.5) * known
    counts = predicted + has
    return [
        Found(
            protocol=f"{protocol} multi-label",
            metric="mAP",
            score=score,
            chance=float(share.mean()),
            per_class=score.per_class(np.ones((1, len(has))))[0, 0],
        ),
        Found(
            protocol=f"{protocol} multi-label",
            metric="F1",
            score=Rate(2.0 * predicted * has, np.broadcast_to(counts, predicted.shape)),
            chance=float((2 * share / (1 + share)).mean()),  # all labels on every item
        ),
    ]


def neighbours(fit: LabelFit) -> list[Found]:
    """Let the nearest training items vote on every label; see `protocols.nearest_neighbours`."""
    nearest, weight = similar_items(fit.train, fit.test)
    labels = fit.train_labels[nearest]  # (M, k, K)
    known = np.isfinite(labels) * weight[..., None]
    votes = (np.nan_to_num(labels) * known).sum(1) / np.maximum(known.sum(1), 1e-300)
    return _found("kNN", votes[None], fit)


def linear(fit: LabelFit) -> list[Found]:
    """Fit a logistic regression per label, of one strength that cross-validation chooses.

    Folds keep persons together.
    """
    from sklearn.model_selection import GroupKFold

    with one_thread():
        rng = np.random.default_rng(0)
        rows = np.sort(rng.permutation(len(fit.train))[:_MOST])
        x, y, persons = fit.train[rows], fit.train_labels[rows], fit.train_persons[rows]
        folds = min(_FOLDS, len(np.unique(persons)))
        best, strength = np.inf, 1.0
        for candidate in STRENGTHS if folds > 1 else ():
            losses = [
                _log_loss(_logistic(x[inside], y[inside], x[outside], candidate), y[outside])
                for inside, outside in GroupKFold(folds).split(x, groups=persons)
            ]
            if np.mean(losses) < best:
                best, strength = float(np.mean(losses)), candidate
        chances = _logistic(fit.train, fit.train_labels, fit.test, strength)
    return _found("linear", chances[None], fit)


def _log_loss(chances: Array, labels: Array) -> float:
    """Return the mean of -log(chance of what is true) over known labels."""
    known = np.isfinite(labels)
    right = np.where(labels[known] > 0.5, chances[known], 1 - chances[known])
    return float(-np.log(np.maximum(right, 1e-6)).mean()) if known.any() else 0.0


def _logistic(x: Array, labels: Array, y: Array, strength: float) -> Array:
    """Return the probability of every label, (M, K); its share where all items agree."""
    from sklearn.linear_model import LogisticRegression

    chances = np.empty((len(y), labels.shape[1]))
    for k, own in enumerate(labels.T):
        known = np.isfinite(own)
        if len(np.unique(own[known])) < 2:
            chances[:, k] = own[known].mean() if known.any() else 0.5
            continue
        fitted = LogisticRegression(C=strength, max_iter=500).fit(x[known], own[known])
        chances[:, k] = fitted.predict_proba(y)[:, 1]
    return chances


def mlp(fit: LabelFit) -> list[Found]:
    """Fit a network with one hidden layer for all labels, once per seed, where all are known."""
    from sklearn.neural_network import MLPClassifier

    known = np.isfinite(fit.train_labels).all(1)
    if known.sum() < 2 * _LEAST:
        return []
    chances = []
    with one_thread():
        for seed in fit.seeds:
            fitted = MLPClassifier((MLP_WIDTH,), alpha=1e-2, max_iter=150, random_state=seed)
            fitted.fit(fit.train[known], fit.train_labels[known].astype(int))
            found = fitted.predict_proba(fit.test)
            chances.append(found.reshape(len(fit.test), -1)[:, -fit.train_labels.shape[1] :])
    return _found("MLP", np.stack(chances), fit)


LABEL_PROTOCOLS: dict[str, Callable[[LabelFit], Sequence[Found]]] = {
    "knn": neighbours,
    "linear": linear,
    "mlp": mlp,
}
