"""Several backbones on the same items: every protocol, every subset, with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.evaluation import protocols
from domainssl.evaluation.features import Items
from domainssl.evaluation.multilabel import LABEL_PROTOCOLS, LabelFit
from domainssl.evaluation.protocols import Fit, Found, Regions
from domainssl.evaluation.scores import interval, resampled

__all__ = ["PROTOCOLS", "Protocol", "Row", "Sides", "add_gains", "compare", "kept_classes"]

Array = NDArray[Any]
PROTOCOLS = (
    "knn", "linear", "mlp", "kmeans", "few_shot", "retrieval", "cross_modal", "cross_source",
    "dense",
)  # fmt: skip
_SHOTS = (1, 5, 10)
_LEAST = 2  # labelled training items that a class must have


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How features are evaluated.

    Attributes:
        names: Out of `PROTOCOLS`.
        seeds: Runs of what is random (MLP, k-means).
        resamples: Draws of the bootstrap.
    """

    names: tuple[str, ...] = PROTOCOLS
    seeds: tuple[int, ...] = (0, 1, 2)
    resamples: int = 1000

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in PROTOCOLS:
                raise ConfigError(
                    f"evaluate --protocols: got {name!r}, expected some of "
                    f"{', '.join(PROTOCOLS)}.{nearest(name, PROTOCOLS)}"
                )
        if not self.names or not self.seeds:
            raise ConfigError("evaluate: at least one protocol and one seed are needed.")
        if self.resamples < 10:
            raise ConfigError(
                f"evaluate --resamples: got {self.resamples}, expected 10 or more for an interval."
            )


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The features of one backbone on both splits."""

    train: Items
    test: Items


@dataclass(kw_only=True)
class Row:
    """One figure with its interval.

    Attributes:
        backbone: Label of the backbone, or `untrained`, `raw`.
        features: Representation, such as `s1+s2`; `s1 to s2` for pairs.
        protocol: How it was measured.
        metric: What was measured.
        value: Mean over seeds.
        low: Lower end of the bootstrap interval over items (95 %).
        high: Upper end.
        seeds: Runs that were averaged.
        seed_std: Standard deviation over them.
        chance: What features without information reach.
        train_items: Items that it was fitted on.
        test_items: Items that it was measured on.
        gain: Difference to the untrained backbone; None for baselines.
        gain_low: Lower end of its interval, over the same draws for both.
        gain_high: Upper end.
        recalls: Share found per class, where classes are predicted.
        confusion: Test items by class (rows) and predicted class, likewise.
        per_class: The metric of every label, of items with any number of them.
    """

    backbone: str
    features: str
    protocol: str
    metric: str
    value: float
    low: float
    high: float
    seeds: int
    seed_std: float
    chance: float
    train_items: int
    test_items: int
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    recalls: list[float] | None = None
    confusion: list[list[int]] | None = None
    per_class: list[float] | None = None
    draws: Array | None = field(default=None, repr=False)


def kept_classes(train: Items, test: Items, where: str) -> tuple[list[int], list[str]]:
    """Return the classes that can be evaluated, and notes about those that cannot.

    Raises:
        DataError: There are no labels, one class, or too few items.
    """
    if train.labels is None or test.labels is None:
        raise DataError(
            f"evaluate: no labels in the data of {where} (`label`, one class per item, or "
            "`label_multi`, 0 or 1 per class). Give the DataModule labels (data.init_args.labels, "
            "or a column of its manifest)."
        )
    counts = {int(c): int((train.labels == c).sum()) for c in np.unique(train.labels) if c >= 0}
    tested = {int(c) for c in np.unique(test.labels) if c >= 0}
    known = counts.keys() | tested
    if len(known) < 2:
        what = "no known class" if not known else "one class"
        raise DataError(
            f"evaluate: the labels of {where} hold {what}, expected at least two. Check the "
            "column or table that labels are read from."
        )
    kept = [c for c in sorted(known) if counts.get(c, 0) >= _LEAST and c in tested]
    if len(kept) < 2:
        raise DataError(
            f"evaluate: too few labels: {len(kept)} of {len(known)} classes of {where} have at "
            f"least {_LEAST} training items and one item to measure on, expected two classes. "
            f"Training items per class: {', '.join(f'{c}: {n}' for c, n in counts.items())}."
        )
    notes = []
    if len(kept) < len(known):
        lost = sorted(known - set(kept))
        notes.append(
            f"{len(lost)} of {len(known)} classes are left out: fewer than {_LEAST} training "
            "items, or none to measure on"
        )
    return kept, notes


def compare(
    sides: Mapping[str, Sides],
    subsets: Mapping[str, Sequence[tuple[str, ...]]],
    classes: Sequence[int] | None,
    settings: Protocol,
    notes: list[str],
    step: Callable[[str], None] = lambda text: None,
    *,
    source_names: Mapping[str, Sequence[str]] = MappingProxyType({}),
    labels: Sequence[int] = (),
) -> list[Row]:
    """Evaluate all backbones.

    Args:
        sides: Features by label; `untrained…` and `raw` are baselines.
        subsets: Subsets of modalities by label.
        classes: The classes that count, None without labels.
        settings: What is done.
        notes: Gets a line for everything left out.
        step: Called with a description of every step before it.
        source_names: What scans of a modality may be, as `scan` is `ct` or `mr`.
        labels: The labels that count, of items with any number of them.

    Returns:
        A row per backbone, representation, protocol and metric.
    """
    rows: list[Row] = []
    for label, found in sides.items():
        for subset in subsets[label]:
            name = "+".join(subset)
            if name not in found.train.pooled or name not in found.test.pooled:
                continue
            step(f"{label}: {name}")
            if classes is not None:
                rows += _labelled(label, name, subset, found, classes, settings, notes)
            if labels:
                rows += _multi_labelled(label, name, subset, found, labels, settings, notes)
            if "dense" in settings.names:
                rows += _dense(label, name, found, settings, notes)
            if "cross_source" in settings.names and name in source_names:
                rows += _across_sources(label, name, source_names[name], found, settings, notes)
        if "cross_modal" in settings.names:
            single = [s[0] for s in subsets[label] if len(s) == 1]
            for a, b in permutations(single, 2):
                step(f"{label}: {a} to {b}")
                rows += _across(label, a, b, found, settings, notes)
    return rows


def _note(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)


def _labelled(
    label: str,
    name: str,
    subset: tuple[str, ...],
    found: Sides,
    classes: Sequence[int],
    settings: Protocol,
    notes: list[str],
) -> list[Row]:
    numbers = {c: i for i, c in enumerate(classes)}
    parts = []
    for items in (found.train, found.test):
        assert items.labels is not None
        use = items.rows(subset) & np.isin(items.labels, list(classes))
        own = np.array([numbers[int(c)] for c in items.labels[use]], np.int64)
        parts.append((items.pooled[name][use], own, items.persons[use]))
    (x, x_labels, x_persons), (y, y_labels, y_persons) = parts
    if len(np.unique(x_labels)) < len(classes) or len(y) < 2:
        _note(notes, f"{name}: too few items have these modalities; left out")
        return []
    x, y = protocols.standardized(x, y)
    fit = Fit(
        train=x, train_labels=x_labels, train_persons=x_persons,
        test=y, test_labels=y_labels, test_persons=y_persons,
        classes=len(classes), seeds=settings.seeds,
    )  # fmt: skip
    results: list[Found] = []
    ways: dict[str, Callable[[Fit], list[Found]]] = {
        "knn": protocols.nearest_neighbours,
        "linear": protocols.linear,
        "mlp": protocols.mlp,
        "kmeans": protocols.clustering,
        "retrieval": protocols.image_retrieval,
    }
    for key in PROTOCOLS:
        if key in settings.names and key in ways:
            results += ways[key](fit)
        if key == "few_shot" and key in settings.names:
            least = int(np.bincount(x_labels, minlength=len(classes)).min())
            for shots in _SHOTS:
                if shots <= least:
                    results += protocols.few_shot(fit, shots)
                else:
                    _note(notes, f"{shots}-shot: a class has only {least} training items")
    weights = resampled(y_persons, settings.resamples, seed=0)
    rows = [_row(label, name, r, weights, len(x), len(y)) for r in results]
    for row, result in zip(rows, results, strict=True):
        if result.predicted is not None:
            table = np.zeros((len(classes), len(classes)), np.int64)
            np.add.at(table, (y_labels, result.predicted), 1)
            row.confusion = table.tolist()
            row.recalls = (table.diagonal() / np.maximum(table.sum(1), 1)).tolist()
    return rows


def _multi_labelled(
    label: str,
    name: str,
    subset: tuple[str, ...],
    found: Sides,
    labels: Sequence[int],
    settings: Protocol,
    notes: list[str],
) -> list[Row]:
    parts = []
    for items in (found.train, found.test):
        assert items.multi is not None
        use = items.rows(subset)
        parts.append((items.pooled[name][use], items.multi[use][:, labels], items.persons[use]))
    (x, x_labels, x_persons), (y, y_labels, y_persons) = parts
    if len(x) < _LEAST or len(y) < _LEAST or not (y_labels == 1).any():
        _note(notes, f"{name}: too few items with labels have these modalities; left out")
        return []
    left_out = {"kmeans", "few_shot", "retrieval"} & {*settings.names}
    if left_out:
        _note(notes, "k-means, few-shot and retrieval are measured of one class per item alone")
    x, y = protocols.standardized(x, y)
    fit = LabelFit(
        train=x, train_labels=x_labels, train_persons=x_persons,
        test=y, test_labels=y_labels, seeds=settings.seeds,
    )  # fmt: skip
    weights = resampled(y_persons, settings.resamples, seed=0)
    rows = []
    for key, measured in LABEL_PROTOCOLS.items():
        for result in measured(fit) if key in settings.names else ():
            rows.append(_row(label, name, result, weights, len(x), len(y)))
            if result.per_class is not None:
                values = [round(float(v), 6) for v in np.nan_to_num(result.per_class)]
                rows[-1].per_class = values
    return rows


def _row(label: str, name: str, found: Found, weights: Array, train: int, test: int) -> Row:
    values = found.score.over(np.ones((1, weights.shape[1])))[0]  # (S,)
    draws = found.score.over(weights).mean(1)
    if np.isfinite(draws).any():  # repeated items agree by themselves, which lifts NMI
        shifted = draws + (values.mean() - np.nanmean(draws))
        draws = np.clip(shifted, min(0.0, float(np.nanmin(draws))), 1.0)
    low, high = interval(draws)
    return Row(
        backbone=label,
        features=name,
        protocol=found.protocol,
        metric=found.metric,
        value=float(values.mean()),
        low=low,
        high=high,
        seeds=len(values),
        seed_std=float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        chance=found.chance,
        train_items=train,
        test_items=test,
        draws=draws,
    )


def _across(
    label: str, a: str, b: str, found: Sides, settings: Protocol, notes: list[str]
) -> list[Row]:
    if a not in found.train.pooled or b not in found.train.pooled:
        return []
    train, test = (items.rows((a, b)) for items in (found.train, found.test))
    if train.sum() < 4 or test.sum() < 4:
        _note(notes, f"{a} to {b}: fewer than 4 items have both; left out")
        return []
    sides = [
        (found.train.pooled[n][train].astype(float), found.test.pooled[n][test].astype(float))
        for n in (a, b)
    ]
    weights = resampled(found.test.persons[test], settings.resamples, seed=0)
    counts = int(train.sum()), int(test.sum())
    results = protocols.pair_retrieval(sides[0], sides[1])
    return [_row(label, f"{a} to {b}", result, weights, *counts) for result in results]


def _across_sources(
    label: str, name: str, words: Sequence[str], found: Sides, settings: Protocol, notes: list[str]
) -> list[Row]:
    """Look scans of each source up among those of every other, by class and by anatomy."""
    test, rows = found.test, []
    for what, (regions, items) in (("class", _scans(test, name)), ("anatomy", _parts(test, name))):
        if not len(items):
            continue
        sides = {}
        for number, word in enumerate(words):
            own = test.sources[name][items] == number
            sides[word] = Regions(
                features=regions.features[own],
                classes=regions.classes[own],
                persons=regions.persons[own],
            )
        for a, b in permutations(words, 2):
            shown = f"{name}: {a} to {b}"
            shared = set(sides[a].classes.tolist()) & set(sides[b].classes.tolist())
            if len(shared) < 2:
                _note(notes, f"{shown}, by {what}: fewer than two classes are in both; left out")
                continue
            weights = resampled(sides[a].persons, settings.resamples, seed=0)
            results = protocols.source_retrieval(what, sides[a], sides[b])
            count = len(sides[a].classes)
            rows += [_row(label, shown, result, weights, 0, count) for result in results]
    return rows


def _scans(items: Items, name: str) -> tuple[Regions, Array]:
    """Return the scans of a modality with a known class, and the rows of their items."""
    labels = np.full(len(items.ids), -1) if items.labels is None else items.labels
    kept = items.rows((name,)) & (labels >= 0) if name in items.sources else np.zeros(0, bool)
    rows = np.flatnonzero(kept)
    regions = Regions(
        features=items.pooled[name][rows].astype(float),
        classes=labels[rows],
        persons=items.persons[rows],
    )
    return regions, rows


def _parts(items: Items, name: str) -> tuple[Regions, Array]:
    """Return the mean patch of every class of a map but its background, per scan, and its row."""
    if name not in items.patches or name not in items.sources:
        rows = np.zeros(0, np.int64)
        return Regions(features=np.zeros((0, 1)), classes=rows, persons=rows), rows
    inside = items.patch_labels[name] > 0
    both = np.stack([items.patch_items[name][inside], items.patch_labels[name][inside]], axis=1)
    found, position, count = np.unique(both, axis=0, return_inverse=True, return_counts=True)
    means = np.zeros((len(found), items.patches[name].shape[1]))
    np.add.at(means, position.reshape(-1), items.patches[name][inside])
    rows = found[:, 0]
    regions = Regions(
        features=means / count[:, None], classes=found[:, 1], persons=items.persons[rows]
    )
    return regions, rows


def _dense(label: str, name: str, found: Sides, settings: Protocol, notes: list[str]) -> list[Row]:
    train, test = found.train, found.test
    if name not in train.patches or name not in test.patches:
        return []
    x, y = train.patch_labels[name], test.patch_labels[name]
    there = np.unique(x)
    if len(there) < 2 or not len(y):
        _note(notes, f"dense probe of {name}: maps hold fewer than two classes; left out")
        return []
    counted = np.isin(y, there)
    numbers = np.full(int(there.max()) + 1, -1)
    numbers[there] = np.arange(len(there))
    results = protocols.patch_probe(
        (train.patches[name], numbers[x]),
        (test.patches[name][counted], numbers[y[counted]], test.patch_items[name][counted]),
        len(test.ids),
        len(there),
    )
    weights = resampled(test.persons, settings.resamples, seed=0)
    counts = len(np.unique(train.patch_items[name])), len(np.unique(test.patch_items[name]))
    return [_row(label, name, result, weights, *counts) for result in results]


def add_gains(rows: Iterable[Row], baseline: Mapping[str, str]) -> None:
    """Fill in the difference to the untrained backbone, over the same draws of items.

    Args:
        rows: All rows.
        baseline: Label of the untrained backbone by label of the trained one.
    """
    rows = list(rows)
    known = {(r.backbone, r.features, r.protocol, r.metric): r for r in rows}
    for row in rows:
        other = known.get((baseline.get(row.backbone, ""), row.features, row.protocol, row.metric))
        if other is None or row.draws is None or other.draws is None:
            continue
        row.gain = row.value - other.value
        row.gain_low, row.gain_high = interval(row.draws - other.draws)
        if math.isnan(row.gain):
            row.gain = row.gain_low = row.gain_high = None
