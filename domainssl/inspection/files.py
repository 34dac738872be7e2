"""What single files hold: GeoTIFF, zarr cubes, tars of cubes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from domainssl.errors import DataError, require
from domainssl.io.raster.geotiff import GEOTIFF_ENDINGS
from domainssl.io.raster.zarr import Cube, open_cube
from domainssl.io.ssl4eo.facts import L1C_BANDS
from domainssl.io.storage.archives import tar_index
from domainssl.io.storage.paths import Options, fetch_ranges

__all__ = [
    "band_rows",
    "find_geotiffs",
    "inspect_cube",
    "inspect_geotiffs",
    "inspect_tar",
]

_MEASURED_FILES = 16
_MEASURED_PIXELS = 1024  # larger rasters are read in steps
Array = np.ndarray[Any, Any]


def band_rows(
    values: Array, bands: Sequence[str], valid: Array | None = None
) -> list[dict[str, Any]]:
    """Return min, mean, max and standard deviation per band in float64, over finite pixels.

    Args:
        values: Values with the band first, (C, ...).
        bands: Names of the bands.
        valid: Pixels to look at, broadcastable to (...); all if None.
    """
    rows = []
    for name, band in zip(bands, values, strict=True):
        kept = band[valid] if valid is not None else band.reshape(-1)
        kept = kept.astype(np.float64)
        finite = kept[np.isfinite(kept)]
        row: dict[str, Any] = {"band": name, "min": None, "mean": None, "max": None, "std": None}
        if finite.size:
            row |= {
                "min": float(finite.min()),
                "mean": float(finite.mean()),
                "max": float(finite.max()),
                "std": float(finite.std()),
            }
        rows.append(row)
    return rows


def inspect_geotiffs(paths: Sequence[str]) -> dict[str, Any]:
    """Describe GeoTIFF files; values of the first ones are measured."""
    files, problems = [], []
    for path in paths[:_MEASURED_FILES]:
        try:
            files.append(_geotiff(path))
        except DataError as error:
            problems.append(str(error))
    for file in files:
        if file["crs"] is None:
            problems.append(f"{file['path']}: no coordinate reference system")
    return {
        "kind": "geotiff",
        "count": len(paths),
        "measured": len(files),
        "crs": dict(Counter(str(file["crs"]) for file in files)),
        "files": files,
        "problems": problems,
    }


def _geotiff(path: str) -> dict[str, Any]:
    rasterio = require("rasterio", "geo")
    try:
        with rasterio.open(path) as file:
            step = max(1, -(-max(file.height, file.width) // _MEASURED_PIXELS))
            shape = (file.count, -(-file.height // step), -(-file.width // step))
            data = file.read(out_shape=shape)
            names = [name or f"{i}" for i, name in enumerate(file.descriptions or (), 1)] or [
                str(i) for i in range(1, file.count + 1)
            ]
            valid = np.ones(shape[1:], bool)
            if file.nodata is not None and not np.isnan(file.nodata):
                valid = (data != file.nodata).any(axis=0)
            nan = float(np.isnan(data).mean()) if data.dtype.kind == "f" else 0.0
            return {
                "path": path,
                "shape": [file.count, file.height, file.width],
                "dtype": str(data.dtype),
                "chunks": list(file.block_shapes[0]),
                "codec": str(file.compression.value).lower() if file.compression else "none",
                "crs": file.crs.to_string() if file.crs else None,
                "transform": list(file.transform)[:6],
                "nodata": None if file.nodata is None else float(file.nodata),
                "overviews": list(file.overviews(1)),
                "read_step": step,
                "nan_share": nan,
                "valid_share": float(valid.mean()),
                "offset": _offset(data, valid),
                "values": band_rows(data, names, valid),
            }
    except rasterio.errors.RasterioError as error:
        raise DataError(f"{path}: cannot be read as GeoTIFF ({error})") from error


def _offset(data: Array, valid: Array) -> dict[str, Any] | None:
    """Judge the +1000 of 13-band Sentinel-2 numbers by B10, in the usual order of L1C."""
    if data.shape[0] != len(L1C_BANDS) or data.dtype.kind not in "iu" or not valid.any():
        return None
    median = float(np.median(data[L1C_BANDS.index("B10")][valid]))
    return {
        "value": 1000 if median > 800 else 0,
        "reason": f"median of B10 is {median:g} if the bands are those of L1C",
    }


def inspect_cube(path: str, options: Options | None = None) -> dict[str, Any]:
    """Describe a zarr cube: every array, and the values of `bands` at the first date."""
    return {"kind": "cube", **_describe(open_cube(path, options=options))}


def inspect_tar(path: str, options: Options | None = None) -> dict[str, Any]:
    """Describe a tar of zipped cubes by its index and its first member."""
    members = [m for m in tar_index(path, options) if m.key.endswith(".zarr.zip")]
    if not members:
        raise DataError(f"{path}: holds no .zarr.zip member")
    first = members[0]
    [raw] = fetch_ranges(path, [(first.offset, first.size)], options)
    return {
        "kind": "tar",
        "count": len(members),
        "first": first.key,
        **_describe(open_cube(raw, f"{path}:{first.key}")),
    }


def _describe(cube: Cube) -> dict[str, Any]:
    problems, arrays = [], []
    for name, info in cube.arrays.items():
        missing = cube.missing_chunks(name) if cube.format == 2 else 0
        arrays.append(
            {
                "name": name,
                "dims": list(info.dims),
                "shape": list(info.shape),
                "dtype": info.dtype.str,
                "chunks": list(info.chunks),
                "codec": info.codec,
                "missing_chunks": missing,
            }
        )
        if name == "bands" and missing:
            problems.append(f"{cube.name}: array 'bands' lacks {missing} chunks (read as fill)")
    report: dict[str, Any] = {"format": cube.format, "arrays": arrays, "values": []}
    if "bands" in cube.arrays:
        try:
            report |= _band_values(cube)
        except DataError as error:
            problems.append(str(error))
    return {**report, "problems": problems}


def _band_values(cube: Cube) -> Mapping[str, Any]:
    info = cube.info("bands")
    ndim = len(info.shape)
    if ndim not in (4, 5) or info.dtype.kind not in "iuf":
        return {}
    axis = ndim - 3
    first = [slice(None)] * (axis - 1) + [slice(0, 1)]
    data = np.moveaxis(cube.read("bands", first), axis, 0)
    names = [str(i) for i in range(len(data))]
    if "band" in cube.arrays:
        names = [str(name) for name in cube.read("band").reshape(-1)]
    if len(names) != len(data):
        raise DataError(f"{cube.name}: {len(names)} band names for {len(data)} bands")
    nan = float(np.isnan(data).mean()) if data.dtype.kind == "f" else 0.0
    return {"values": band_rows(data, names), "nan_share": nan}


def find_geotiffs(folder: str) -> list[str]:
    """Return the GeoTIFF files below a local folder, sorted."""
    found = [
        os.path.join(base, name)
        for base, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(GEOTIFF_ENDINGS)
    ]
    return sorted(found)
