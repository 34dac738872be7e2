"""EOPF Sentinel-1 GRD products: calibrated backscatter in radar geometry.

Their pixels have no place on a map grid, so they are for looking at, not for pairing with optical
images; terrain-corrected cubes are read like any other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from domainssl.errors import DataError, nearest
from domainssl.io.raster.zarr import Cube

__all__ = ["is_grd", "polarisations", "read_sigma0"]

Array = np.ndarray[Any, Any]


def is_grd(cube: Cube) -> bool:
    """Return whether a store holds a product in radar geometry."""
    return any("azimuth_time" in info.dims for info in cube.arrays.values())


def polarisations(cube: Cube) -> dict[str, str]:
    """Return the folder inside the store of each polarisation, such as `VV`."""
    ending = "/measurements/grd"
    folders = [name[: -len(ending)] for name in cube.arrays if name.endswith(ending)]
    return {folder.rpartition("_")[2].upper(): folder for folder in folders}


def read_sigma0(cube: Cube, polarisation: str, rows: slice, columns: slice) -> tuple[Array, Array]:
    """Read calibrated backscatter: amplitude squared over the calibration vector squared.

    Args:
        cube: The product.
        polarisation: `VV`, `VH`, `HH` or `HV`.
        rows: Along azimuth.
        columns: Along ground range.

    Returns:
        Sigma nought in dB, float32 (H, W), 0 where not valid; and True where it is.

    Raises:
        DataError: The polarisation or its calibration is missing.
    """
    folders = polarisations(cube)
    if polarisation not in folders:
        raise DataError(
            f"{cube.name}: no polarisation {polarisation!r}; there are "
            f"{', '.join(folders) or 'none'}.{nearest(polarisation, folders)}"
        )
    folder = folders[polarisation]
    amplitude = cube.read(f"{folder}/measurements/grd", [rows, columns]).astype(np.float64)
    height, width = cube.info(f"{folder}/measurements/grd").shape
    lookup = _lookup(cube, f"{folder}/quality/calibration")
    at_rows = np.arange(*rows.indices(height))
    at_columns = np.arange(*columns.indices(width))
    factor = _interpolate(*lookup, at_rows, at_columns)
    valid = amplitude > 0
    power = np.where(valid, amplitude, 1.0) ** 2 / factor**2
    return np.where(valid, 10.0 * np.log10(power), 0.0).astype(np.float32), valid


def _lookup(cube: Cube, folder: str) -> tuple[Array, Array, Array]:
    """Return lines, pixels and the calibration values on them."""
    parts = []
    for name in ("line", "pixel", "sigma_nought"):
        path = f"{folder}/{name}"
        if path not in cube.arrays:
            raise DataError(
                f"{cube.name}: no array {path!r}; without it digital numbers cannot be calibrated."
            )
        parts.append(cube.read(path).astype(np.float64))
    return parts[0], parts[1], parts[2]


def _interpolate(lines: Array, pixels: Array, values: Array, rows: Array, columns: Array) -> Array:
    """Interpolate a coarse table linearly in both directions, (len(rows), len(columns))."""
    across = np.stack([np.interp(columns, pixels, line) for line in values])
    return np.stack([np.interp(rows, lines, column) for column in across.T], axis=1)
