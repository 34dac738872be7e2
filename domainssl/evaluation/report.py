"""From collected features to named metrics, and from metrics to the table people read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations

import torch
from rich.table import Table
from torch import Tensor

from domainssl.evaluation.probes import SPLITS, knn_accuracy, linear_probe_accuracy
from domainssl.evaluation.retrieval import Side, class_retrieval, recall_at_1
from domainssl.evaluation.spread import embedding_std, rankme

__all__ = [
    "Collected",
    "count_classes",
    "has_classes",
    "measure",
    "measure_raw",
    "subset_name",
    "subsets",
    "table",
    "verdict",
]


@dataclass(kw_only=True)
class Collected:
    """Features of held-out items, one row per item in every tensor.

    Attributes:
        features: (N, E) per representation: a modality, several joined by `+`, or `joint`.
        embeddings: (N, E) per modality, in the space the method contrasts.
        raw: (N, 7 C) per modality, mean, deviation and five percentiles per channel.
        present: bool (N,) per modality.
        labels: int (N,), -1 where unknown, or None.
        sources: int (N,) per modality that several scanners make, position in `source_names`.
        source_names: What such a modality may be, as `scan` is `ct` or `mr`.
        groups: int (N,); items of one number are of one person. None tells nothing.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    sources: dict[str, Tensor] = field(default_factory=dict)
    source_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: Tensor | None = None

    def rows(self, names: tuple[str, ...]) -> Tensor:
        """Return the items that have all these modalities, bool (N,)."""
        return torch.stack([self.present[name] for name in names]).all(0)


def subsets(modalities: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return what a user may have: each modality, all of them, and what lies between.

    With more than four modalities only the single ones, all but one, and all.
    """
    count = len(modalities)
    sizes = range(1, count + 1) if count <= 4 else (1, count - 1, count)
    return [subset for size in sizes for subset in combinations(modalities, size)]


def subset_name(subset: tuple[str, ...], modalities: tuple[str, ...]) -> str:
    """Return `s1`, `s1+dem`, or `joint` for all of several."""
    return "joint" if len(subset) > 1 and len(subset) == len(modalities) else "+".join(subset)


def has_classes(labels: Tensor | None) -> bool:
    """True when labels can be predicted: one per item, at least two known classes."""
    return labels is not None and labels.ndim == 1 and count_classes(labels) > 1


def count_classes(labels: Tensor) -> int:
    """Return how many classes occur; -1 stands for unknown."""
    return len(torch.unique(labels[labels >= 0]))


def _scores(x: Tensor, labels: Tensor, name: str, prefix: str, per_class: int) -> dict[str, float]:
    x, labels = x[labels >= 0], labels[labels >= 0]
    return {
        f"{prefix}knn/{name}": knn_accuracy(x, labels),
        f"{prefix}probe/{name}": linear_probe_accuracy(x, labels, per_class),
    }


def measure(
    found: Collected, modalities: tuple[str, ...], prefix: str = "val/", per_class: int = 10
) -> dict[str, float]:
    """Return all metrics of trained or untrained features.

    A representation is judged on the items that have its modalities; features that are not
    finite give NaN.

    Args:
        found: Features of all ranks.
        modalities: Names, in order.
        prefix: In front of every metric name.
        per_class: Labels per class of the probe.
    """
    metrics: dict[str, float] = {}
    for subset in subsets(modalities):
        name = subset_name(subset, modalities)
        if name not in found.features:
            continue
        rows = found.rows(subset)
        x = found.features[name][rows]
        if len(x) < 2 or not torch.isfinite(x).all():
            metrics |= {f"{prefix}{kind}/{name}": math.nan for kind in ("emb_std", "rankme")}
            continue
        if found.labels is not None and has_classes(found.labels[rows]):
            metrics |= _scores(x, found.labels[rows], name, prefix, per_class)
        metrics[f"{prefix}emb_std/{name}"] = embedding_std(x)
        metrics[f"{prefix}rankme/{name}"] = rankme(x)
    for a, b in permutations(found.embeddings, 2):
        rows = found.rows((a, b))
        pair = found.embeddings[a][rows], found.embeddings[b][rows]
        if pair[0].shape == pair[1].shape and all(torch.isfinite(x).all() for x in pair):
            metrics[f"{prefix}retrieval/{a}-{b}/R@1"] = recall_at_1(*pair)
    return metrics | _across_sources(found, found.features, prefix)


def _across_sources(
    found: Collected, features: Mapping[str, Tensor], prefix: str
) -> dict[str, float]:
    """Return how well scans of one source find those of another by their class."""
    metrics: dict[str, float] = {}
    if not has_classes(found.labels):
        return metrics
    assert found.labels is not None
    groups = torch.arange(len(found.labels)) if found.groups is None else found.groups
    for name, words in found.source_names.items():
        if name not in found.sources or name not in features:
            continue
        sides = {}
        for number, word in enumerate(words):
            rows = found.rows((name,)) & (found.sources[name] == number) & (found.labels >= 0)
            side = Side(
                features=features[name][rows], labels=found.labels[rows], groups=groups[rows]
            )
            if len(side.labels) > 1 and torch.isfinite(side.features).all():
                sides[word if len(found.source_names) == 1 else f"{name}.{word}"] = side
        for a, b in permutations(sides, 2):
            scores = class_retrieval(sides[a], sides[b])
            metrics |= {f"{prefix}retrieval/{a}-{b}/{key}": v for key, v in scores.items()}
    return metrics


def measure_raw(
    found: Collected,
    modalities: tuple[str, ...],
    per_class: int = 10,
    judged: Sequence[tuple[str, ...]] | None = None,
) -> dict[str, float]:
    """Return the scores of per-band statistics, which any method should beat.

    Args:
        found: Statistics of all ranks.
        modalities: Names, in order.
        per_class: Labels per class of the probe.
        judged: Sets of modalities; None takes all that `subsets` returns.
    """
    metrics: dict[str, float] = {}
    if found.labels is None:
        return metrics
    for subset in judged or subsets(modalities):
        rows = found.rows(subset)
        labels = found.labels[rows]
        if has_classes(labels):
            x = torch.cat([found.raw[name][rows] for name in subset], dim=1)
            name = subset_name(subset, modalities)
            metrics |= _scores(x, labels, name, "val/raw/", per_class)
    return metrics | _across_sources(found, found.raw, "val/raw/")


_ROWS = (("knn", "kNN", 100), ("probe", "probe", 100), ("emb_std", "emb. std", 1))
_SHOWN = ("R@1", "P@1", "mAP")  # of retrieval: of the partner, and of the class
_SOURCES = ("val/", "val/untrained/", "val/raw/")


def _cells(metrics: Mapping[str, float], name: str, factor: float) -> list[str]:
    """Return the value now, untrained and raw; empty where a source has none."""
    cells = []
    for source in _SOURCES:
        value = metrics.get(source + name)
        text = "" if value is None else f"{factor * value:.1f} %"
        cells.append(text if factor == 100 or value is None else f"{value:.3g}")
    return cells


def standard_error(items: int) -> float:
    """Return the standard error of a share of `items` items that is one half, its largest value."""
    return 0.5 / math.sqrt(max(items, 1))


def _reliability(items: int, classes: int, per_class: int) -> str:
    """Say how far the shares of the table can be trusted."""
    most = 100 * standard_error(items)
    text = f"standard error of a share of {items} items: up to {most:.1f} points"
    if classes:
        text += f"; probe: mean of {SPLITS} splits with {per_class} labels per class"
    return text


def table(metrics: Mapping[str, float], items: int, classes: int, per_class: int = 10) -> Table:
    """Return the table "is it learning": now, untrained and raw statistics side by side.

    Args:
        metrics: All metrics, baselines included.
        items: Number of held-out items.
        classes: Number of labels, 0 without labels.
        per_class: Labelled items per class of the probe.
    """
    grid = Table(title=f"Is it learning? {items} held-out items", title_style="bold")
    grid.add_column("features", no_wrap=True)
    grid.add_column("measure", no_wrap=True)
    for label in ("now", "untrained", "per-band stats", "chance"):
        grid.add_column(label, justify="right", no_wrap=True)
    by_label = f"{100 / classes:.1f} %" if classes else ""
    for key in [n for n in metrics if n.startswith("val/rankme/")]:
        name = label = key.removeprefix("val/rankme/")
        for kind, text, factor in (*_ROWS, ("rankme", "eff. rank", 1)):
            if f"val/{kind}/{name}" in metrics:
                chance = by_label if factor == 100 else ""
                cells = _cells(metrics, f"{kind}/{name}", factor)
                grid.add_row(label, text, *cells, chance, end_section=kind == "rankme")
                label = ""
    names = [n.removeprefix("val/rankme/") for n in metrics if n.startswith("val/rankme/")]
    pairs = {f"{a}-{b}": f"{a} → {b}" for a in names for b in names}
    for key in [n for n in metrics if n.startswith("val/retrieval/")]:
        pair, _, kind = key.removeprefix("val/retrieval/").rpartition("/")
        if kind in _SHOWN:
            cells = _cells(metrics, key.removeprefix("val/"), 100)
            by_chance = metrics.get(f"val/retrieval/{pair}/chance", 1 / max(items, 1))
            label = pairs.get(pair, pair.replace("-", " → ") if kind != "R@1" else pair)
            grid.add_row(label, kind, *cells, f"{100 * by_chance:.1f} %")
    if classes or any(name.startswith("val/retrieval/") for name in metrics):
        grid.caption = _reliability(items, classes, per_class)
    return grid


def verdict(metrics: Mapping[str, float]) -> str:
    """Return one line: the best probe against its baselines; empty without labels."""
    names = [n.removeprefix("val/probe/") for n in metrics if n.startswith("val/probe/")]
    if not names:
        return ""
    best = max(names, key=lambda name: _or_zero(metrics[f"val/probe/{name}"]))
    parts = [f"best probe: {best} {100 * _or_zero(metrics[f'val/probe/{best}']):.1f} %"]
    for source, label in (("untrained", "untrained backbone"), ("raw", "per-band statistics")):
        other = metrics.get(f"val/{source}/probe/{best}")
        if other is not None and not math.isnan(other):
            gain = 100 * (metrics[f"val/probe/{best}"] - other)
            parts.append(f"{gain:+.1f} points over {label}")
    return ", ".join(parts)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
