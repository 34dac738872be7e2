"""What can be measured, and the locations and dates of SSL4EO-S12 as such.

A subject names its pieces and yields, for one of them, arrays of physical values per modality with
the channel first. It is pickled to worker processes; these need no torch for the files here, which
would take longer to import than most files to measure. `items.py` measures any source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from domainssl.inspection.moments import Classes, Grid, Relative
from domainssl.io.ssl4eo.facts import product
from domainssl.io.ssl4eo.layout import Catalogue
from domainssl.io.ssl4eo.read import DNOffset, read

__all__ = ["Measured", "OfCatalogue", "Subject"]

Array = np.ndarray[Any, Any]
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

    def written(self, reason: str) -> str:
        """Return why something cannot be read as a file may hold it."""

    def identity(self) -> dict[str, Any]:
        """Return plain data that tell these data from others."""

    def parts(self, number: int) -> Iterator[tuple[str, Array, Array, Sequence[str]]]:
        """Yield modality, values (C, ...), their validity (...) and names, of one piece.

        The names are those of the entries of the second axis, one of all of them, or empty where
        there is nothing to name.

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

    def written(self, reason: str) -> str:
        """Return the reason as it is."""
        return reason

    def identity(self) -> dict[str, Any]:
        """Return release, names, sizes and hashes of the files."""
        return self.catalogue.identity()

    def parts(self, number: int) -> Iterator[tuple[str, Array, Array, list[str]]]:
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
                values = np.moveaxis(block.values, 2, 0)  # (C, n, T, Y, X)
                yield name, values, block.valid, [f"{group.key}, date {date}"]
