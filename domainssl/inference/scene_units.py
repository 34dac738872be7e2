"""Refuse rasters whose values must be in another unit than the one that a backbone takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.io.raster.grid import Bounds
from domainssl.io.raster.layer import LayerFile
from domainssl.io.raster.places import stages
from domainssl.io.raster.read import Target, read_pixels
from domainssl.modality import Modality
from domainssl.pieces import spread
from domainssl.units import unit_of_item

__all__ = ["refuse_other_unit"]

Array = np.ndarray[Any, Any]
_log = logging.getLogger(__name__)
_SIDE = 64  # pixels along the sides of a part that is looked at
_PLACES = (0.25, 0.75)  # of the first parts along each axis
_PARTS = len(_PLACES) ** 2  # that tell
_LEAST = 64  # valid pixels of a part that counts
_NUMBERS = 2**24  # of a part at most, where all of a raster is looked at
_DATES = 8  # that are looked at until one shows something
_SEEM = {
    "reflectance": "reflectance",
    "dn": "digital numbers",
    "percent": "percent of reflectance",
    "linear": "linear power",
    "db": "decibels",
    "normalised": "values that are normalised already; the backbone does that itself",
    "offset": "digital numbers with the offset of 1000, by their cirrus band B10",
}
_STORED = {"reflectance": "reflectance", "dn": "dn", "linear": "linear", "db": "db",
           "offset": "dn+1000"}  # fmt: skip


def refuse_other_unit(
    file: LayerFile, dates: Sequence[int], modality: Modality, target: Target
) -> None:
    """Look at four parts of a raster, and refuse it where all that tell speak for another unit.

    Where those show no valid pixel, others are looked at, and other dates of a series.

    Args:
        file: The raster.
        dates: Positions of the dates that are read.
        modality: What the backbone takes.
        target: What is delivered.

    Raises:
        DataError: They do. `--any_unit` takes the values as they are.
    """
    if file.kind == "safe":  # its metadata say what the numbers are
        return
    seen = _looked_at(file, dates, modality, target)
    if not seen.pixels:
        _log.warning(
            "%s: no valid pixel of %s, read with --stored_unit %s; features are missing there",
            file.path, modality.name, target.stored_unit,
        )  # fmt: skip
    seen.verdicts.discard("")
    if len(seen.verdicts) != 1 or seen.verdicts == {"fits"}:
        return
    [verdict] = seen.verdicts
    seem = f"they seem to be {_SEEM[verdict]}" if verdict in _SEEM else "nothing measures them"
    better = _STORED.get(verdict)
    asked = f"--stored_unit {better}" if better else "--stored_unit to what the file holds"
    raise DataError(
        f"{file.path}: read with --stored_unit {target.stored_unit}, values of {modality.name} lie "
        f"in [{seen.low:.5g}, {seen.high:.5g}], but the weights take {modality.value_unit!r}; "
        f"{seem}. Set {asked}, or mend scale and offset of the file; --any_unit takes them as they "
        "are."
    )


@dataclass(kw_only=True)
class _Seen:
    """What the parts of a raster have shown so far.

    Attributes:
        verdicts: What they speak for; see `unit_of_item`.
        parts: How many have enough valid pixels.
        pixels: Valid pixels of all; a damaged part counts as one.
        low: Lowest value.
        high: Highest value.
    """

    verdicts: set[str] = field(default_factory=set)
    parts: int = 0
    pixels: int = 0
    low: float = math.inf
    high: float = -math.inf

    def look(self, values: Array | None, modality: Modality) -> None:
        """Take the valid values of one more part, (C, n); None is a damaged one."""
        if values is None:
            self.pixels += 1
            return
        self.pixels += values.shape[1]
        if values.shape[1] < _LEAST:
            return
        self.parts += 1
        self.verdicts.add(unit_of_item(values, modality))
        self.low, self.high = min(self.low, values.min()), max(self.high, values.max())


def _looked_at(file: LayerFile, dates: Sequence[int], modality: Modality, target: Target) -> _Seen:
    """Look at parts until enough of them have valid pixels; each stage at all where none has."""
    seen = _Seen()
    for date in spread(dates, _DATES):
        for parts in _parts(file, target.step):
            for part in parts:
                seen.look(_values(file, date, part, target), modality)
                if seen.parts == _PARTS:
                    return seen
            if seen.parts:
                return seen
    return seen


def _values(file: LayerFile, date: int, part: Bounds, target: Target) -> Array | None:
    """Return the valid values of a part, (C, n); None where it is damaged."""
    try:
        pixels = read_pixels(file, [date], part, target)
    except DataError:  # the shard that needs it says so
        return None
    values = pixels.values[0][:, pixels.valid[0]].astype(np.float64)
    return np.asarray(values[:, np.isfinite(values).all(0)])


def _parts(file: LayerFile, step: float) -> Iterator[Iterator[Bounds]]:
    """Yield squares around the quarters of what all bands cover, more of them, then all of it."""
    bounds = file.bounds
    shape = [int(side / step + 1e-6) for side in (bounds.height, bounds.width)]

    def at(row: int, column: int, side: int) -> Bounds:
        sizes = min(side, shape[0] - row), min(side, shape[1] - column)
        return bounds.part(row, column, *sizes, step)

    corners = [
        [min(max(0, int(size * place) - _SIDE // 2), max(0, size - _SIDE)) for place in _PLACES]
        for size in shape
    ]
    quarters = dict.fromkeys((row, column) for row in corners[0] for column in corners[1])
    yield (at(*corner, _SIDE) for corner in quarters)
    finest = min(band.grid.step for band in file.bands)
    largest = math.isqrt(_NUMBERS // len(file.bands)) * min(1.0, finest / step)
    for stage in stages(shape, max(_SIDE, min(1024, int(largest)))):
        yield (at(*place) for place in stage)
