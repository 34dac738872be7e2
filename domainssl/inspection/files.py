"""What single files hold: GeoTIFF, zarr cubes, tars of cubes."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from domainssl.errors import DataError, setting
from domainssl.io.raster.gdal import open_raster, reading
from domainssl.io.raster.geotiff import (
    GEOTIFF_ENDINGS,
    bands_in,
    describe_geotiff,
    grid_in,
    hidden_by_alpha,
)
from domainssl.io.raster.grid import X_NAMES, Y_NAMES
from domainssl.io.raster.layer import LayerFile, StoredBand
from domainssl.io.raster.offset import unsettled
from domainssl.io.raster.read import MaskRule, missing_of
from domainssl.io.raster.zarr import Cube, open_cube
from domainssl.io.storage.archives import tar_index
from domainssl.io.storage.paths import Options, fetch_ranges
from domainssl.missing import MARKS, unmarked_value
from domainssl.sensors import L1C_BANDS

__all__ = [
    "band_rows",
    "have_one_value",
    "find_geotiffs",
    "inspect_cube",
    "inspect_geotiffs",
    "inspect_tar",
    "unmarked_problems",
    "unmarked_values",
    "untold_offset",
]

_MEASURED_FILES = 16
_MEASURED_PIXELS = 1024  # larger rasters are read in steps
_MEASURED_VALUES = 2**26  # of a cube
_MEASURED_BYTES = 2**30  # still larger ones in squares
_MEASURED_BANDS = 1000
_SQUARE = 128  # pixels
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


def have_one_value(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether every band has one value in all pixels; see `band_rows`."""
    return {row["std"] for row in rows} == {0.0}


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
        problems += unmarked_problems(file["path"], file.pop("unmarked"))
        problems += file.pop("grid_problems")
        if not file["valid_share"]:
            problems.append(f"{file['path']}: no pixel in which all bands are valid")
        elif have_one_value(file["values"]) and len(paths) == 1:
            problems.append(f"{file['path']}: every band has one value in all valid pixels")
    notes = [text for file in files if (text := file.pop("untold"))]
    return {
        "kind": "geotiff",
        "count": len(paths),
        "measured": len(files),
        "crs": dict(Counter(str(file["crs"]) for file in files)),
        "files": files,
        "notes": notes,
        "problems": problems,
    }


def _geotiff(path: str) -> dict[str, Any]:
    with open_raster(path) as file, reading(path):
        bands = bands_in(file)
        step, data, hidden = _sampled(file, bands)
        missing = [missing_of(values, band) for values, band in zip(data, bands, strict=True)]
        valid = ~(np.array(missing) | hidden).any(axis=0)
        decoded = data
        if any(band.is_scaled for band in bands):
            decoded = np.stack([v * b.scale + b.offset for v, b in zip(data, bands, strict=True)])
        nan = float(np.isnan(data).mean()) if data.dtype.kind == "f" else 0.0
        names = [band.name for band in bands]
        nodata = sorted({number for band in bands for number in band.nodata})
        return {
            "path": path,
            "shape": [file.count, file.height, file.width],
            "dtype": str(data.dtype),
            "chunks": list(file.block_shapes[0]),
            "codec": str(file.compression.value).lower() if file.compression else "none",
            "crs": file.crs.to_string() if file.crs else None,
            "transform": list(file.transform)[:6],
            "nodata": nodata[0] if len(nodata) == 1 else nodata or None,
            "mask": any(band.has_mask for band in bands),
            "overviews": list(file.overviews(1)),
            "read_step": step,
            "nan_share": nan,
            "valid_share": float(valid.mean()),
            "offset": _offset(data, valid),
            "values": band_rows(decoded, names, valid),
            "unmarked": unmarked_values(data, names, valid),
            "grid_problems": _grid_problems(file, path) if file.crs else [],
            "untold": untold_offset(lambda: describe_geotiff(path, names), names),
        }


def untold_offset(describe: Callable[[], LayerFile], names: Sequence[str]) -> str:
    """Return why nothing tells whether Sentinel-2 numbers carry the offset; see `unsettled`.

    Args:
        describe: Gives the layer of the bands; not asked where they are others.
        names: The bands.
    """
    if not set(names) <= set(L1C_BANDS):
        return ""
    try:
        file = describe()
        dates = range(min(1, len(file.times)))
        return unsettled(file, dates, "auto", "dn", MaskRule(), option=setting("stored_unit"))
    except DataError:  # said as a problem of its own
        return ""


def _grid_problems(file: Any, path: str) -> list[str]:
    """Return why training could not place the pixels."""
    try:
        grid_in(file, path)
    except DataError as error:
        return [str(error)]
    return []


def unmarked_values(values: Array, names: Sequence[str], valid: Array) -> dict[str, float]:
    """Return numbers among valid pixels that files use for missing ones, by band.

    Args:
        values: Values as stored, (C, ...).
        names: Names of the bands.
        valid: Pixels that count, broadcastable to (...).
    """
    found = {n: unmarked_value(v[valid], MARKS) for n, v in zip(names, values, strict=True)}
    return {name: number for name, number in found.items() if number is not None}


def unmarked_problems(where: str, found: Mapping[str, float]) -> list[str]:
    """Say which numbers training would take for values."""
    bands: dict[float, list[str]] = {}
    for name, number in found.items():
        bands.setdefault(number, []).append(name)
    return [
        f"{where}: {' '.join(names[:8])} hold{'s' * (len(names) == 1)} {number:g} far from all "
        "other values, and nothing declares it as missing (training leaves such pixels out of dn, "
        "reflectance and dB, and stops in other units): set "
        f"data.init_args.modalities.<name>.nodata: {number:g}"
        for number, names in bands.items()
    ]


def _sampled(file: Any, bands: Sequence[StoredBand]) -> tuple[int, Array, Any]:
    """Read the whole raster in steps, or squares spread over one that is too large for that.

    Returns:
        The step in pixels, or the distance of the squares, values (C, H, W) of the bands, and
        True where a mask hides them.
    """
    if file.count > _MEASURED_BANDS:
        raise DataError(f"{file.name}: {file.count} bands, expected at most {_MEASURED_BANDS}.")
    high, wide = file.height, file.width
    step = max(1, -(-max(high, wide) // _MEASURED_PIXELS))
    numbers = [(band.index or 0) + 1 for band in bands]
    has_mask = any(band.has_mask for band in bands)
    if file.count * high * wide * np.dtype(file.dtypes[0]).itemsize <= _MEASURED_BYTES:
        shape = (len(numbers), -(-high // step), -(-wide // step))
        hidden = hidden_by_alpha(file, numbers, out_shape=shape) if has_mask else False
        return step, file.read(numbers, out_shape=shape), hidden
    rows, columns = (sorted({(n - _SQUARE) * i // 3 for i in range(4)} if n > _SQUARE else {0})
                     for n in (high, wide))  # fmt: skip
    size = min(high, _SQUARE), min(wide, _SQUARE)
    _refuse_large_blocks(file)

    def joined(read: Callable[..., Array]) -> Array:
        squares = [
            [read(numbers, window=((y, y + size[0]), (x, x + size[1]))) for x in columns]
            for y in rows
        ]
        return np.concatenate([np.concatenate(row, 2) for row in squares], 1)

    hidden = joined(partial(hidden_by_alpha, file)) if has_mask else False
    return max(high, wide) // 4, joined(file.read), hidden


def _refuse_large_blocks(file: Any) -> None:
    block = max(math.prod(shape) for shape in file.block_shapes) * np.dtype(file.dtypes[0]).itemsize
    if block > _MEASURED_BYTES:
        raise DataError(
            f"{file.name}: blocks of {block / 1e9:.3g} GB; write it in tiles: gdal_translate "
            "-co TILED=YES."
        )


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
        missing = 0
        try:
            missing = cube.missing_chunks(name)
        except DataError as error:
            problems.append(str(error))
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
        is_image = bool(set(info.dims) & set(Y_NAMES)) and bool(set(info.dims) & set(X_NAMES))
        if missing and (name == "bands" or is_image):
            problems.append(f"{cube.name}: array {name!r} lacks {missing} chunks (read as fill)")
    if not arrays:
        problems.append(f"{cube.name}: the zarr hierarchy holds no array")
    report: dict[str, Any] = {"format": cube.format, "arrays": arrays, "values": []}
    if "bands" in cube.arrays:
        try:
            report |= _band_values(cube)
            if have_one_value(report["values"]):
                problems.append(f"{cube.name}: every band has one value in the first samples")
        except DataError as error:
            problems.append(str(error))
    return {**report, "problems": problems}


def _band_values(cube: Cube) -> Mapping[str, Any]:
    info = cube.info("bands")
    ndim = len(info.shape)
    if ndim not in (4, 5) or info.dtype.kind not in "iuf":
        return {}
    axis = ndim - 3
    lengths = [1 if i == axis - 1 else n for i, n in enumerate(info.shape)]
    for i in (0, ndim - 2, ndim - 1, axis):  # samples, rows and columns, bands
        rest = math.prod(lengths) // max(1, lengths[i])
        lengths[i] = max(1, min(lengths[i], _MEASURED_VALUES // max(1, rest)))
    first = [slice(0, n) for n in lengths]
    data = np.moveaxis(cube.read("bands", first), axis, 0)
    names = [str(i) for i in range(len(data))]
    if "band" in cube.arrays:
        names = cube.read_text("band")
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
