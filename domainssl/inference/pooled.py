"""One vector per item, in one table: items in groups, each a part that survives a kill.

An item that is larger than a window is cut into windows side by side from its first corner; its
vector is the mean of theirs, weighted by the share of each that was measured.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from domainssl.errors import ConfigError, DataError
from domainssl.inference.outputs import repeated
from domainssl.inference.parted_table import Entries, PartedTable
from domainssl.io.raster.geoparquet import Footprint
from domainssl.modality import Batch

__all__ = ["PooledEmbedding", "PooledItem"]

Array = np.ndarray[Any, Any]
_GROUP = 256  # items of a part
_log = logging.getLogger(__name__)


class PooledItem(Protocol):
    """What a vector is of."""

    @property
    def name(self) -> str:
        """What its row is called."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the vector rests on: plain data without paths and names of persons."""

    @property
    def when_empty(self) -> str:
        """What is said of an item that shows nothing; empty says nothing."""

    def batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield weight and batch, of one item, of every window that shows something."""


@dataclass(kw_only=True)
class PooledEmbedding(PartedTable):
    """One vector per item: groups that are made one by one (`pieces.Buildable`).

    Items that cannot be read and are left out have a vector of NaN.

    Attributes:
        items: The items.
        columns: Further columns of the table.
        footprints: Where items lie on the earth; None for those that lie nowhere.
        group: Items of a part, few where each takes long; None is 256.
    """

    items: Sequence[PooledItem]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    footprints: Sequence[Footprint] | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        twice = repeated(item.name for item in self.items)
        if twice:
            raise ConfigError(
                f"embed: several inputs are called {', '.join(twice[:4])}. Give them other names "
                "in a manifest (column id)."
            )
        self._size = self.group or _GROUP
        count = -(-len(self.items) // self._size)
        self.keys = [str(number) for number in range(count)]
        self._ask(items=[[item.name, item.facts] for item in self.items])

    def _is_final(self, why: str) -> bool:
        return any(item.when_empty == why for item in self.items[:1])

    def _entries(self) -> Entries:
        names = [item.name for item in self.items]
        return Entries(ids=names, columns=self.columns, footprints=self.footprints)

    def _compute(self, number: int, left_out: dict[str, str]) -> Array:
        """Return the vectors of a group, float32 (N, E), NaN of items without a valid pixel.

        Items that are left out are NaN too, and noted in `left_out`.
        """
        first = number * self._size
        members = range(first, min(first + self._size, len(self.items)))
        dim = self.backbone.embed_dim[self.feature]
        sums = np.zeros((len(members), dim), np.float64)
        weights = np.zeros(len(members), np.float64)
        for rows, counts, batch in _batches(
            self._windows(members, left_out), self.options.batch_size
        ):
            found = self._vectors(batch)
            at = [row - first for row in rows]
            np.add.at(sums, at, found * np.asarray(counts)[:, None])
            np.add.at(weights, at, counts)
        weights[[self.items[member].name in left_out for member in members]] = 0
        sums[weights == 0] = np.nan
        with np.errstate(invalid="ignore", divide="ignore"):
            return (sums / weights[:, None]).astype(np.float32)

    def _windows(
        self, members: Sequence[int], left_out: dict[str, str]
    ) -> Iterator[tuple[int, float, Batch]]:
        """Yield item, weight and batch of every window that shows something."""
        for member in members:
            item, shown = self.items[member], 0
            try:
                for weight, batch in item.batches():
                    shown += 1
                    yield member, weight, batch
                if not shown and item.when_empty:
                    left_out[item.name] = item.when_empty
            except DataError as error:
                if not self.skip_bad:
                    raise
                if self.is_private:
                    _log.warning("%s is left out: %s", item.name, error)
                self._note(item.name, str(error), left_out)


def _batches(
    windows: Iterator[tuple[int, float, Batch]], size: int
) -> Iterator[tuple[list[int], list[float], Batch]]:
    """Join windows of one kind that follow each other."""
    held: list[tuple[int, float, Batch]] = []
    for one in windows:
        if held and (len(held) == size or _kind(one[2]) != _kind(held[0][2])):
            yield _joined(held)
            held = []
        held.append(one)
    if held:
        yield _joined(held)


def _kind(batch: Batch) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(values.shape)) for name, values in batch.items()]


def _joined(held: list[tuple[int, float, Batch]]) -> tuple[list[int], list[float], Batch]:
    names = held[0][2]
    batch = {name: torch.cat([one[2][name] for one in held]) for name in names}
    return [one[0] for one in held], [one[1] for one in held], batch
