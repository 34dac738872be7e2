"""How often each class occurs in a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.loading.plan import Piece
from domainssl.loading.source import Source

__all__ = ["class_counts"]


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
