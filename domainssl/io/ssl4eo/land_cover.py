"""The land-cover product of SSL4EO-S12 (LULC): one class per pixel and date, beside the images."""

from __future__ import annotations

from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.io.raster.zarr import Cube, open_cube
from domainssl.io.ssl4eo.facts import LAND_COVER_CLASSES
from domainssl.io.ssl4eo.layout import Group
from domainssl.io.ssl4eo.read import cubes_b
from domainssl.io.ssl4eo.tiles import facts_a

__all__ = ["LAND_COVER_NAMES", "read_land_cover"]

Array = np.ndarray[Any, Any]
KEY = "mask"
_HIDDEN = LAND_COVER_CLASSES.index("clouds")
LAND_COVER_NAMES = tuple(n for i, n in enumerate(LAND_COVER_CLASSES) if i != _HIDDEN)
# stored number -> delivered class
_CLASS = np.array(
    [-1] + [-1 if i == _HIDDEN else i - (i > _HIDDEN) for i in range(len(LAND_COVER_CLASSES))],
    np.int64,
)


def read_land_cover(group: Group, date: int, locations: slice) -> tuple[Array, list[str]]:
    """Read the classes of some locations at one date.

    Args:
        group: From `scan`, with the product LULC under the key `mask`.
        date: Position in the time order; files that hold one map have it for all dates.
        locations: Which locations.

    Returns:
        int64 (n, Y, X), positions in `LAND_COVER_NAMES` and -1 where the class is not known; and
        what pairs the locations with other products, the location id (A) or the tar key (B).

    Raises:
        DataError: A file cannot be read, or holds numbers that are not those of the product.
    """
    chosen = range(group.count)[locations]
    if group.release == "A":
        path = group.files[KEY]
        cube = open_cube(path, options=group.storage_options)
        rows = slice(chosen.start, chosen.stop)
        stored = cube.read("bands", [rows, [_place(cube, 1, date)]])[:, 0, 0]
        return _classes(stored, cube.name), facts_a(cube, rows).ids
    maps, ids = [], []
    for at, one in zip(chosen, cubes_b(group, KEY, chosen), strict=True):
        if one is None:  # TerraMesh lacks it here
            maps.append(np.full(group.size, -1, np.int64))
            ids.append(group.stem(at))
            continue
        stored = one.read("bands", [[_place(one, 0, date)]])[0, 0]
        maps.append(_classes(stored, one.name))
        ids.append(group.stem(at))
    return np.stack(maps), ids


def _place(cube: Cube, axis: int, date: int) -> int:
    shape = cube.info("bands").shape
    if len(shape) != axis + 4 or shape[axis + 1] != 1:
        raise DataError(
            f"{cube.name}: array 'bands' has shape {shape}, expected one band of land cover, "
            f"{'(sample, time, 1, y, x)' if axis else '(time, 1, y, x)'}."
        )
    count = int(shape[axis])
    if date >= count > 1:
        raise DataError(f"{cube.name}: holds {count} dates, but date {date} was asked for.")
    return date if count > 1 else 0


def _classes(stored: Array, where: str) -> Array:
    """Return the classes of stored numbers, int64."""
    if stored.dtype.kind not in "iu" or stored.size == 0:
        raise DataError(f"{where}: array 'bands' is {stored.dtype}, expected whole numbers.")
    low, high = int(stored.min()), int(stored.max())
    if low < 0 or high >= len(_CLASS):
        odd = low if low < 0 else high
        raise DataError(
            f"{where}: array 'bands' holds {odd}, expected 0 (no data) to {len(_CLASS) - 1}, the "
            "numbers of the product LULC. Esri's own codes go up to 11; the published files keep "
            "those in the array 'esri_original'."
        )
    return np.asarray(_CLASS[stored])
