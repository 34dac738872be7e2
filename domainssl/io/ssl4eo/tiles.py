"""Ids, acquisition times and places of SSL4EO-S12 locations, and the true order of S1 dates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainssl.io.raster.time import UNKNOWN, decode_times, product_time
from domainssl.io.raster.zarr import Cube

__all__ = [
    "Raw", "TileFacts", "chosen_times", "date_order", "facts_a", "facts_b", "facts_of_nothing",
    "joined",
]  # fmt: skip

Array = np.ndarray[Any, Any]


@dataclass(kw_only=True)
class TileFacts:
    """Ids, times and places of n locations; times are (n, stored dates), the rest (n,)."""

    ids: list[str]
    location_ids: list[str]
    times: Array
    product_times: Array
    lat: Array
    lon: Array
    crs: Array
    x0: Array
    y0: Array


@dataclass(kw_only=True)
class Raw:
    """Stored arrays of n locations, dates already chosen and in order."""

    values: Array
    cloud: Array | None
    meta: TileFacts
    order: Array
    decoded: int
    present: Array


def facts_a(cube: Cube, rows: slice) -> TileFacts:
    """Read the facts of some locations of a release-A file."""

    def column(name: str, default: Any) -> Array:
        if name not in cube.arrays:
            return np.full(rows.stop - rows.start, default)
        return cube.read(name, [rows])

    shape = cube.info("bands").shape
    ids = [str(name) for name in cube.read("sample", [rows])]
    times = np.full((len(ids), shape[1]), UNKNOWN)
    if "time_" in cube.arrays:
        attrs = cube.info("time_").attrs
        times = decode_times(cube.read("time_", [rows]), attrs, f"{cube.name}, array 'time_'")
    products = np.full((len(ids), shape[1]), UNKNOWN)
    if "file_id" in cube.arrays:
        products = np.stack([product_time(row) for row in cube.read("file_id", [rows])])
    corners = []
    for name, sign in (("x_", -0.5), ("y_", 0.5)):
        if name in cube.arrays:
            line = cube.read(name, [rows])
            corners.append(line[:, 0] + sign * np.abs(line[:, 1] - line[:, 0]))
        else:
            corners.append(np.full(len(ids), np.nan))
    return TileFacts(
        ids=ids,
        location_ids=ids,
        times=times,
        product_times=products,
        lat=column("center_lat", np.nan),
        lon=column("center_lon", np.nan),
        crs=column("crs", 0).astype(np.int64),
        x0=corners[0],
        y0=corners[1],
    )


def facts_b(cube: Cube, key: str, dates: int) -> TileFacts:
    """Read the facts of the one location in a tar's member.

    Args:
        cube: The member.
        key: Its key, without ending.
        dates: Dates of the location; a map that holds for all of them has one.
    """

    def scalar(name: str, default: Any) -> Array:
        return cube.read(name).reshape(1) if name in cube.arrays else np.array([default])

    count = cube.info("bands").shape[0]
    times = np.full((1, count), UNKNOWN)
    if "time" in cube.arrays:
        attrs = cube.info("time").attrs
        times = decode_times(cube.read("time"), attrs, f"{cube.name}, array 'time'").reshape(1, -1)
    products = np.full((1, count), UNKNOWN)
    if "file_id" in cube.arrays:
        products = product_time(list(cube.read("file_id").reshape(-1))).reshape(1, -1)
    if count == 1 < dates:
        times, products = (np.repeat(found, dates, axis=1) for found in (times, products))
    corners = []
    for name, sign in (("x", -0.5), ("y", 0.5)):
        line = cube.read(name) if name in cube.arrays else np.full(2, np.nan)
        corners.append(np.array([line[0] + sign * abs(line[1] - line[0])], np.float64))
    return TileFacts(
        ids=[key],
        location_ids=[str(scalar("sample", key)[0])],
        times=times,
        product_times=products,
        lat=scalar("center_lat", np.nan),
        lon=scalar("center_lon", np.nan),
        crs=scalar("crs", 0).astype(np.int64),
        x0=corners[0],
        y0=corners[1],
    )


def facts_of_nothing(stem: str, dates: int) -> TileFacts:
    """Return the facts of a location that lacks the product: its name, nothing else."""
    times = np.full((1, dates), UNKNOWN)
    unknown = np.full(1, np.nan)
    return TileFacts(
        ids=[stem], location_ids=[stem], times=times, product_times=times, lat=unknown,
        lon=unknown, crs=np.zeros(1, np.int64), x0=unknown, y0=unknown,
    )  # fmt: skip


def joined(metas: Sequence[TileFacts]) -> TileFacts:
    """Concatenate facts over locations."""

    def column(name: str) -> Any:
        parts = [getattr(meta, name) for meta in metas]
        if isinstance(parts[0], list):
            return list(itertools.chain.from_iterable(parts))
        return np.concatenate(parts)

    return TileFacts(**{name: column(name) for name in TileFacts.__dataclass_fields__})


def date_order(meta: TileFacts, dates: list[int], repair: bool) -> Array:
    """Return which stored date stands for each date asked for, int64 (n, T)."""
    n = len(meta.ids)
    order = np.broadcast_to(np.asarray(dates, np.int64), (n, len(dates)))
    known = np.asarray(~np.isnat(meta.product_times).any(axis=1, keepdims=True))
    if not repair or not known.any():
        return order.copy()
    ranks = np.argsort(meta.product_times, axis=1, kind="stable")
    return np.where(known, ranks[:, dates], order)


def chosen_times(meta: TileFacts, order: Array, repair: bool) -> Array:
    """Return the acquisition times of the stored dates that `order` names, (n, T)."""
    stored, named = meta.times, meta.product_times
    if repair:  # the product name is right where the stored time is not
        times = np.where(np.isnat(named), stored, named)
    else:
        times = np.where(np.isnat(stored), named, stored)
    return np.take_along_axis(times, order, axis=1)
