"""Metrics per class, and their means over the classes that have labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

__all__ = ["labelled", "metric_collection", "shown_classes", "with_means"]

_CURVES = ("auroc_of",)  # want items of the class and items of others


def metric_collection(**metrics: Metric) -> MetricCollection:
    """Return metrics by name, each computed by itself."""
    return MetricCollection(dict(metrics), compute_groups=False)


def labelled(found: Mapping[str, Tensor]) -> list[int] | None:
    """Return how often each class is a label in what `Task.metrics` found; None if that is unknown.

    Args:
        found: Of which `confusion` counts labels, (K, K), or of several labels (K, 2, 2).
    """
    counts = found.get("confusion")
    if counts is None:
        return None
    own = counts.sum(1) if counts.ndim == 2 else counts[:, 1].sum(1)
    return [int(count) for count in own]


def shown_classes(found: Mapping[str, Tensor], name: str) -> list[bool]:
    """Return which classes a metric per class can be told of.

    One without a label would be 0, as of a model that never finds it; so would the area under the
    curve of one that every item has.

    Args:
        found: What `Task.metrics` found.
        name: Of the metric per class, (K,).
    """
    counts, confusion = labelled(found), found.get("confusion")
    if counts is None or confusion is None:
        return [True] * len(found[name])
    most = confusion.sum() if confusion.ndim == 2 else confusion.sum((1, 2))
    others = (most - torch.tensor(counts, device=confusion.device)).tolist()
    is_curve = name in _CURVES
    return [
        own > 0 and (other > 0 or not is_curve) for own, other in zip(counts, others, strict=True)
    ]


def with_means(found: Mapping[str, Tensor], means: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the metrics and, by name, means over the classes that they can be told of.

    `torchmetrics` counts a class that is predicted somewhere and has no label as 0. NaN stands for
    the mean over no class.

    Args:
        found: What `Task.metrics` found.
        means: Name of a mean, and of the metric per class, (K,), that it is of.
    """
    made = dict(found)
    for name, source in means.items():
        values = found[source].float()
        made[name] = values[torch.tensor(shown_classes(found, source), device=values.device)].mean()
    return {name: made[name] for name in sorted(made)}
