"""GeoTIFF as a layer: where its bands lie, and windows of stored numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from domainssl.errors import DataError, require, setting
from domainssl.io.raster.attributes import check_scaling
from domainssl.io.raster.band_names import (
    no_band,
    refuse_contradiction,
    titles_or_none,
    without_names,
)
from domainssl.io.raster.gdal import open_raster, reading
from domainssl.io.raster.grid import Grid, plain_crs, said_crs
from domainssl.io.raster.layer import LayerFile, StoredBand
from domainssl.io.raster.time import baselines_of, parse_date, product_time
from domainssl.io.storage.handles import HandlePool
from domainssl.io.storage.paths import stamp
from domainssl.sensors import canonical_band, unit_in_name

__all__ = [
    "GEOTIFF_ENDINGS",
    "bands_in",
    "describe_geotiff",
    "grid_in",
    "hidden_by_alpha",
    "read_geotiff",
]

GEOTIFF_ENDINGS = (".tif", ".tiff")

_OPACITY = re.compile(r"alpha|opacity|mask|valid\w*|transparency", re.IGNORECASE)
_COLORS = {"red": "B04", "green": "B03", "blue": "B02"}
_TITLES = ("bandname", "band_name", "long_name", "name")  # fields of a band that name it
_FILES = HandlePool(limit=64)
_BESIDE = (".msk", ".aux.xml")  # they change what a file says
Array = np.ndarray[Any, Any]


def _open(path: str) -> Any:
    beside = (stamp(f"{path}{end}") for end in ("", *_BESIDE))
    return _FILES.get(tuple(beside), lambda: open_raster(path))


def describe_geotiff(
    path: str,
    bands: Sequence[str],
    *,
    crs: str | None = None,
    date: str = "",
    names: Sequence[str] = (),
) -> LayerFile:
    """Find the bands of one sensor in a file, by their descriptions.

    A file without descriptions, with as many bands as are asked for, has them in that order.

    Args:
        path: The file; also a URL that GDAL knows.
        bands: Names wanted.
        crs: Used where the file does not say.
        date: Date in the file's name.
        names: What its bands are called, in their order, instead of its own names.

    Raises:
        DataError: A band or the coordinate reference system is missing.
    """
    file = _open(path)
    grid = grid_in(file, path)
    known = plain_crs(file.crs.to_wkt(), path) if file.crs else said_crs(crs)
    if known is None:
        raise DataError(
            f"{path}: no coordinate reference system. Set {setting('crs')}, such as EPSG:32632."
        )
    alpha = _alpha(file)
    own: list[str | None] = [t for i, t in enumerate(_titles(file)) if i != alpha]
    if names and len(names) != len(own):
        raise DataError(f"{path}: {len(own)} bands, but {len(names)} names ({' '.join(names)}).")
    titles = titles_or_none(names or own)
    if titles is None and {canonical_band(band) for band in bands} <= set(_COLORS.values()):
        titles = _colors(file, alpha)
    has_names = titles is not None
    if titles is None:
        refuse_contradiction(path, own, bands)
        if file.count == len(bands):  # 4 bands of bytes are called alpha in passing
            alpha = None
        titles = without_names(path, file.count - (alpha is not None), bands)
    if alpha is not None:
        titles.insert(alpha, "")
    chosen = []
    for band in bands:
        name = canonical_band(band)
        if name not in titles:
            have = [title for title in titles if title]
            silent = len(titles) - len(have) - (alpha is not None)
            raise no_band(path, band, have, silent)
        if titles.count(name) > 1:
            several = [str(t) for t, known_as in zip(names or own, titles) if known_as == name]
            raise DataError(
                f"{path}: band {band!r} is there {titles.count(name)} times "
                f"({', '.join(several)}). Write a file with one of them: gdal_translate -b N."
            )
        chosen.append(_band(file, band, titles.index(name), grid, alpha))
    time = parse_date(date) if date else product_time([path.rpartition("/")[2]])[0]
    times = np.array([time], "datetime64[s]")
    told = file.tags()  # of GDAL's own driver for products of Sentinel-2
    names_of_product = (path, told.get("PRODUCT_URI", ""), told.get("PROCESSING_BASELINE", ""))
    known_as = [number for number in baselines_of(names_of_product) if number is not None]
    baselines = (known_as[0] if known_as else None,)
    return LayerFile(
        path=path, kind="geotiff", bands=tuple(chosen), times=times, crs=known,
        baselines=baselines, has_names=has_names,
    )  # fmt: skip


def grid_in(file: Any, path: str) -> Grid:
    """Return the grid of an open file.

    Args:
        file: The file, as `open_raster` returns it.
        path: How errors call it.

    Raises:
        DataError: The file has no transform, or pixels are turned or not square.
    """
    if file.transform.is_identity:
        points = " but ground control points" if file.gcps[0] else ""
        points = " but rational polynomials (RPC)" if file.rpcs else points
        raise DataError(
            f"{path}: no transform{points}, so nothing says where its pixels lie. Write one with "
            "gdalwarp or gdal_translate -a_ullr."
        )
    return Grid.of_transform(tuple(file.transform)[:6], file.height, file.width, path)


def bands_in(file: Any) -> list[StoredBand]:
    """Return every band of an open file but alpha, for looking at; numbers where names say nothing.

    Args:
        file: The file, as `open_raster` returns it.
    """
    alpha = _alpha(file)
    indices = [i for i in range(file.count) if i != alpha]
    stated = _titles(file)
    titles = titles_or_none([stated[i] for i in indices]) or [""] * len(indices)
    grid = Grid(left=0.0, top=0.0, step=1.0, height=file.height, width=file.width)
    return [
        _band(file, title or str(index + 1), index, grid, alpha)
        for index, title in zip(indices, titles, strict=True)
    ]


def hidden_by_alpha(file: Any, numbers: Sequence[int], **place: Any) -> Array:
    """Return True where a mask band, a `.msk` file or alpha hides bands of an open file, (C, H, W).

    Args:
        file: The file.
        numbers: The bands, from 1 on.
        place: Window or shape to read, as rasterio takes them.
    """
    hidden = np.asarray(file.read_masks(numbers, **place) == 0)
    if (alpha := _alpha(file)) is not None:
        if "out_shape" in place:
            place = {**place, "out_shape": place["out_shape"][-2:]}
        hidden |= file.read(alpha + 1, **place) == 0
    return hidden


def _titles(file: Any) -> list[str | None]:
    """Return what each band is called: its description, else a field of it or of the file."""
    if all(file.descriptions):
        return list(file.descriptions)
    of_file = {key.lower(): value for key, value in file.tags().items()}  # Band_1 is of ENVI's
    titles = []
    for number, title in enumerate(file.descriptions, start=1):
        fields = {key.lower(): value for key, value in file.tags(number).items()}
        found = (fields.get(name) for name in _TITLES)
        titles.append(title or next(filter(None, found), None) or of_file.get(f"band_{number}"))
    return titles


def _alpha(file: Any) -> int | None:
    """Return the position of the band that says how opaque the others are.

    Writers of four bands of bytes call the last one alpha, whatever it holds: what its description
    names as a band is one.
    """
    names = [color.name for color in file.colorinterp]
    if "alpha" not in names:
        return None
    at = names.index("alpha")
    title = str(file.descriptions[at] or "")
    is_band = titles_or_none([title]) is not None and not _OPACITY.fullmatch(title.strip())
    return None if is_band else at


def _colors(file: Any, alpha: int | None) -> list[str] | None:
    """Return the colours that a file calls its bands; None where it does not, or in passing.

    Writers of three or four bands of bytes call them red, green and blue, whatever they hold.
    """
    found = [color.name for i, color in enumerate(file.colorinterp) if i != alpha]
    if file.dtypes[0] == "uint8" or not set(_COLORS) <= set(found):
        return None
    return [_COLORS.get(name, "") for name in found]


def _band(file: Any, name: str, index: int, grid: Grid, alpha: int | None) -> StoredBand:
    nodata = file.nodatavals[index]
    if np.dtype(file.dtypes[index]).kind not in "iuf":
        raise DataError(
            f"{file.name}: band {name!r} holds {file.dtypes[index]} numbers; real ones are read. "
            "Write amplitude or power, such as abs(x) ** 2 for radar."
        )
    flags = {flag.name for flag in file.mask_flag_enums[index]}
    check_scaling(file.name, float(file.scales[index]), float(file.offsets[index]))
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
        unit=str(file.units[index] or "") or unit_in_name(file.descriptions[index] or ""),
        is_integer=np.dtype(file.dtypes[index]).kind in "iu",
        is_byte=np.dtype(file.dtypes[index]).itemsize == 1,
        has_mask=("per_dataset" in flags and "alpha" not in flags) or alpha is not None,
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
            hidden = hidden_by_alpha(file, numbers, window=window)
    bytes_decoded = 0
    is_interleaved = str(file.interleaving).lower().endswith("pixel")
    for index in range(file.count) if is_interleaved else indices:
        high, wide = file.block_shapes[index]
        down = -(-rows.stop // high) - rows.start // high
        across = -(-columns.stop // wide) - columns.start // wide
        bytes_decoded += down * across * high * wide * np.dtype(file.dtypes[index]).itemsize
    return values, hidden, bytes_decoded
