"""Small cubes and GeoTIFF whose values tell place, date and band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["LEFT", "TIMES", "TOP", "coded", "expected_codes", "write_cube", "write_geotiff"]

LEFT, TOP = 400_000.0, 5_000_000.0
TIMES = np.array(["2021-03-01", "2021-03-20", "2021-05-02", "2021-08-30"], "datetime64[s]")
Array = np.ndarray[Any, Any]


def coded(
    dates: int, bands: int, side: int, step: float = 10.0, left: float = LEFT, top: float = TOP
) -> Array:
    """Return values (T, C, Y, X) that are functions of the world, the date and the band."""
    x = left + (np.arange(side) + 0.5) * step
    y = top - (np.arange(side) + 0.5) * step
    return np.stack(
        [[_code(y[:, None], x[None], date, band) for band in range(bands)] for date in range(dates)]
    ).astype(np.int32)


def _code(y: Any, x: Any, date: int, band: int) -> Any:
    column, row = (x - LEFT) // 10, (TOP - y) // 10
    return 100 + (row % 60) * 60 + column % 60 + 4000 * date + 500 * band


def expected_codes(geo: Mapping[str, Any], size: int, date: int, band: int) -> Array:
    """Return what a delivered window must hold, found through its affine map."""
    row, column = np.mgrid[:size, :size] + 0.5
    x = geo["a"] * column + geo["b"] * row + geo["c"]
    y = geo["d"] * column + geo["e"] * row + geo["f"]
    return np.asarray(_code(y, x, date, band))


def write_cube(
    path: Path,
    values: Array,
    bands: Sequence[str],
    *,
    times: Array | None = TIMES,
    step: float = 10.0,
    left: float = LEFT,
    top: float = TOP,
    chunk: int = 32,
    crs: str = "EPSG:32632",
    zarr_format: int = 3,
    as_variables: bool = False,
    ascending: bool = False,
    dims: Sequence[str] = ("time", "band", "y", "x"),
    attrs: Mapping[str, Any] | None = None,
    shards: bool = False,
    mask: Array | None = None,
    group: str = "",
) -> Path:
    """Write (T, C, Y, X) values as a store; `dims` name the axes T, C, Y, X."""
    import zarr

    root = zarr.open_group(str(path), mode="a", zarr_format=zarr_format)
    if group:
        root = root.require_group(group)
    t, b, y, x = dims
    height, width = values.shape[-2:]
    ys = top - (np.arange(height) + 0.5) * step
    if ascending:
        ys, values = ys[::-1], values[..., ::-1, :]
        mask = None if mask is None else mask[..., ::-1, :]
    xs = left + (np.arange(width) + 0.5) * step
    _put(root, y, ys, [y])
    _put(root, x, xs, [x])
    if times is not None:
        days = (times - np.datetime64("2021-01-01T00:00:00")).astype(np.int64)
        _put(root, t, days, [t], {"units": "seconds since 2021-01-01T00:00:00"})
    more = dict(attrs or {})
    if crs:
        _put(root, "spatial_ref", np.int64(0), [], {"crs_wkt": _wkt(crs)})
        more["grid_mapping"] = "spatial_ref"
    if times is None:
        values, mask = values[0], None if mask is None else mask[0]
    if as_variables:
        for at, name in enumerate(bands):
            names = [t, y, x] if times is not None else [y, x]
            _put(root, name, values[..., at, :, :], names, more, chunk, shards)
    else:
        _put(root, b, np.array(bands), [b])
        names = [t, b, y, x] if times is not None else [b, y, x]
        _put(root, "values", values, names, more, chunk, shards)
    if mask is not None:
        _put(root, "scl", mask, [t, y, x] if times is not None else [y, x], {}, chunk)
    return path


def _wkt(crs: str) -> str:
    import pyproj

    return str(pyproj.CRS.from_user_input(crs).to_wkt())


def _put(
    group: Any,
    name: str,
    values: Array,
    dims: Sequence[str],
    attrs: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    shards: bool = False,
) -> None:
    values = np.asarray(values)
    shape = values.shape
    chunks = tuple(
        min(chunk, n) if chunk and i >= len(shape) - 2 else 1 if chunk else max(1, n)
        for i, n in enumerate(shape)
    )
    options: dict[str, Any] = {}
    if group.metadata.zarr_format == 3:
        options["dimension_names"] = list(dims)
        if shards:
            options["shards"] = tuple(-(-n // c) * c for n, c in zip(shape, chunks, strict=True))
    dtype = str if values.dtype.kind == "U" and group.metadata.zarr_format == 3 else values.dtype
    array = group.create_array(name, shape=shape, dtype=dtype, chunks=chunks or "auto", **options)
    more = {} if group.metadata.zarr_format == 3 else {"_ARRAY_DIMENSIONS": list(dims)}
    array.attrs.update({**(attrs or {}), **more})
    array[...] = values


def write_geotiff(
    path: Path,
    values: Array,
    bands: Sequence[str] | None,
    *,
    nodata: float | None = None,
    step: float = 10.0,
    left: float = LEFT,
    top: float = TOP,
    crs: str = "EPSG:32632",
    block: int = 32,
) -> Path:
    """Write (C, Y, X) values as a tiled GeoTIFF."""
    import rasterio
    from rasterio.transform import from_origin

    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", count=len(values), height=values.shape[1],
        width=values.shape[2], dtype=values.dtype, crs=crs, nodata=nodata,
        transform=from_origin(left, top, step, step), tiled=True, blockxsize=block,
        blockysize=block, compress="deflate",
    ) as file:  # fmt: skip
        file.write(values)
        if bands:
            file.descriptions = tuple(bands)
    return path
