"""How much of a label is in features: nearest neighbours and a linear probe with few labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "SPLITS",
    "knn_accuracy",
    "label_splits",
    "linear_probe_accuracy",
    "one_thread",
    "standardize",
]

SPLITS = 5  # that a probe is averaged over


@contextmanager
def one_thread() -> Iterator[None]:
    """Fit with scikit-learn on one thread, and take fits that are close enough to compare.

    Such small problems are slower on several threads, and far slower on busy cores.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def standardize(features: Tensor, like: Tensor | None = None) -> Tensor:
    """Return features with zero mean and unit variance per dimension.

    Args:
        features: (N, E).
        like: Features whose statistics are used, (M, E); `features` themselves by default.

    Returns:
        (N, E); dimensions without variance are zero.
    """
    reference = (features if like is None else like).double()
    mean, std = reference.mean(0), reference.std(0, correction=0)
    scale = torch.where(std > 1e-12 * (1 + mean.abs()), 1 / std.clamp(min=1e-300), 0.0)
    return ((features.double() - mean) * scale).float()


def knn_accuracy(features: Tensor, labels: Tensor, k: int = 10, temperature: float = 0.07) -> float:
    """Predict every item from its nearest other items.

    Cosine similarity of standardised features; neighbours vote with exp(similarity / temperature).

    Args:
        features: (N, E).
        labels: int (N,).
        k: Neighbours that vote; at most N - 1.
        temperature: Small values let the nearest one decide.

    Returns:
        Share of items whose label is predicted.

    Source: Wu et al., CVPR 2018 (arXiv 1805.01978), section 3.4.
    """
    if len(features) < 2:
        return float("nan")
    unit = torch.nn.functional.normalize(standardize(features), dim=1)
    _, labels = torch.unique(labels, return_inverse=True)
    classes = int(labels.max()) + 1
    hits = 0
    for rows in torch.arange(len(unit)).split(1024):
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        value, index = similarity.topk(min(k, len(unit) - 1), dim=1)
        votes = torch.zeros(len(rows), classes)
        votes.scatter_add_(1, labels[index], ((value - 1) / temperature).exp())
        hits += int((votes.argmax(1) == labels[rows]).sum())
    return hits / len(unit)


def label_splits(
    labels: Tensor, per_class: int = 10, splits: int = SPLITS, seed: int = 0
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the positions of labelled and of test items.

    The same labels always give the same splits. A class with fewer than `2 · per_class` items
    gives half of them; one with a single item takes no part.

    Args:
        labels: int (N,).
        per_class: Labelled items per class.
        splits: Number of splits.
        seed: Of the choice.
    """
    values = labels.cpu().numpy()
    rng = np.random.default_rng(seed)
    for _ in range(splits):
        train: list[NDArray[np.int64]] = []
        test: list[NDArray[np.int64]] = []
        for label in np.unique(values):
            members = rng.permutation(np.flatnonzero(values == label))
            count = min(per_class, len(members) // 2)
            if count:
                train.append(members[:count])
                test.append(members[count:])
        if len(train) > 1:
            yield np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def linear_probe_accuracy(
    features: Tensor,
    labels: Tensor,
    per_class: int = 10,
    splits: int = SPLITS,
    seed: int = 0,
    strength: float = 1.0,
) -> float:
    """Fit a logistic regression on a few labelled items and test it on the others.

    Args:
        features: (N, E).
        labels: int (N,).
        per_class: Labelled items per class.
        splits: Fixed splits to average over.
        seed: Of the splits.
        strength: Inverse of the regularisation, scikit-learn's `C`.

    Returns:
        Share of test items whose label is predicted, each class counting equally; NaN when no
        two classes have two items.
    """
    from sklearn.linear_model import LogisticRegression

    scores = []
    with one_thread():
        for train, test in label_splits(labels, per_class, splits, seed):
            wanted = labels[test].cpu().numpy()
            fitted = LogisticRegression(C=strength, max_iter=500)
            fitted.fit(standardize(features[train]).numpy(), labels[train].cpu().numpy())
            found = fitted.predict(standardize(features[test], like=features[train]).numpy())
            scores.append(np.mean([np.mean(found[wanted == c] == c) for c in np.unique(wanted)]))
    return float(np.mean(scores)) if scores else float("nan")
