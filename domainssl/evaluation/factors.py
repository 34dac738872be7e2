"""Which part of an embedding knows what: known factors predicted from groups of dimensions.

    parts = model.common_and_unique(model.features(batch))["s1"]    # DeCUR: two groups
    scores = factor_scores(parts, {"wetness": wetness, "cover": cover})
    scores["common"]["wetness"]                                      # share of variance, 1 is all

Factors are numbers or classes per item that the model never saw, such as those the embedded sample
was made from (`domainssl.datamodules.samples.ssl4eo.factors`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["explained_variance", "factor_scores"]

_STRENGTHS = np.logspace(-1, 4, 11)


def explained_variance(features: Tensor, factor: Tensor, folds: int = 8, seed: int = 0) -> float:
    """Predict a factor linearly from features of other items.

    A ridge regression on standardised features, cross-validated; its strength is chosen by leaving
    one out among the items it is fitted on, so that more dimensions are no advantage by themselves.

    Args:
        features: (N, E).
        factor: One number per item, float (N,), or a class per item, integer (N,): then the mean
            over the classes of what is explained of "is this class".
        folds: Parts that are predicted from all others; at most N.
        seed: Of the parts.

    Returns:
        R2, the share of the factor's variance that is explained: 1 is all of it, 0 is no better
        than the mean, and below 0 worse. NaN when the factor does not vary or fewer than 4 items
        are given.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    y = _columns(factor)
    total = ((y - y.mean(0)) ** 2).sum(0)
    if len(features) < 4 or not (total > 0).all():
        return float("nan")
    x = features.detach().cpu().double().numpy()
    order = np.random.default_rng(seed).permutation(len(x))
    folds = min(folds, len(x))
    predicted = np.empty_like(y)
    with threadpool_limits(1):
        for fold in range(folds):
            test = order[fold::folds]
            train = np.setdiff1d(order, test)
            fitted = make_pipeline(StandardScaler(), RidgeCV(_STRENGTHS)).fit(x[train], y[train])
            predicted[test] = fitted.predict(x[test]).reshape(len(test), -1)
    return float(np.mean(1 - ((predicted - y) ** 2).sum(0) / total))


def _columns(factor: Tensor) -> NDArray[np.float64]:
    """One column per number, or per class: (N, 1) or (N, classes)."""
    if factor.is_floating_point():
        return factor.detach().cpu().double().unsqueeze(1).numpy()
    classes = torch.unique(factor)
    return (factor.cpu().unsqueeze(1) == classes.cpu()).double().numpy()


def factor_scores(
    parts: Mapping[str, Tensor],
    factors: Mapping[str, Tensor],
    folds: int = 8,
    seed: int = 0,
    draws: int = 8,
) -> dict[str, dict[str, float]]:
    """Predict every factor from every part of an embedding, with equally many dimensions of each.

    A part with more dimensions than another would predict more by their number alone. Of larger
    parts, random choices of as many dimensions as the smallest one has are therefore taken, and the
    mean of their scores is returned.

    Args:
        parts: Groups of dimensions by name, (N, E_i) each, such as `common` and `unique`.
        factors: Factors by name, (N,) each; see `explained_variance`.
        folds: See `explained_variance`.
        seed: Of the folds and the choices of dimensions.
        draws: Choices of dimensions; 0 takes all dimensions of all parts.

    Returns:
        By part and factor the explained share of its variance.

    Raises:
        ValueError: A part and a factor differ in the number of items.
    """
    for part, features in parts.items():
        for name, factor in factors.items():
            if len(features) != len(factor):
                raise ValueError(
                    f"factor_scores: part {part!r} has {len(features)} items, factor {name!r} has "
                    f"{len(factor)}. Give one value per item, in the same order."
                )
    fewest = min((x.shape[1] for x in parts.values()), default=0)
    scores = {}
    for part, features in parts.items():
        choices = [features]
        if draws and features.shape[1] > fewest:
            rng = np.random.default_rng(seed)
            orders = [rng.permutation(features.shape[1])[:fewest] for _ in range(draws)]
            choices = [features[:, torch.from_numpy(order)] for order in orders]
        scores[part] = {
            name: float(np.mean([explained_variance(x, y, folds, seed) for x in choices]))
            for name, y in factors.items()
        }
    return scores
