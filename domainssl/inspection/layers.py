"""What a store holds on a map grid: bands, reference system, dates, scaling, decoded values."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.inspection.files import (
    band_rows,
    have_one_value,
    unmarked_problems,
    unmarked_values,
    untold_offset,
)
from domainssl.io.raster.bands import GRD_REASON, describe_zarr, stored_bands, time_dim
from domainssl.io.raster.grd import is_grd, polarisations, read_sigma0
from domainssl.io.raster.grid import crs_of
from domainssl.io.raster.layer import OFFSET_BASELINE, StoredBand
from domainssl.io.raster.read import missing_of
from domainssl.io.raster.time import stored_baselines, times_of
from domainssl.io.raster.zarr import Cube

__all__ = ["inspect_layers"]

_SIDE = 512  # pixels measured along each axis, from the middle


def inspect_layers(cube: Cube) -> dict[str, Any]:
    """Describe the bands of a store.

    Returns:
        `layers`: per pixel size the bands, size, extent, chunks, scaling, nodata, unit, dates and
        reference system; `values`: decoded values around the middle at the first date; `notes`.
    """
    if is_grd(cube):
        return _grd(cube)
    report: dict[str, Any] = {"layers": [], "values": [], "notes": [], "problems": []}
    groups: dict[tuple[Any, ...], list[StoredBand]] = {}
    for band in stored_bands(cube):
        folder = band.array.rpartition("/")[0]
        facts = (folder, band.grid, band.chunk, band.scale, band.offset, band.nodata, band.unit)
        groups.setdefault(facts, []).append(band)
    for name, info in cube.arrays.items():
        if info.dtype.kind == "c" and len(info.shape) >= 2:
            report["problems"].append(f"{cube.name}: {name}: {info.dtype} numbers are not read")
    for bands in groups.values():
        report["layers"].append(_facts(cube, bands))
        rows, unmarked = _values(cube, bands)
        report["values"] += rows
        where = f"{cube.name}: {bands[0].array}"
        report["problems"] += unmarked_problems(where, unmarked)
        empty = [row["band"] for row in rows if row["min"] is None]
        if empty:
            report["problems"].append(
                f"{where}: no valid pixel of {' '.join(empty[:8])} in the middle of the first date"
            )
        facts = report["layers"][-1]
        if facts["crs"] is None:
            report["problems"].append(f"{where}: no coordinate reference system")
        if isinstance(facts["dates"], str):
            report["problems"].append(facts["dates"])
        report["problems"] += _baselines(cube, bands[0], facts)
        names = [band.name for band in bands]
        text = untold_offset(
            partial(describe_zarr, cube.name, names, cube=cube, options=cube.options or None), names
        )
        report["notes"] += [text] if text else []
    if have_one_value(report["values"]):
        report["problems"].append(
            f"{cube.name}: every band has one value in the middle of the first date"
        )
    return report


def _facts(cube: Cube, bands: list[StoredBand]) -> dict[str, Any]:
    first = bands[0]
    bounds = first.grid.bounds
    facts: dict[str, Any] = {
        "folder": first.array.rpartition("/")[0] or "/",
        "bands": [band.name for band in bands],
        "crs": crs_of(cube, first.array),
        "pixel": first.grid.step,
        "size": [first.grid.height, first.grid.width],
        "bounds": [bounds.left, bounds.bottom, bounds.right, bounds.top],
        "chunk": list(first.chunk),
        "scale": first.scale,
        "offset": first.offset,
        "nodata": list(first.nodata),
        "unit": first.unit,
    }
    try:
        times = times_of(cube, first.array, time_dim(cube, first))
        known = [t for t in times if not np.isnat(t)]
        facts["dates"] = len(times)
        facts["first_date"] = str(min(known)) if known else None
        facts["last_date"] = str(max(known)) if known else None
    except DataError as error:
        facts["dates"] = str(error)
    return facts


def _baselines(cube: Cube, band: StoredBand, facts: dict[str, Any]) -> list[str]:
    """Say that dates with and without the offset of 1000 are in one series."""
    if not isinstance(facts["dates"], int) or band.is_scaled:
        return []
    known = stored_baselines(cube, band.array, time_dim(cube, band), facts["dates"])
    carry = {baseline >= OFFSET_BASELINE for baseline in known if baseline is not None}
    if len(carry) < 2:
        return []
    return [
        f"{cube.name}: {band.array}: dates of Sentinel-2 processing baseline 04.00 and later, "
        "which store 1000 more, and earlier ones are in one series: set "
        "data.init_args.modalities.<name>.stored_unit to baseline, or to dn where no date has the "
        "offset any more"
    ]


def _values(cube: Cube, bands: list[StoredBand]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return a row per band, and the numbers that look like undeclared missing values."""
    rows: list[dict[str, Any]] = []
    unmarked: dict[str, float] = {}
    for band in bands:
        grid = band.grid
        top, left = (max(0, (n - _SIDE) // 2) for n in (grid.height, grid.width))
        place = {
            "y": slice(top, top + _SIDE),
            "x": slice(left, left + _SIDE),
            "time": slice(0, 1),
            "band": slice(band.index or 0, (band.index or 0) + 1),
        }
        stored = cube.read(band.array, [place[axis] for axis in band.axes]).reshape(1, -1)
        valid = ~missing_of(stored[0], band)
        rows += band_rows(stored * band.scale + band.offset, [band.name], valid)
        unmarked |= unmarked_values(stored, [band.name], valid)
    return rows, unmarked


def _grd(cube: Cube) -> dict[str, Any]:
    rows, facts = [], []
    for name, folder in polarisations(cube).items():
        height, width = cube.info(f"{folder}/measurements/grd").shape
        facts.append({"folder": folder, "bands": [name], "size": [height, width], "crs": None,
                      "unit": "amplitude"})  # fmt: skip
        top, left = (max(0, (n - _SIDE) // 2) for n in (height, width))
        part = (slice(top, top + _SIDE), slice(left, left + _SIDE))
        values, valid = read_sigma0(cube, name, *part)
        rows += band_rows(values[None], [f"{name} sigma0 dB"], valid)
    return {"layers": facts, "values": rows, "notes": [GRD_REASON], "problems": []}
