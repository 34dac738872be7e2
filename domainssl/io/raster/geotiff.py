"""GeoTIFF as a layer: where its bands lie, and windows of stored numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from domainssl.errors import DataError, nearest, require
from domainssl.io.raster.bands import LayerFile, StoredBand, titles_or_none, without_names
from domainssl.io.raster.gdal import open_raster, reading
from domainssl.io.raster.grid import Grid, plain_crs
from domainssl.io.raster.time import baselines_of, parse_date, product_time
from domainssl.io.storage.handles import HandlePool
from domainssl.io.storage.paths import stamp
from domainssl.sensors import canonical_band

__all__ = ["GEOTIFF_ENDINGS", "describe_geotiff", "read_geotiff"]

GEOTIFF_ENDINGS = (".tif", ".tiff")

_FILES = HandlePool(limit=64)
_BESIDE = (".msk", ".aux.xml")  # they change what a file says
Array = np.ndarray[Any, Any]


def _open(path: str) -> Any:
    beside = (stamp(f"{path}{end}") for end in ("", *_BESIDE))
    return _FILES.get(tuple(beside), lambda: open_raster(path))


def describe_geotiff(
    path: str, bands: Sequence[str], *, crs: str | None = None, date: str = ""
) -> LayerFile:
    """Find the bands of one sensor in a file, by their descriptions.

    A file without descriptions, with as many bands as are asked for, has them in that order.

    Args:
        path: The file; also a URL that GDAL knows.
        bands: Names wanted.
        crs: Used where the file does not say.
        date: Date in the file's name.

    Raises:
        DataError: A band or the coordinate reference system is missing.
    """
    file = _open(path)
    known = plain_crs(file.crs.to_wkt(), path) if file.crs else crs
    if known is None:
        raise DataError(
            f"{path}: no coordinate reference system. Name it in "
            "data.init_args.modalities.<name>.crs, such as EPSG:32632."
        )
    grid = Grid.of_transform(tuple(file.transform)[:6], file.height, file.width, path)
    alpha = _alpha(file)
    titles = titles_or_none([t for i, t in enumerate(file.descriptions) if i != alpha])
    if titles is None:
        titles = without_names(path, file.count - (alpha is not None), bands)
    if alpha is not None:
        titles.insert(alpha, "")
    chosen = []
    for band in bands:
        name = canonical_band(band)
        if name not in titles:
            have = ", ".join(t for t in titles if t)
            raise DataError(f"{path}: no band {band!r}; there are: {have}.{nearest(name, titles)}")
        chosen.append(_band(file, band, titles.index(name), grid))
    time = parse_date(date) if date else product_time([path.rpartition("/")[2]])[0]
    times = np.array([time], "datetime64[s]")
    baselines = baselines_of([path])
    return LayerFile(
        path=path, kind="geotiff", bands=tuple(chosen), times=times, crs=known, baselines=baselines
    )


def _alpha(file: Any) -> int | None:
    """Return the position of the band that says how opaque the others are."""
    names = [color.name for color in file.colorinterp]
    return names.index("alpha") if "alpha" in names else None


def _band(file: Any, name: str, index: int, grid: Grid) -> StoredBand:
    nodata = file.nodatavals[index]
    has_nodata = nodata is not None and not math.isnan(nodata)
    return StoredBand(
        name=name,
        array="",
        index=index,
        axes=("band", "y", "x"),
        grid=grid,
        chunk=tuple(file.block_shapes[index]),
        scale=float(file.scales[index]),
        offset=float(file.offsets[index]),
        nodata=(float(nodata),) if has_nodata else (),
        limits=None,
        unit=str(file.units[index] or ""),
        is_integer=np.dtype(file.dtypes[index]).kind in "iu",
        has_mask=any(flag.name == "per_dataset" for flag in file.mask_flag_enums[index])
        or _alpha(file) is not None,
    )


def read_geotiff(
    path: str, indices: Sequence[int], rows: slice, columns: slice, *, has_mask: bool = False
) -> tuple[Array, Array | None, int]:
    """Read a window of several bands as stored.

    Args:
        path: The file.
        indices: Positions of the bands.
        rows: Rows of the window.
        columns: Columns of the window.
        has_mask: Read the mask too: of a mask band, a `.msk` file or an alpha band.

    Returns:
        Values (C, H, W); True where the mask hides a pixel, (C, H, W), or None without one; and
        how many bytes the blocks hold that were decoded.

    Raises:
        DataError: The file is damaged.
    """
    rasterio = require("rasterio", "geo")
    file = _open(path)
    window = rasterio.windows.Window.from_slices(rows, columns)
    numbers = [i + 1 for i in indices]
    hidden = None
    with reading(path):
        values = file.read(numbers, window=window)
        if has_mask:
            hidden = file.read_masks(numbers, window=window) == 0
            if (alpha := _alpha(file)) is not None:
                hidden |= file.read(alpha + 1, window=window) == 0
    bytes_decoded = 0
    is_interleaved = str(file.interleaving).lower().endswith("pixel")
    for index in range(file.count) if is_interleaved else indices:
        high, wide = file.block_shapes[index]
        down = -(-rows.stop // high) - rows.start // high
        across = -(-columns.stop // wide) - columns.start // wide
        bytes_decoded += down * across * high * wide * np.dtype(file.dtypes[index]).itemsize
    return values, hidden, bytes_decoded
