"""Find the bands of one sensor in a Zarr store: which array holds each, what its numbers mean."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from domainssl.errors import DataError, nearest, parsing, setting
from domainssl.io.raster.attributes import (
    check_scaling,
    check_sign,
    limits_of,
    nodata_of,
    number_of,
    stac_scaling,
)
from domainssl.io.raster.band_names import no_band, titles_of_axis, titles_or_none, without_names
from domainssl.io.raster.grid import X_NAMES, Y_NAMES, Grid, crs_of, grid_of, said_crs
from domainssl.io.raster.layer import LayerFile, StoredBand
from domainssl.io.raster.time import TIME_NAMES, stored_baselines, times_of
from domainssl.io.raster.zarr import ArrayInfo, Cube
from domainssl.io.storage.archives import FolderStore
from domainssl.io.storage.handles import HandlePool
from domainssl.io.storage.paths import Options, is_url, stamp
from domainssl.io.storage.paths import is_file as file_exists
from domainssl.sensors import canonical_band, unit_in_name

__all__ = ["GRD_REASON", "describe_zarr", "is_store", "open_store", "stored_bands", "time_dim"]

_log = logging.getLogger(__name__)

BAND_NAMES = (
    "band", "bands", "channel", "variable", "wavelength", "polarization", "polarisation", "pol",
)  # fmt: skip
_MARKS = ("zarr.json", ".zmetadata", ".zgroup")
_IS_ARRAY = re.compile(rb'"node_type"\s*:\s*"array"')
_MEND = "Correct the attributes, or remove those that are not needed."
_SAMPLE = 128  # rows and columns that are looked at to tell packed limits from physical ones
_STORES = HandlePool(limit=64)
_PRODUCT_PARTS = ("quality", "conditions")  # of EOPF products: masks that carry band names
GRD_REASON = (
    "Sentinel-1 GRD in radar geometry (azimuth_time, ground_range): its pixels are not on a map "
    "grid and terrain shifts them by up to kilometres, so they cannot be paired with Sentinel-2. "
    "Terrain-correct the product first (for instance to RTC backscatter in the UTM grid of the "
    "Sentinel-2 tile); `inspect` and io.raster.grd read it as it is."
)


def is_store(path: str, options: Options | None = None) -> bool:
    """Return whether a zarr hierarchy lies at a path or URL; nothing is listed."""
    if path.endswith(".zip"):
        return file_exists(path, options)
    if not is_url(path) and not os.path.isdir(path):
        return False
    store = FolderStore(path, options)
    for mark in _MARKS:
        if (raw := store.get(mark)) is not None:
            return mark != "zarr.json" or not _is_array(raw)
    return False


def _is_array(raw: bytes) -> bool:
    """Tell whether a `zarr.json` is that of an array; consolidated ones name arrays further in."""
    if not _IS_ARRAY.search(raw):
        return False
    try:
        found = json.loads(raw)
    except ValueError:
        return True
    return isinstance(found, dict) and found.get("node_type") == "array"


def open_store(path: str, options: Options | None = None) -> Cube:
    """Open a zarr hierarchy; it stays open in this process.

    Raises:
        DataError: There is none.
    """
    if path.endswith(".zip"):
        from domainssl.io.raster.zarr import open_cube

        return open_cube(path, options=options)

    def opener() -> Cube:
        if not is_store(path, options):
            raise DataError(f"{path}: no zarr hierarchy lies there")
        return Cube(FolderStore(path, options), path, options)

    inner = () if is_url(path) else _MARKS
    key = (stamp(path), *(stamp(f"{path}/{mark}") for mark in inner))
    cube: Cube = _STORES.get(key, opener)
    return cube


def describe_zarr(
    path: str,
    bands: Sequence[str],
    *,
    group: str = "",
    step_hint: float | None = None,
    mask: str | None = None,
    crs: str | None = None,
    date: str = "",
    options: Options | None = None,
    cube: Cube | None = None,
) -> LayerFile:
    """Find the bands of one sensor in a store.

    Args:
        path: The store.
        bands: Names wanted; `B2`, `b02` and `blue` are the same band.
        group: Folder inside the store to look in.
        step_hint: Pixel size wanted, in CRS units: of several arrays of a band, the one with it
            is taken, otherwise the finest.
        mask: Name of a mask array.
        crs: Used where the store does not say.
        date: Date in the file's name, used where the store has no time.
        options: fsspec options of a URL.
        cube: The store, where it is open; otherwise it is opened and stays open.

    Raises:
        DataError: A band is missing, or the store does not say where or what it is.
    """
    cube = cube or open_store(path, options)
    with parsing(f"{path}: the attributes", advice=_MEND):
        if any("azimuth_time" in info.dims for info in cube.arrays.values()):
            raise DataError(f"{path}: {GRD_REASON}")
        found = _candidates(cube, group)
        has_names = any(canonical_band(band) in found for band in bands)
        if not has_names:
            found = _named_in_order(cube, found, bands)
        chosen = tuple(_choose(cube, found, band, step_hint, group) for band in bands)
        known = crs_of(cube, chosen[0].array) or said_crs(crs)
        if known is None:
            raise DataError(
                f"{path}: no coordinate reference system (spatial_ref, proj:code, proj:epsg, "
                f"STAC). Set {setting('crs')}, such as EPSG:32632."
            )
        cover = _mask(cube, mask, group) if mask else None
        dim = time_dim(cube, chosen[0])
        times = times_of(cube, chosen[0].array, dim, date)
        if cover is not None and "time" in cover.axes:
            size = _time_size(cube, cover)
            if size != len(times):
                raise DataError(f"{path}: mask {mask!r} has {size} dates, the bands {len(times)}.")
        baselines = stored_baselines(cube, chosen[0].array, dim, len(times))
        return LayerFile(
            path=path,
            kind="zarr",
            bands=chosen,
            times=times,
            crs=known,
            mask=cover,
            options=options,
            baselines=baselines,
            has_names=has_names,
        )


def stored_bands(cube: Cube, group: str = "") -> list[StoredBand]:
    """Return every band of a store that lies on a map grid, for looking at.

    Raises:
        DataError: What its attributes say is not what they are for.
    """
    with parsing(f"{cube.name}: the attributes", advice=_MEND):
        found = _candidates(cube, group)
        every = [_stored(cube, name, each) for name, several in found.items() for each in several]
    return [_with_limits(cube, band) for band in every]


def _named_in_order(
    cube: Cube, found: dict[str, list[_Candidate]], bands: Sequence[str]
) -> dict[str, list[_Candidate]]:
    """Give the bands of the only array of a store, if they have no names, those asked for."""
    every = [candidate for several in found.values() for candidate in several]
    if len({c.info.name for c in every}) != 1 or titles_or_none(list(found)) is not None:
        return found
    every.sort(key=lambda candidate: candidate.index or 0)
    names = without_names(f"{cube.name}: {every[0].info.name}", len(every), bands)
    return {name: [candidate] for name, candidate in zip(names, every, strict=True)}


@dataclass(frozen=True)
class _Candidate:
    """An array, or one position on its band axis."""

    info: ArrayInfo
    axes: tuple[str, ...]
    index: int | None = None


def _candidates(cube: Cube, group: str) -> dict[str, list[_Candidate]]:
    """Return every array or slice of an array that may be a band, by canonical name."""
    prefix = f"{group.strip('/')}/" if group.strip("/") else ""
    names = [n for n in cube.arrays if n.startswith(prefix) or n == prefix[:-1]]
    measured = [n for n in names if "measurements/" in n]
    names = measured or [n for n in names if n.split("/")[0] not in _PRODUCT_PARTS]
    found: dict[str, list[_Candidate]] = {}
    for name in names:
        info = cube.arrays[name]
        axes = _axes(info)
        if axes is None or info.dtype.kind not in "iuf":
            continue
        titles = [name.rpartition("/")[2]]
        if "band" in axes:
            titles = titles_of_axis(cube, info, axes.index("band"))
        for index, title in enumerate(titles):
            place = index if "band" in axes else None
            found.setdefault(canonical_band(title), []).append(_Candidate(info, axes, place))
    return found


def _axes(info: ArrayInfo) -> tuple[str, ...] | None:
    """Return what each axis is; None where the array is no image."""
    tables = (("time", TIME_NAMES), ("band", BAND_NAMES), ("y", Y_NAMES), ("x", X_NAMES))
    axes = []
    for dim in info.dims:
        role = next((r for r, names in tables if dim.lower() in names), None)
        if role is None or role in axes:
            return None
        axes.append(role)
    return tuple(axes) if {"y", "x"} <= set(axes) else None


def _grid(cube: Cube, info: ArrayInfo, axes: tuple[str, ...]) -> Grid:
    return grid_of(cube, info.name, *(info.dims[axes.index(a)] for a in ("y", "x")))


def _stored(cube: Cube, name: str, candidate: _Candidate) -> StoredBand:
    """Take scale, offset, fill and limits from the attributes, each once."""
    info, axes = candidate.info, candidate.axes
    attrs, where = info.attrs, f"{cube.name}: {info.name}"
    check_sign(info, where)
    nodata = nodata_of(attrs)
    nodata += _list(_of_band(attrs.get("nodatavals"), candidate))
    stac = stac_scaling(info, _of_band(attrs.get("raster:bands"), candidate))
    nodata += _list(stac[2])
    if cube.format == 2:
        nodata.append(info.fill)  # as xarray; in format 3 it is what absent chunks read as
    numbers = {number_of(v, info, where) for v in nodata if v is not None}
    scale = attrs.get("scale_factor", _of_band(attrs.get("scales"), candidate))
    offset = attrs.get("add_offset", _of_band(attrs.get("offsets"), candidate))
    if scale is None and offset is None:
        scale, offset = stac[:2]
    scaling = (
        1.0 if scale is None else number_of(scale, info, where),
        0.0 if offset is None else number_of(offset, info, where),
    )
    check_scaling(where, *scaling)
    return StoredBand(
        name=name,
        array=info.name,
        index=candidate.index,
        axes=axes,
        grid=_grid(cube, info, axes),
        chunk=(info.chunks[axes.index("y")], info.chunks[axes.index("x")]),
        scale=scaling[0],
        offset=scaling[1],
        nodata=tuple(sorted(n for n in numbers if not math.isnan(n))),
        limits=limits_of(info, where),
        unit=str(attrs.get("units", "")) or unit_in_name(info.name.rpartition("/")[2]),
        is_integer=info.dtype.kind in "iu",
        is_byte=info.dtype.itemsize == 1,
    )


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _of_band(values: Any, candidate: _Candidate) -> Any:
    """Return what a list with an entry per band, as rasterio leaves it, says of one; or all."""
    if isinstance(values, list) and len(values) == 1:
        return values[0]
    if isinstance(values, list) and candidate.index is not None and len(values) > candidate.index:
        return values[candidate.index]
    return None


def _choose(
    cube: Cube,
    found: Mapping[str, Sequence[_Candidate]],
    band: str,
    step_hint: float | None,
    group: str,
) -> StoredBand:
    name = canonical_band(band)
    if not found.get(name):
        _refuse_numbers(cube, name)
        place = f"{cube.name}/{group}" if group else cube.name
        if found:
            raise no_band(place, band, sorted(found))
        raise DataError(
            f"{place}: no band {band!r}; there are: no array with the dimensions y and x"
            f"{_others(cube)}."
        )
    options = [_stored(cube, band, candidate) for candidate in found[name]]
    exact = [b for b in options if step_hint and abs(b.grid.step - step_hint) < 1e-3 * step_hint]
    chosen = min(exact or options, key=lambda b: b.grid.step)
    same = [b for b in options if b.grid.step == chosen.grid.step]
    if len(same) > 1:
        raise DataError(
            f"{cube.name}: band {band!r} is in several arrays: {', '.join(b.array for b in same)}. "
            f"Name the folder inside the store: set {setting('group')}."
        )
    return _with_limits(cube, chosen)


def _others(cube: Cube) -> str:
    """Return the dimensions of what may be meant, where no array is an image by its dimensions."""
    found = [f"{n} ({', '.join(i.dims)})" for n, i in cube.arrays.items() if len(i.shape) > 1]
    return f", but {'; '.join(found[:4])}: rename the dimensions, take others away" if found else ""


def _refuse_numbers(cube: Cube, band: str) -> None:
    """Say that a band is there, but holds numbers that are not read.

    Raises:
        DataError: It does.
    """
    for name, info in cube.arrays.items():
        if canonical_band(name.rpartition("/")[2]) == band and info.dtype.kind in "cbV":
            raise DataError(
                f"{cube.name}: {name} holds {info.dtype} numbers; whole and real ones are read. "
                "Write amplitude or power, such as abs(x) ** 2 for radar, or uint8."
            )


def _with_limits(cube: Cube, band: StoredBand) -> StoredBand:
    """Take limits for physical where, as packed numbers, they hide more than 99 % of a sample.

    CF states them packed, many writers do not. The sample is the middle of some dates.
    """
    if band.limits is None or not band.is_scaled or band.scale == 0:
        return band
    info = cube.arrays[band.array]
    count = _time_size(cube, band)
    middle = {
        "band": slice(band.index or 0, (band.index or 0) + 1),
        "y": _middle(band.grid.height),
        "x": _middle(band.grid.width),
    }
    low, high = sorted(round((v - band.offset) / band.scale, 9) for v in band.limits)
    seen = packed = physical = 0
    for date in sorted({0, count // 3, 2 * count // 3, count - 1}):
        at = {**middle, "time": slice(date, date + 1)}
        values = cube.read(info.name, [at[axis] for axis in band.axes])
        values = values[np.isfinite(values) & ~np.isin(values, band.nodata)]
        seen += values.size
        packed += int(((values >= band.limits[0]) & (values <= band.limits[1])).sum())
        physical += int(((values >= low) & (values <= high)).sum())
    if packed * 100 >= seen or physical * 100 < seen:
        return band
    _say_physical(band.limits)
    return replace(band, limits=(low, high))


def _middle(size: int) -> slice:
    return slice(max(0, size // 2 - _SAMPLE // 2), size // 2 + _SAMPLE // 2 + 1)


@cache
def _say_physical(limits: tuple[float, float]) -> None:
    _log.warning(
        "the limits %g to %g of valid values are taken as physical: as packed numbers, which CF "
        "means, they would hide more than 99 %% of the pixels",
        *limits,
    )


def _mask(cube: Cube, name: str, group: str) -> StoredBand:
    paths = [n for n in cube.arrays if n.rpartition("/")[2].lower() == name.lower()]
    inside = [n for n in paths if n.startswith(group)] or paths
    images = [n for n in inside if _axes(cube.arrays[n]) is not None]
    if not images:
        raise DataError(f"{cube.name}: no mask array {name!r}.{nearest(name, list(cube.arrays))}")
    bands = []
    for path in images:
        info = cube.arrays[path]
        axes = _axes(info)
        assert axes is not None
        grid = _grid(cube, info, axes)
        chunk = (info.chunks[axes.index("y")], info.chunks[axes.index("x")])
        bands.append(
            StoredBand(
                name=name,
                array=path,
                index=None,
                axes=axes,
                grid=grid,
                chunk=chunk,
                nodata=_unknown_classes(info, f"{cube.name}: {path}"),
                is_integer=True,
            )
        )
    return min(bands, key=lambda band: band.grid.step)


def _unknown_classes(info: ArrayInfo, where: str) -> tuple[float, ...]:
    """Return the numbers that a mask declares as missing; 0 is what many writers fill with.

    Raises:
        DataError: The mask is packed, so its numbers are no classes.
    """
    if any(info.attrs.get(n) not in (None, v) for n, v in (("scale_factor", 1), ("add_offset", 0))):
        raise DataError(
            f"{where}: the mask has scale_factor {info.attrs.get('scale_factor')!r} and add_offset "
            f"{info.attrs.get('add_offset')!r}, but class numbers are compared as stored. Write "
            "them unscaled, as whole numbers."
        )
    numbers = {number_of(v, info, where) for v in nodata_of(info.attrs) if v is not None}
    return tuple(sorted(n for n in numbers if n and not math.isnan(n)))


def time_dim(cube: Cube, band: StoredBand) -> str | None:
    """Return the dimension of dates of a band's array; None where it has none."""
    if "time" not in band.axes:
        return None
    return cube.arrays[band.array].dims[band.axes.index("time")]


def _time_size(cube: Cube, band: StoredBand) -> int:
    return cube.arrays[band.array].shape[band.axes.index("time")] if "time" in band.axes else 1
