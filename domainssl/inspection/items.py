"""The items of any source as something to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.inspection.subjects import Measured
from domainssl.loading.plan import Piece
from domainssl.loading.source import Source
from domainssl.modality import Modality, key

__all__ = ["OfSource", "channel_first"]

Array = np.ndarray[Any, Any]
_PIECE_BYTES = 64_000_000  # small blocks are measured together until they decode so much


@dataclass(kw_only=True)
class OfSource:
    """The items of a source, each once, as batches would hold them.

    Attributes:
        source: Where they come from.
        described: The modalities by name.
        about: Root, split and whatever else the file should say about the data.
        name_data: Returns plain data that tell these files from others.
        epoch: Epoch whose windows and dates are looked at.
        is_private: Reasons name files that may not be written down.
    """

    source: Source
    described: Mapping[str, Modality]
    about: Mapping[str, Any]
    name_data: Callable[[], dict[str, Any]]
    epoch: int = 0
    is_private: bool = False
    _runs: list[range] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = self.source.sizes
        per_block = max(1, self.source.num_bytes // max(1, len(sizes)))
        many = max(1, _PIECE_BYTES // per_block)
        self._runs = [range(i, min(i + many, len(sizes))) for i in range(0, len(sizes), many)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what only the first process needs."""
        return {**self.__dict__, "name_data": dict}

    @property
    def modalities(self) -> dict[str, Measured]:
        """The modalities by name."""
        return {n: Measured(m.channels, m.value_unit) for n, m in self.described.items()}

    @property
    def facts(self) -> dict[str, Any]:
        """Where the data lie."""
        return dict(self.about)

    @property
    def keys(self) -> list[str]:
        """Numbers of the first and last block of each piece."""
        return [f"blocks {run[0]} to {run[-1]}" for run in self._runs]

    def written(self, reason: str) -> str:
        """Return why something cannot be read as a file may hold it."""
        if not self.is_private:
            return reason
        return "cannot be read; without --skip_bad the terminal says why"

    def identity(self) -> dict[str, Any]:
        """Return what the DataModule says of its files."""
        return self.name_data()

    def parts(self, number: int) -> Iterator[tuple[str, Array, Array, list[str]]]:
        """Load one block at a time."""
        for block in self._runs[number]:
            size = self.source.sizes[block]
            if not size:
                continue
            rows = self.source.load(Piece(block, 0, size), self.epoch)
            if rows.bad:
                raise DataError("; ".join(rows.bad.values()))
            for name, modality in self.described.items():
                if name in rows.data:
                    yield name, *channel_first(rows.data, name, modality), _names(rows.data, name)


def _names(data: Mapping[str, Any], name: str) -> list[str]:
    """Return the ids of the items of a batch, empty texts where they lack a modality, or none."""
    ids = [str(each) for each in data.get("id", ())]
    present = data.get(key(name, "present"))
    if present is None or not ids:
        return ids
    return [each if there else "" for each, there in zip(ids, np.asarray(present), strict=True)]


def channel_first(data: Mapping[str, Any], name: str, modality: Modality) -> tuple[Array, Array]:
    """Return values (C, n, ...) and validity (n, ...) of a modality of a batch."""
    values = np.moveaxis(np.asarray(data[name]), modality.channel_axis, 0)
    given = data.get(key(name, "valid"))
    valid = np.ones(values.shape[1:], bool) if given is None else np.asarray(given)
    for companion in ("present", "frames"):  # (n,) and (n, T)
        mask = data.get(key(name, companion))
        if mask is not None:
            mask = np.asarray(mask)
            valid = valid & mask.reshape(*mask.shape, *[1] * (valid.ndim - mask.ndim))
    return values, valid
