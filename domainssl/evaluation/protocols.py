"""What frozen features are asked: each protocol is fitted on one split and measured on another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainssl.evaluation.probes import one_thread
from domainssl.evaluation.scores import Partition, Rate, Score

__all__ = [
    "MLP_WIDTH",
    "STRENGTHS",
    "Fit",
    "Found",
    "Regions",
    "clustering",
    "few_shot",
    "image_retrieval",
    "linear",
    "mlp",
    "nearest_neighbours",
    "patch_probe",
    "pair_retrieval",
    "similar_items",
    "source_retrieval",
    "standardized",
]

Array = NDArray[Any]
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of the regularisation, scikit-learn's C
MLP_WIDTH = 256
_FOLDS = 3
_MOST_PATCHES = 20_000  # that a dense probe is fitted on


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Features and classes of two splits.

    Attributes:
        train: (N, E), standardised.
        train_labels: int (N,), from 0.
        train_persons: int (N,).
        test: (M, E), by the statistics of `train`.
        test_labels: int (M,).
        test_persons: int (M,).
        classes: Number of classes.
        seeds: Of what is random.
    """

    train: Array
    train_labels: Array
    train_persons: Array
    test: Array
    test_labels: Array
    test_persons: Array
    classes: int
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One metric of one protocol.

    Attributes:
        protocol: Such as `linear`.
        metric: Such as `accuracy`.
        score: What is measured, over the test items that were given.
        chance: What features without information reach.
        predicted: int (M,), classes found with the first seed, where there are some.
        per_class: float (K,), the metric of every label, of items with any number of them.
    """

    protocol: str
    metric: str
    score: Score
    chance: float
    predicted: Array | None = field(default=None)
    per_class: Array | None = field(default=None)


def standardized(train: Array, test: Array) -> tuple[Array, Array]:
    """Return both with zero mean and unit deviation of `train`; constant dimensions are zero."""
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    varies = std > 1e-12 * (1 + np.abs(mean))
    scale = np.where(varies, 1 / np.where(varies, std, 1.0), 0.0)
    return (train - mean) * scale, (test - mean) * scale


def _unit(x: Array) -> Array:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def _accuracies(protocol: str, predicted: Array, fit: Fit) -> list[Found]:
    """Return accuracy and balanced accuracy of classes predicted per seed, (S, M)."""
    chance = 1 / fit.classes
    shares = np.bincount(fit.test_labels, minlength=fit.classes) / len(fit.test_labels)
    hits = (predicted == fit.test_labels).astype(float)
    return [
        Found(
            protocol=protocol,
            metric="accuracy",
            score=Rate.of_hits(hits),
            chance=float(shares.max()),
            predicted=predicted[0],
        ),
        Found(
            protocol=protocol,
            metric="balanced accuracy",
            score=Rate.per_class(predicted, fit.test_labels, fit.classes),
            chance=chance,
        ),
    ]


def similar_items(
    train: Array, test: Array, k: int = 10, temperature: float = 0.07
) -> tuple[Array, Array]:
    """Return the rows of the nearest training items by the cosine, (M, k), and their votes."""
    similarity = _unit(test) @ _unit(train).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : min(k, len(train))]
    return nearest, np.exp((np.take_along_axis(similarity, nearest, 1) - 1) / temperature)


def nearest_neighbours(fit: Fit, k: int = 10, temperature: float = 0.07) -> list[Found]:
    """Let the nearest training items vote, by the cosine, with exp(similarity / temperature).

    Source: Wu et al., CVPR 2018 (arXiv 1805.01978), section 3.4.
    """
    nearest, weight = similar_items(fit.train, fit.test, k, temperature)
    votes = np.zeros((len(fit.test), fit.classes))
    np.add.at(votes, (np.arange(len(votes))[:, None], fit.train_labels[nearest]), weight)
    return _accuracies("kNN", votes.argmax(1)[None], fit)


def _logistic(x: Array, labels: Array, persons: Array) -> Any:
    """Fit a logistic regression whose strength is chosen on other persons of the training split."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    most = min(_FOLDS, int(np.bincount(labels)[np.unique(labels)].min()), len(np.unique(persons)))
    best, strength = -1.0, 1.0
    if most > 1:
        folds = list(
            StratifiedGroupKFold(most, shuffle=True, random_state=0).split(x, labels, persons)
        )
        folds = [(a, b) for a, b in folds if len(np.unique(labels[a])) > 1 and len(b)]
        for candidate in STRENGTHS if folds else ():
            scores = []
            for inside, outside in folds:
                fitted = LogisticRegression(C=candidate, max_iter=300)
                fitted.fit(x[inside], labels[inside])
                scores.append((fitted.predict(x[outside]) == labels[outside]).mean())
            if np.mean(scores) > best:
                best, strength = float(np.mean(scores)), candidate
    return LogisticRegression(C=strength, max_iter=1000).fit(x, labels)


def linear(fit: Fit) -> list[Found]:
    """Fit a logistic regression; its strength is chosen by cross-validation in the training split.

    Folds keep persons together.
    """
    with one_thread():
        fitted = _logistic(fit.train, fit.train_labels, fit.train_persons)
        return _accuracies("linear", fitted.predict(fit.test)[None], fit)


def mlp(fit: Fit, width: int = MLP_WIDTH) -> list[Found]:
    """Fit a network with one hidden layer, once per seed."""
    from sklearn.neural_network import MLPClassifier

    predicted = []
    with one_thread():
        for seed in fit.seeds:
            fitted = MLPClassifier((width,), alpha=1e-2, max_iter=150, random_state=seed)
            predicted.append(fitted.fit(fit.train, fit.train_labels).predict(fit.test))
    return _accuracies("MLP", np.stack(predicted), fit)


def few_shot(fit: Fit, shots: int, draws: int = 10) -> list[Found]:
    """Classify by the nearest class mean of `shots` labelled items per class, over random draws.

    Source: Wang et al. 2019, SimpleShot (arXiv 1911.04623), with centring and unit length.

    Raises:
        ValueError: A class has fewer items.
    """
    train, test = _unit(fit.train), _unit(fit.test)
    members = [np.flatnonzero(fit.train_labels == c) for c in range(fit.classes)]
    if min(map(len, members)) < shots:
        raise ValueError(f"a class has fewer than {shots} training items")
    predicted = []
    for draw in range(draws):
        rng = np.random.default_rng([fit.seeds[0], shots, draw])
        means = np.stack([train[rng.choice(own, shots, False)].mean(0) for own in members])
        distance = (test**2).sum(1)[:, None] - 2 * test @ means.T + (means**2).sum(1)
        predicted.append(distance.argmin(1))
    return _accuracies(f"{shots}-shot", np.stack(predicted), fit)


def clustering(fit: Fit) -> list[Found]:
    """Cluster the training items by k-means, as many clusters as classes, and name test items.

    Clusters are matched to classes on the training split (Hungarian algorithm), once per seed.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    clusters, predicted = [], []
    with one_thread():
        for seed in fit.seeds:
            fitted = KMeans(fit.classes, n_init=10, random_state=seed).fit(fit.train)
            table = np.zeros((fit.classes, fit.classes))
            np.add.at(table, (fitted.labels_, fit.train_labels), 1)
            match = np.empty(fit.classes, np.int64)
            rows, columns = linear_sum_assignment(-table)
            match[rows] = columns
            clusters.append(fitted.predict(fit.test))
            predicted.append(match[clusters[-1]])
    both = np.stack(clusters)
    matched = _accuracies("k-means", np.stack(predicted), fit)[0]
    return [
        Found(
            protocol="k-means",
            metric="matched accuracy",
            score=matched.score,
            chance=matched.chance,
            predicted=matched.predicted,
        ),
        *(
            Found(
                protocol="k-means",
                metric=name.upper(),
                score=Partition(both, fit.test_labels, name),
                chance=0.0,
            )
            for name in ("nmi", "ari")
        ),
    ]


def _ranked(similarity: Array, is_hit: Array, is_other: Array) -> tuple[dict[str, Array], float]:
    """Return R@1, R@5, R@10 and average precision per query, and the share of hits.

    NaN for queries that nothing in the gallery belongs to.
    """
    order = np.argsort(-np.where(is_other, similarity, -np.inf), axis=1, kind="stable")
    ranked = np.take_along_axis(is_hit & is_other, order, 1).astype(float)  # the nearest one first
    relevant = ranked.sum(1)
    counts = relevant > 0
    places = np.arange(1, ranked.shape[1] + 1)
    precision = (ranked.cumsum(1) / places * ranked).sum(1) / np.maximum(relevant, 1)
    found = {f"R@{k}": np.where(counts, ranked[:, :k].any(1), np.nan) for k in (1, 5, 10)}
    found["mAP"] = np.where(counts, precision, np.nan)
    share = relevant / np.maximum(is_other.sum(1), 1)
    return found, float(share[counts].mean()) if counts.any() else float("nan")


def _by_chance(metric: str, share: float, gallery: int) -> float:
    """Return what a random order reaches; mAP lies slightly above the share in a small gallery."""
    if metric == "mAP":
        return share
    k = min(int(metric.removeprefix("R@")), gallery)
    return float(1 - (1 - share) ** k)


def image_retrieval(fit: Fit) -> list[Found]:
    """Rank the other test items for every test item; items of its class are hits.

    Items of the query's own person are left out. R@k is the share of queries with a hit among
    the k nearest, mAP the mean of the average precision.

    Source: Manning et al., Introduction to Information Retrieval (2008), section 8.4.
    """
    unit = _unit(fit.test)
    is_other = fit.test_persons[:, None] != fit.test_persons
    is_hit = fit.test_labels[:, None] == fit.test_labels
    found, share = _ranked(unit @ unit.T, is_hit, is_other)
    return [
        Found(
            protocol="retrieval",
            metric=name,
            score=Rate.of_hits(values[None]),
            chance=_by_chance(name, share, len(unit) - 1),
        )
        for name, values in found.items()
    ]


def pair_retrieval(queries: tuple[Array, Array], gallery: tuple[Array, Array]) -> list[Found]:
    """Look every test item up among the test items of another modality.

    `aligned`: a linear map from one modality's features to the other's is fitted on the training
    split (ridge regression, strength by leaving one out), which any features allow. `direct`: the
    features themselves, each side centred, where both have one width.

    Args:
        queries: Features of the training and the test split, (N, E) and (M, E).
        gallery: The same items by the other modality, (N, F) and (M, F).
    """
    from sklearn.linear_model import RidgeCV

    found = []
    ways = {}
    with one_thread():
        a, b = standardized(*queries), standardized(*gallery)
        mapped = RidgeCV(np.logspace(0, 5, 6)).fit(a[0], b[0]).predict(a[1])
        ways["aligned"] = _unit(mapped) @ _unit(b[1]).T
    if queries[0].shape[1] == gallery[0].shape[1]:
        centred = [_unit(test - train.mean(0)) for train, test in (queries, gallery)]
        ways["direct"] = centred[0] @ centred[1].T
    count = len(queries[1])
    own = np.eye(count, dtype=bool)
    for way, similarity in ways.items():
        scores, share = _ranked(similarity, own, np.ones_like(own))
        found += [
            Found(
                protocol=f"cross-modal ({way})",
                metric=name,
                score=Rate.of_hits(values[None]),
                chance=_by_chance(name, share, count),
            )
            for name, values in scores.items()
            if name != "mAP"
        ]
    return found


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Scans of one source, or parts of them, that are looked up among those of another.

    Attributes:
        features: (N, E).
        classes: int (N,), such as the organ that a region shows.
        persons: int (N,).
    """

    features: Array
    classes: Array
    persons: Array


def source_retrieval(what: str, queries: Regions, gallery: Regions) -> list[Found]:
    """Rank the regions of one source for every region of another; those of its class are hits.

    Nothing is fitted: each side is standardised by itself, because level and scale of features
    differ between scanners, and similarity is the cosine. Regions of the query's own person are
    left out, and queries whose class no other person in the gallery has do not count.

    Args:
        what: What the classes are, in the name of the protocol: `class` or `anatomy`.
        queries: Regions of one source.
        gallery: Regions of the other.

    Returns:
        R@1, R@5, R@10 and mAP over the queries.

    Source: M3Ret (arXiv 2509.01360), zero-shot retrieval across CT and MR.
    """
    a, b = (_unit(standardized(side.features, side.features)[1]) for side in (queries, gallery))
    is_other = queries.persons[:, None] != gallery.persons
    is_hit = queries.classes[:, None] == gallery.classes
    scores, share = _ranked(a @ b.T, is_hit, is_other)
    return [
        Found(
            protocol=f"cross-source ({what})",
            metric=name,
            score=Rate.of_hits(values[None]),
            chance=_by_chance(name, share, len(b)),
        )
        for name, values in scores.items()
    ]


def patch_probe(
    train: tuple[Array, Array], test: tuple[Array, Array, Array], items: int, classes: int
) -> list[Found]:
    """Fit a logistic regression on patches and measure it on those of the test items.

    Args:
        train: Patches (N, E) and their classes (N,).
        test: Patches (M, E), their classes and the rows of their items, (M,).
        items: Number of test items.
        classes: Number of classes.

    Returns:
        mIoU, the mean over the classes of true / (true + false + missed) over all patches, and
        the share of patches that are right.
    """
    from sklearn.linear_model import LogisticRegression

    chosen = np.arange(len(train[0]))
    if len(chosen) > _MOST_PATCHES:
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:_MOST_PATCHES])
    x, y = standardized(train[0][chosen], test[0])
    with one_thread():
        predicted = LogisticRegression(max_iter=300).fit(x, train[1][chosen]).predict(y)
    wanted, rows = test[1], test[2]
    hits, union = np.zeros((1, items, classes)), np.zeros((1, items, classes))
    right = predicted == wanted
    np.add.at(hits[0], (rows[right], wanted[right]), 1)
    np.add.at(union[0], (rows, wanted), 1)
    np.add.at(union[0], (rows[~right], predicted[~right]), 1)
    patches = np.zeros((1, items, 1))
    np.add.at(patches[0, :, 0], rows, 1)
    shares = np.bincount(wanted, minlength=classes) / len(wanted)
    return [
        Found(
            protocol="dense linear",
            metric="mIoU",
            score=Rate(hits, union),
            chance=float(shares.max() / max((shares > 0).sum(), 1)),
        ),
        Found(
            protocol="dense linear",
            metric="accuracy",
            score=Rate(hits.sum(2, keepdims=True), patches),
            chance=float(shares.max()),
        ),
    ]
