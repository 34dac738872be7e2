"""Small GeoTIFF of benchmark sets: one patch a file, read whole and checked against its layout."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.io.raster.gdal import open_raster, reading
from domainssl.missing import beyond, tell

__all__ = ["folders_in", "measured_or_nan", "read_map", "read_patch", "repeated"]

Array = np.ndarray[Any, Any]
_UNITS = {"dn": "digital numbers (0 to 10000 and more)", "db": "decibels"}
_LARGEST = 2**26  # numbers in a patch


def read_patch(path: str, bands: int | None, side: int, unit: str = "") -> Array:
    """Read a patch as stored.

    Args:
        path: The file.
        bands: How many it has; None for any number.
        side: Rows and columns.
        unit: `dn` or `db` where that is what the publisher's file holds, which bytes cannot.

    Returns:
        (C, side, side); NaN for what the file calls nodata, where it holds floats.

    Raises:
        DataError: It is missing, damaged, or of another shape.
    """
    with open_raster(path) as file, reading(path):
        shape = (file.count, file.height, file.width)
        expected = (file.count if bands is None else bands, side, side)
        if shape != expected or file.count * side * side > _LARGEST:
            raise DataError(f"{path}: got the shape {shape}, expected {expected}.")
        if any(np.dtype(kind).kind not in "iuf" for kind in file.dtypes):
            raise DataError(f"{path}: holds {file.dtypes[0]}, expected real numbers.")
        if unit and any(np.dtype(kind).itemsize == 1 for kind in file.dtypes):
            raise DataError(
                f"{path}: numbers of one byte, as previews and copies scaled to 8 bit have them; "
                f"expected {_UNITS[unit]}. Take the publisher's files."
            )
        values: Array = file.read()
        for band, nodata in zip(values, file.nodatavals, strict=True):
            if values.dtype.kind == "f" and nodata is not None:
                band[band == nodata] = np.nan
    return values


def read_map(path: str, side: int) -> Array:
    """Read a patch of classes, int64 (side, side).

    Raises:
        DataError: As `read_patch`; or a number is not whole.
    """
    values = read_patch(path, 1, side)[0]
    if values.dtype.kind == "f" and not (values == np.rint(values)).all():
        raise DataError(f"{path}: holds numbers that are not whole, expected classes.")
    return values.astype(np.int64)


def repeated(values: Array, side: int) -> Array:
    """Return coarser pixels (C, h, h), each repeated so that the map has `side` pixels."""
    times = side // values.shape[-1]
    return values.repeat(times, -2).repeat(times, -1)


def measured_or_nan(values: Array, unit: str) -> Array:
    """Return float32 values (C, H, W), NaN where nothing was measured.

    That is where every stored band is 0, and in all bands where one holds a number that the unit
    cannot (-9999 dB).

    Args:
        values: Stored values, (C, H, W).
        unit: Their unit.
    """
    out: Array = values.astype(np.float32)
    hidden = beyond(out, unit)
    if hidden is not None:
        tell(f"patches of {unit}", out[hidden])
        out[:, hidden.any(0)] = np.nan
    out[:, ~values.any(0)] = np.nan
    return out


def folders_in(path: str) -> list[str]:
    """Return the sorted names of the folders in a folder, [] where there is none."""
    if not os.path.isdir(path):
        return []
    return sorted(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name)))
