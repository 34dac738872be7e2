"""The embedded sample of TerraMesh: shards in small, made from the factors of SSL4EO-S12's.

192 training and 64 held-out locations of 96 px, one date each, as S1RTC, S2L2A, DEM and LULC: about
45 MB. Two training locations show one place at two dates. Every other location carries the +1000 of
Sentinel-2, and some lack the DEM, as in the real shards. `labels/<split>.csv` holds the dominant
cover of each location.
"""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.ssl4eo import (
    LAND,
    LOCATIONS,
    PlaceSeen,
    centres,
    classes_of,
    draw_place,
)
from domainssl.datamodules.samples.ssl4eo_scene import COVERS
from domainssl.io.ssl4eo.write import TileTable, write_release_b

__all__ = ["VERSION", "build", "sample_root"]

VERSION = "3"
_SIDE = 96
_DATES = {"train": (0, 2), "val": (1,)}
_PER_SHARD = 96
_WITHOUT_HEIGHTS = 8  # every so many locations
_PRODUCTS = ("S1RTC", "S2L2A", "DEM", "LULC")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Tile:
    """One place at one date."""

    key: str
    place: PlaceSeen
    date: int
    is_offset: bool

    def values(self, product: str) -> Array:
        """Return what a shard holds, (1, C, Y, X)."""
        begin = (self.place.mask.shape[-1] - _SIDE) // 2
        inner = (..., slice(begin, begin + _SIDE), slice(begin, begin + _SIDE))
        place = self.place.place
        if product == "LULC":
            return np.asarray(LAND[place.cover[inner]].astype(np.uint8)[None, None])
        if product == "DEM":
            heights = 200 + 80 * place.relief * place.terrain[inner]
            heights += 8 * place.strength * place.objects[inner].sum(0)  # a model of the surface
            return np.asarray(heights.round().astype("<i2")[None, None])
        if product == "S1RTC":
            at = self.place.radar_at(self.date)
            return np.asarray(self.place.values["S1GRD"][[at]][inner])
        found = self.place.values["S2L2A"][[self.date]][inner]
        return found if self.is_offset else np.where(found == 0, 0, found - 1000).astype("<i2")


def sample_root() -> Path:
    """Return the folder of the sample, made on first use in seconds."""
    return made_once("terramesh", VERSION, "TerraMesh sample", build)


def build(folder: Path) -> None:
    """Write the sample into an empty folder; the same pixels every time."""
    for split, total in LOCATIONS.items():
        make = partial(draw_place, split, classes_of(split), ("S1GRD", "S2L2A"))
        with ThreadPoolExecutor(2) as pool:
            places = list(pool.map(make, range(total)))
        tiles = [
            _Tile(f"majortom_{split}_{n:07d}", place, date, bool(n % 2))
            for n, (date, place) in enumerate(
                (date, place) for date in _DATES[split] for place in places
            )
        ]
        for shard, low in enumerate(range(0, len(tiles), _PER_SHARD), 1):
            for product in _PRODUCTS:
                path = folder / split / product / f"majortom_shard_{shard:06d}.tar"
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_shard(path, product, tiles[low : low + _PER_SHARD])
        (folder / "labels").mkdir(exist_ok=True)
        with open(folder / "labels" / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["sample", "label", "name"])
            for tile in tiles:
                label = tile.place.place.label
                writer.writerow([tile.key, label, COVERS[label]])


def _write_shard(path: Path, product: str, tiles: list[_Tile]) -> None:
    if product == "DEM":
        tiles = [t for n, t in enumerate(tiles) if n % _WITHOUT_HEIGHTS != _WITHOUT_HEIGHTS - 1]
    seen = [tile.place for tile in tiles]
    margin = 5.0 * (seen[0].mask.shape[-1] - _SIDE)
    crs = np.array([one.crs for one in seen])
    x0 = np.array([one.x0 + margin for one in seen])
    y0 = np.array([one.y0 - margin for one in seen])
    lat, lon = centres(crs, x0 + 5.0 * _SIDE, y0 - 5.0 * _SIDE)
    is_radar, is_optical = product == "S1RTC", product == "S2L2A"
    times = [
        (s.s1_times if is_radar else s.times)[[t.date]] for s, t in zip(seen, tiles, strict=True)
    ]
    names = [
        [one.s1_names[one.radar_at(tile.date)] if is_radar else one.s2_names[tile.date]]
        for one, tile in zip(seen, tiles, strict=True)
    ]
    table = TileTable(
        ids=[tile.key[-7:] for tile in tiles],
        times=np.stack(times) if product != "DEM" else np.zeros((len(tiles), 1), "datetime64[ns]"),
        file_ids=names, lat=lat, lon=lon, crs=crs, x0=x0, y0=y0,
    )  # fmt: skip
    begin = (seen[0].mask.shape[-1] - _SIDE) // 2
    inner = slice(begin, begin + _SIDE)
    clouds = np.stack([t.place.mask[[t.date]][:, inner, inner] for t in tiles])
    write_release_b(
        path,
        product,
        np.stack([tile.values(product) for tile in tiles]),
        table,
        [tile.key for tile in tiles],
        clouds if is_optical else None,
    )
