"""A part of a source: some of its items, drawn once and the same in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows, Source

__all__ = ["PartSource", "drawn_units"]

_PART = 3  # tag that keeps its random numbers apart
Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(kw_only=True)
class PartSource:
    """Gives out a fraction of another source, as training on few labels needs it.

    Windows of one exam, slide or patch stay together: they are drawn as one. Where the source
    knows their classes (`LabelledSource`), the share is that of every class. Blocks without a
    chosen item are left out. Larger fractions of one draw contain smaller ones.

    Attributes:
        source: Where all items come from.
        fraction: Share of the items, above 0; at least one is taken.
        draw: Which draw.
        least: Exams, slides or items of each class at least, as far as there are that many.
        items_per_unit: Items in a row that were drawn as one.
        unit_labels: Their classes, as those of the source.
    """

    source: Source
    fraction: float
    draw: int = 0
    least: int = 1
    items_per_unit: int = field(init=False)
    unit_labels: Sequence[int] | None = field(init=False, repr=False)
    _chosen: list[tuple[int, Array]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        fixed = getattr(self.source, "with_fixed_items", None)
        if fixed is not None:
            self.source = fixed()
        sizes = list(self.source.sizes)
        together = self.items_per_unit = int(getattr(self.source, "items_per_unit", 1))
        classes = getattr(self.source, "unit_labels", None)
        units = drawn_units(
            sum(sizes) // together, self.fraction, self.draw, labels=classes, least=self.least
        )
        self.unit_labels = None if classes is None else [int(classes[unit]) for unit in units]
        taken = (units[:, None] * together + np.arange(together)).ravel()
        first = np.cumsum([0, *sizes])
        blocks = np.searchsorted(first, taken, side="right") - 1
        self._chosen = [(int(b), taken[blocks == b] - first[b]) for b in np.unique(blocks)]

    @property
    def sizes(self) -> Sequence[int]:
        """Chosen items per block that has some."""
        return [len(places) for _, places in self._chosen]

    @property
    def num_bytes(self) -> int:
        """Bytes decoded in an epoch, roughly."""
        blocks = len(list(self.source.sizes))
        return int(self.source.num_bytes * len(self._chosen) / max(blocks, 1))

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Load the items from the first to the last one wanted, and keep the chosen ones.

        Raises:
            DataError: Nothing of the piece can be read.
        """
        block, places = self._chosen[piece.block]
        places = places[piece.start : piece.stop]
        start = int(places[0])
        rows = self.source.load(Piece(block, start, int(places[-1]) + 1), epoch)
        wanted = [int(place) - start for place in places]
        return Rows(
            data={name: _rows(values, wanted) for name, values in rows.data.items()},
            count=len(wanted),
            bytes_decoded=rows.bytes_decoded,
            bytes_needed=rows.bytes_needed * len(wanted) // max(rows.count, 1),
            bad={i: rows.bad[place] for i, place in enumerate(wanted) if place in rows.bad},
        )


def drawn_units(
    total: int, fraction: float, draw: int, *, labels: Sequence[int] | None = None, least: int = 1
) -> Array:
    """Return the numbers of what is drawn, ascending, int64 (n,).

    Args:
        total: How many there are, above 0.
        fraction: Share of them, above 0; of every class, where classes are known.
        draw: Which draw.
        labels: Class of each, -1 where unknown; None draws without looking at classes.
        least: Of each class at least, as far as there are that many.
    """
    order = generator(draw, 0, _PART, total).permutation(total)
    if labels is None:
        return np.sort(order[: max(1, round(fraction * total))])
    known = np.asarray(labels, np.int64)[order]
    parts = []
    for label in np.unique(known):
        own = order[known == label]
        floor = min(least, len(own)) if label >= 0 else 0
        parts.append(own[: max(floor, round(fraction * len(own)))])
    found = np.sort(np.concatenate(parts))
    return found if len(found) else order[:1]


def _rows(values: Any, wanted: list[int]) -> Any:
    """Return some items of what a batch key holds."""
    if isinstance(values, Tensor | np.ndarray):
        return values[wanted]
    return [values[i] for i in wanted]
