"""What can be measured: the locations and dates of SSL4EO-S12, or the items of any source.

A subject names its pieces and yields, for one of them, arrays of physical values per modality with
the channel first. It is pickled to worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from domainssl.errors import DataError
from domainssl.inspection.moments import Classes, Grid, Relative
from domainssl.io.ssl4eo.facts import product
from domainssl.io.ssl4eo.layout import Catalogue
from domainssl.io.ssl4eo.read import DNOffset, read
from domainssl.loading.plan import Piece
from domainssl.loading.source import Source
from domainssl.modality import Modality, key

__all__ = ["Measured", "OfCatalogue", "OfSource", "Subject", "channel_first"]

Array = np.ndarray[Any, Any]
_PIECE_BYTES = 64_000_000  # small blocks are measured together until they decode so much
_GRIDS = {
    "dn": Grid(-1000.0, 32767.0, 1.0),  # whole numbers are exact
    "rgb8": Grid(0.0, 255.0, 1.0),
    "db": Grid(-60.0, 40.0, 0.01),
    "hu": Grid(-4096.0, 32767.0, 1.0),
}


@dataclass(frozen=True)
class Measured:
    """The facts of a modality that go into the file.

    Attributes:
        channels: Bands in order.
        value_unit: Unit of the values.
        product: What the data set calls it, if that is another name than the modality's.
    """

    channels: tuple[str, ...]
    value_unit: str
    product: str | None = None

    @property
    def classes(self) -> Classes:
        """Classes of the histogram: fixed ones where the unit has a usual range."""
        return _GRIDS.get(self.value_unit, Relative())


class Subject(Protocol):
    """What `measure` measures."""

    @property
    def modalities(self) -> Mapping[str, Measured]:
        """What is measured, by name."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the file says about the data: `root`, `split` and more."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of the pieces, in the order in which their figures are merged."""

    def identity(self) -> dict[str, Any]:
        """Return plain data that tell these data from others."""

    def parts(self, number: int) -> Iterator[tuple[str, Array, Array]]:
        """Yield modality, values (C, ...) and their validity (...) of one piece.

        Raises:
            DataError: The piece cannot be read.
        """


@dataclass
class OfCatalogue:
    """All locations and dates of SSL4EO-S12, whole; a piece is a file with its partners.

    Attributes:
        catalogue: From `scan`.
        mask_clouds: Leave out clouds and their shadow too.
        dn_offset: What stored Sentinel-2 values carry: 0, 1000 or `auto`.
    """

    catalogue: Catalogue
    mask_clouds: bool = False
    dn_offset: DNOffset = "auto"

    @property
    def modalities(self) -> dict[str, Measured]:
        """The products by their keys."""
        facts = {name: product(p) for name, p in self.catalogue.products.items()}
        return {n: Measured(f.bands, f.value_unit, f.name) for n, f in facts.items()}

    @property
    def facts(self) -> dict[str, Any]:
        """Where the data lie and how they are read."""
        return {
            "root": self.catalogue.root,
            "split": self.catalogue.split,
            "release": self.catalogue.release,
            "mask_clouds": self.mask_clouds,
            "dn_offset": self.dn_offset,
        }

    @property
    def keys(self) -> list[str]:
        """Names of the files."""
        return [group.key for group in self.catalogue.groups]

    def identity(self) -> dict[str, Any]:
        """Return release, names, sizes and hashes of the files."""
        return self.catalogue.identity()

    def parts(self, number: int) -> Iterator[tuple[str, Array, Array]]:
        """Read one date of one product at a time: a file with all dates is large."""
        group = self.catalogue.groups[number]
        for name in group.products:
            for date in range(group.dates):
                block = read(
                    group,
                    name,
                    [date],
                    fix_s1_order=False,  # the order of dates does not matter here
                    mask_clouds=self.mask_clouds,
                    dn_offset=self.dn_offset,
                )
                yield name, np.moveaxis(block.values, 2, 0), block.valid  # (C, n, T, Y, X)


@dataclass
class OfSource:
    """The items of a source, each once, as batches would hold them.

    Attributes:
        source: Where they come from.
        described: The modalities by name.
        about: Root, split and whatever else the file should say about the data.
        name_data: Returns plain data that tell these files from others.
        epoch: Epoch whose windows and dates are looked at.
    """

    source: Source
    described: Mapping[str, Modality]
    about: Mapping[str, Any]
    name_data: Callable[[], dict[str, Any]]
    epoch: int = 0
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

    def identity(self) -> dict[str, Any]:
        """Return what the DataModule says of its files."""
        return self.name_data()

    def parts(self, number: int) -> Iterator[tuple[str, Array, Array]]:
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
                    yield name, *channel_first(rows.data, name, modality)


def channel_first(data: Mapping[str, Any], name: str, modality: Modality) -> tuple[Array, Array]:
    """Return values (C, n, ...) and validity (n, ...) of a modality of a batch."""
    values = np.moveaxis(np.asarray(data[name]), 2 if modality.kind == "series" else 1, 0)
    given = data.get(key(name, "valid"))
    valid = np.ones(values.shape[1:], bool) if given is None else np.asarray(given)
    for companion in ("present", "frames"):  # (n,) and (n, T)
        mask = data.get(key(name, companion))
        if mask is not None:
            mask = np.asarray(mask)
            valid = valid & mask.reshape(*mask.shape, *[1] * (valid.ndim - mask.ndim))
    return values, valid
