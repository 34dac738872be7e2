"""Blocks of Zarr cubes, ready as items, against zarr-python reading the same chunks.

The stores are written for the occasion, in three layouts: a variable per band, sharded, scaled to
reflectance (as EOPF products and GeoZarr have it), a band axis, and a band axis of format 2. The
plain side reads the same dates and windows of the same arrays and does nothing else: no grid, no
units, no validity, no windows, no batches.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.bench.report import Goal, Row, Settings, interleaved, ratio, silent
from domainssl.datamodules.cubes import SentinelCubeDataModule
from domainssl.errors import require
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading
from domainssl.sensors import L2A_BANDS
from domainssl.sources.cube_options import Layer
from domainssl.sources.dates import Dates
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window

__all__ = ["measure"]

_LAYOUTS = {
    "a variable per band, sharded, scaled, format 3": (3, True, 0.6),
    "a band axis, format 3": (3, False, 0.7),
    "a band axis, format 2": (2, False, 0.7),
}


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the ratio for each layout."""
    for what, (zarr_format, is_split, bound) in _LAYOUTS.items():
        with tempfile.TemporaryDirectory(prefix="domainssl-bench-") as folder:
            side, chunk = settings.pick(1024, 64), settings.pick(256, 32)
            path = Path(folder) / "site.zarr"
            _write(path, side, chunk, zarr_format, is_split=is_split)
            ours = _items(folder, chunk, unit="reflectance" if is_split else "dn")
            theirs = _plain(path, side, is_split=is_split)
            rounds = settings.pick(7, 1, settings.rounds)
            # zarr decodes in threads, so processor time is compared
            pairs = interleaved(ours, theirs, rounds, clock=time.process_time)
        yield ratio(
            "cubes",
            f"plain zarr / items, {what}, processor time",
            pairs,
            Goal("at least", bound),
            f"one date, {len(L2A_BANDS)} bands of {side} px, chunks of {chunk} px",
            ("items", "zarr"),
        )


def _write(path: Path, side: int, chunk: int, zarr_format: int, *, is_split: bool) -> None:
    """Write one site of two dates: smooth fields with noise, which compress as real data do."""
    zarr, pyproj = require("zarr", "geo"), require("pyproj", "geo")
    rng = np.random.default_rng(0)
    coarse = rng.normal(2500, 300, (2, len(L2A_BANDS), side // 16, side // 16))
    noise = rng.normal(0, 60, (side, side))
    values = (coarse.repeat(16, 2).repeat(16, 3) + noise).astype(np.uint16)
    root = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)

    def put(name: str, given: Any, dims: list[str], attrs: Any = None, **layout: Any) -> None:
        given = np.asarray(given)
        if zarr_format == 3:
            layout["dimension_names"] = dims
        dtype = str if given.dtype.kind == "U" and zarr_format == 3 else given.dtype
        array = root.create_array(name, shape=given.shape, dtype=dtype, **layout)
        named = {} if zarr_format == 3 else {"_ARRAY_DIMENSIONS": dims}
        array.attrs.update({**(attrs or {}), **named})
        array[...] = given

    put("y", 5e6 - 10.0 * np.arange(side) - 5, ["y"])
    put("x", 4e5 + 10.0 * np.arange(side) + 5, ["x"])
    put("time", np.array([0, 20]), ["time"], {"units": "days since 2021-03-01"})
    wkt = pyproj.CRS.from_epsg(32632).to_wkt()
    put("spatial_ref", np.int64(0), [], {"crs_wkt": wkt})
    attrs = {"grid_mapping": "spatial_ref", "_FillValue": 0}
    if is_split:
        layout = {"chunks": (1, chunk, chunk), "shards": (1, side, side)}
        scaled = {**attrs, "scale_factor": 1e-4, "add_offset": -0.1}
        for at, band in enumerate(L2A_BANDS):
            put(band, values[:, at], ["time", "y", "x"], scaled, **layout)
    else:
        put("band", np.array(L2A_BANDS), ["band"])
        chunks = (1, 1, chunk, chunk)
        put("values", values, ["time", "band", "y", "x"], attrs, chunks=chunks)


def _items(folder: str, chunk: int, unit: str) -> Callable[[], Any]:
    """Return what makes the items of every block, each with one date."""
    data = SentinelCubeDataModule(
        root=folder,
        modalities={"s2": Layer(bands=L2A_BANDS, path="{site}.zarr", value_unit=unit)},
        global_batch_size=1,
        window=Window(size=chunk // 2, jitter=False),
        dates=Dates(mode="one"),
        held_out=HeldOut(val_fraction=0),
        labels=None,
        loading=Loading(workers=0),
    )
    with silent():
        data.setup("fit")
    source = data.source("train")

    def items() -> None:
        for block, size in enumerate(source.sizes):
            source.load(Piece(block, 0, size), 0)

    return items


def _plain(path: Path, side: int, *, is_split: bool) -> Callable[[], Any]:
    """Return what reads one date of all bands with zarr-python."""
    root = require("zarr", "geo").open_group(str(path), mode="r")
    if is_split:
        arrays = [root[band] for band in L2A_BANDS]
        return lambda: [array[0, :side, :side] for array in arrays]
    array = root["values"]
    return lambda: array[0, :, :side, :side]
