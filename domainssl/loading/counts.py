"""How often each class occurs in a source, and in how many of its exams, slides or patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.loading.plan import Piece
from domainssl.loading.source import Source

__all__ = ["class_counts", "unit_counts"]


def class_counts(source: Source, name: str, classes: Sequence[str]) -> list[int]:
    """Return the number of labels of every class; those that are not known are left out.

    Items are read for it, unless they have one class each that is known without (`LabelledSource`).

    Args:
        source: Of the items.
        name: What holds the labels: `label`, a number or one 0 or 1 per class, or `mask`.
        classes: Their names.

    Raises:
        DataError: The items have no labels, or labels of other classes.
    """
    known = getattr(source, "unit_labels", None)
    if name == "label" and known is not None:
        together = int(getattr(source, "items_per_unit", 1))
        return (_counted(np.asarray(known), classes) * together).tolist()
    found = np.zeros(len(classes), np.int64)
    for block, count in enumerate(source.sizes):
        rows = source.load(Piece(block, 0, count), 0)
        if name not in rows.data:
            raise DataError(
                f"class_weights: balanced counts batch.{name}, which the data do not yield; items "
                f"hold {', '.join(rows.data)}. Set data.init_args.labels, or name the weights."
            )
        values = np.asarray(rows.data[name])
        good = [place for place in range(rows.count) if place not in rows.bad]
        found += _counted(values[good], classes, several=name == "label" and values.ndim == 2)
    return found.tolist()


def unit_counts(source: Source, name: str, classes: int) -> list[int]:
    """Return in how many exams, slides or patches of a source every class occurs.

    Maps are read for it; of windows that are drawn anew in each epoch, those of the first one.

    Args:
        source: Of the items.
        name: What holds the labels: `label` of a source that knows them, or `mask`.
        classes: Their number.

    Raises:
        DataError: The items have no such labels.
    """
    known = getattr(source, "unit_labels", None)
    if name == "label" and known is not None:
        labels = np.asarray(known, np.int64)
        return np.bincount(labels[labels >= 0], minlength=classes).tolist()
    found = np.zeros((sum(source.sizes), classes), bool)
    at = 0
    for block, count in enumerate(source.sizes):
        rows = source.load(Piece(block, 0, count), 0)
        if name not in rows.data or name == "label":
            raise DataError(
                f"got items with {', '.join(rows.data)}; expected a map (mask), or classes "
                "that are known without reading items. Set data.init_args.labels."
            )
        for place, values in enumerate(np.asarray(rows.data[name])):
            if place not in rows.bad:
                found[at + place, np.unique(values[values >= 0]).astype(np.int64)] = True
        at += count
    together = int(getattr(source, "items_per_unit", 1))
    return found.reshape(-1, together, classes).any(1).sum(0).tolist()


def _counted(
    values: np.ndarray[Any, Any], classes: Sequence[str], *, several: bool = False
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the number of each class among class numbers, or among rows of 0 and 1."""
    if several and values.shape[1] == len(classes):
        return (values == 1).sum(0).astype(np.int64)
    if several or (values.size and values.max() >= len(classes)):
        raise DataError(
            f"class_weights: balanced found labels of more classes than the {len(classes)} that "
            f"have names: {', '.join(classes)}. Name all in data.init_args.labels."
        )
    return np.bincount(values[values >= 0].ravel().astype(np.int64), minlength=len(classes))
