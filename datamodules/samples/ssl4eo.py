"""The embedded sample of SSL4EO-S12 v1.1: release A in small, made from known factors.

96 training and 64 held-out locations of 132 px and 4 dates, in files of 32 locations, for the
products asked for: S1GRD with S2L2A are about 157 MB. All sets of products show the same
locations. `labels/<split>.csv` beside them holds the dominant cover of each location
and the other factors, `labels/<split>_cover.npz` the cover of each pixel, which the product LULC
holds too, in the numbers of the published land cover. (It is published for release B alone; here
it has the form of the other products.)

The sample `objects` is another of this form, with one cover per location (`ssl4eo_objects.py`).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.ssl4eo_objects import draw_objects
from domainssl.datamodules.samples.ssl4eo_scene import (
    COVERS,
    DATES,
    SIDE,
    Location,
    draw_location,
    optical,
    radar,
)
from domainssl.errors import ConfigError, nearest, require
from domainssl.io.ssl4eo.facts import LAND_COVER, LAND_COVER_CLASSES, PRODUCTS, product
from domainssl.io.ssl4eo.write import TileTable, write_release_a
from domainssl.sensors import L1C_BANDS, L2A_BANDS

__all__ = [
    "LAND", "LOCATIONS", "PLAIN", "SCENES", "VERSION", "Factors", "PlaceSeen", "Scene", "build",
    "centres", "classes_of", "draw_place", "factors", "sample_root",
]  # fmt: skip

VERSION = "9"
LOCATIONS = {"train": 96, "val": 64}
_PER_FILE = 32
_SEED = 20260101
_STEP = np.array([128 if band > "B04" else 32 for band in L1C_BANDS])[:, None, None]
_ZONES = (32610, 32618, 32632, 32633, 32645, 32651, 32719, 32736, 32755)
_L2A = [L1C_BANDS.index(band) for band in L2A_BANDS]
# number of each cover in the product LULC: as which land such objects are mapped
LAND = 1 + np.array(
    [LAND_COVER_CLASSES.index(name) for name in ("trees", "water", "built", "rangeland")]
)
_RGB = [L1C_BANDS.index(band) for band in ("B04", "B03", "B02")]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What the locations of a sample show.

    Attributes:
        entry: Of the cache.
        version: Changes with the values.
        draw: Draws a location, `draw_location` or another of its form.
        cloudy: Share of the dates with clouds.
    """

    entry: str
    version: str
    draw: Callable[[np.random.Generator, int, Array], Location]
    cloudy: float


PLAIN = Scene(entry="ssl4eo-s12", version=VERSION, draw=draw_location, cloudy=0.2)
# by the name behind `sample:`
SCENES = {
    "": PLAIN,
    "objects": Scene(entry="ssl4eo-objects", version="1", draw=draw_objects, cloudy=0.0),
}


def sample_root(products: Iterable[str] = ("S1GRD", "S2L2A"), name: str = "") -> Path:
    """Return the folder of a sample with these products, made on first use in seconds.

    Args:
        products: What is written.
        name: One of `SCENES`.
    """
    names, scene = sorted({product(name).name for name in products}), SCENES[name]
    entry = "-".join([scene.entry, *names]).lower()
    what = f"SSL4EO-S12 sample {name + ' ' if name else ''}({', '.join(names)})"
    return made_once(entry, scene.version, what, lambda folder: build(folder, names, scene))


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The numbers that the locations of a split were made from, one value per location.

    Attributes:
        ids: Names of the locations, as the batch's `id` begins.
        label: Dominant cover, position in `COVERS`.
        shared: What both sensors see, by name.
        radar: What reaches the radar alone: offsets of VV and VH in dB, the same at all dates.
            Wetness and greenness move the same two bands, so no radar image tells them quite apart.
        optical: What reaches the optical sensor alone: logarithms of a gain of visible and
            short-wave light and of one of near-infrared light, the same at all dates.
    """

    ids: list[str]
    label: Array
    shared: dict[str, Array]
    radar: dict[str, Array]
    optical: dict[str, Array]


@dataclass(kw_only=True)
class PlaceSeen:
    """Everything the files hold of one location."""

    place: Location
    values: dict[str, Array]
    mask: Array
    times: Array
    s1_times: Array
    s2_names: list[str]
    s1_names: list[str]
    crs: int
    x0: float
    y0: float
    own: dict[str, dict[str, float]]

    def radar_at(self, date: int) -> int:
        """Return at which place the radar image of a date is stored."""
        return sorted(range(DATES), key=lambda n: self.s1_names[n][17:])[date]


def build(folder: Path, products: Sequence[str] = tuple(PRODUCTS), scene: Scene = PLAIN) -> None:
    """Write a sample into an empty folder; the same pixels every time."""
    for split, total in LOCATIONS.items():
        classes = classes_of(split)
        places: list[tuple[str, Location]] = []
        names = []
        make = partial(draw_place, split, classes, products, scene=scene)
        for file, low in enumerate(range(0, total, _PER_FILE), 1):
            numbers = range(low, low + _PER_FILE)
            with ThreadPoolExecutor(2) as pool:
                items = list(pool.map(make, numbers))
            ids = [_location_id(split, number) for number in numbers]
            name = f"ssl4eos12_{split}_seasonal_data_{file:06d}.zarr.zip"
            _write_file(folder / split, name, ids, items)
            names.append(name)
            places += zip(ids, (item.place for item in items), strict=True)
        (folder / "splits").mkdir(exist_ok=True)
        (folder / "splits" / f"ssl4eos12_{split}.txt").write_text("\n".join(names) + "\n")
        _write_labels(folder / "labels", split, places)


def factors(split: str = "val") -> Factors:
    """Draw the numbers behind the locations of a split again, without writing any file.

    Args:
        split: `train` or `val`.

    Raises:
        ConfigError: There is no such split.
    """
    if split not in LOCATIONS:
        raise ConfigError(
            f"factors: no split {split!r} in the embedded sample.{nearest(split, LOCATIONS)} "
            f"It has {', '.join(LOCATIONS)}."
        )
    numbers = range(LOCATIONS[split])
    with ThreadPoolExecutor(2) as pool:
        items = list(pool.map(partial(draw_place, split, classes_of(split), ()), numbers))
    return Factors(
        ids=[_location_id(split, number) for number in numbers],
        label=np.array([item.place.label for item in items]),
        shared=_columns([item.place.factors for item in items]),
        radar=_columns([item.own["radar"] for item in items]),
        optical=_columns([item.own["optical"] for item in items]),
    )


def _columns(rows: Sequence[dict[str, float]]) -> dict[str, Array]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def classes_of(split: str) -> Array:
    rng = np.random.default_rng([_SEED, len(split)])
    return rng.permutation(np.arange(LOCATIONS[split]) % len(COVERS))


def _location_id(split: str, number: int) -> str:
    return f"{number + (0 if split == 'train' else 200_000):07d}"


def draw_place(
    split: str, classes: Array, products: Sequence[str], number: int, scene: Scene = PLAIN
) -> PlaceSeen:
    rng = np.random.default_rng([_SEED, len(split), number])
    start = np.datetime64("2019-12-20T10:20:00") + np.timedelta64(int(rng.integers(0, 330)), "D")
    gaps = np.cumsum([0, *rng.integers(75, 100, DATES - 1)])
    seconds = rng.integers(0, 3600, DATES)
    times = start + gaps.astype("timedelta64[D]") + seconds.astype("timedelta64[s]")
    radar_times = times + rng.integers(-3, 4, DATES).astype("timedelta64[D]")
    months = (times.astype("datetime64[M]").astype(int) % 12).astype(np.float32)
    place = scene.draw(rng, int(classes[number]), months)
    s1, radar_own = radar(rng, place, looks_east=bool(rng.integers(2)))
    surface, top, mask, optical_own = optical(rng, place, rng.random(DATES) < scene.cloudy)
    if rng.random() < 0.05:  # the edge of a swath
        mask[rng.integers(DATES), :, : int(rng.integers(6, 30))] = 6
    gone = mask == 6
    zone = int(rng.choice(_ZONES))
    tile = f"T{zone % 100:02d}{'ABCDEFGH'[number % 8]}{'KLMN'[number % 4]}{'PQRST'[number % 5]}"
    # release A lists S1A before S1B: pixels and names follow the name, `time_` the date
    mixed = number // _PER_FILE == 1
    satellites = rng.choice(["A", "B"], DATES) if mixed else ["A"] * DATES
    radar_names = [_s1_name(s, t) for s, t in zip(satellites, radar_times, strict=True)]
    stored = np.argsort(np.array(radar_names), kind="stable")
    makers: dict[str, Callable[[], Array]] = {
        "S1GRD": lambda: s1[stored],
        "S2L2A": lambda: _digital(surface, gone)[:, _L2A],
        "S2L1C": lambda: _digital(top, gone),
        "S2RGB": lambda: _eight_bit(surface[:, _RGB], gone),
    }
    return PlaceSeen(
        place=place,
        values={name: makers[name]() for name in products},
        mask=mask,
        times=times,
        s1_times=radar_times,
        s2_names=[f"{_stamp(t)}_{_stamp(t + np.timedelta64(7, 's'))}_{tile}" for t in times],
        s1_names=[radar_names[i] for i in stored],
        crs=zone,
        x0=float(rng.integers(300_000, 700_000)) + 0.5,
        y0=float(rng.integers(1_000_000, 7_000_000)) + 0.25,
        own={"radar": radar_own, "optical": optical_own},
    )  # fmt: skip


def _digital(reflectance: Array, gone: Array) -> Array:
    """Return what release A stores: DN with the +1000, 0 no data (in coarse steps, to be small)."""
    dn = (np.round(reflectance * (10_000 / _STEP)) * _STEP + 1000).astype("<i2")
    return np.where(gone[:, None], np.int16(0), dn)


def _eight_bit(reflectance: Array, gone: Array) -> Array:
    shades = np.clip(np.round(reflectance * 900), 1, 255)
    return np.where(gone[:, None], 0, shades).astype(np.uint8)


def _stamp(time: np.datetime64) -> str:
    return str(time.astype("datetime64[s]")).replace("-", "").replace(":", "")


def _s1_name(satellite: str, time: np.datetime64) -> str:
    end = _stamp(time + np.timedelta64(25, "s"))
    return f"S1{satellite}_IW_GRDH_1SDV_{_stamp(time)}_{end}_034567_040ABC_1D2E"


def _write_file(folder: Path, name: str, ids: Sequence[str], items: Sequence[PlaceSeen]) -> None:
    crs = np.array([item.crs for item in items])
    x0, y0 = np.array([item.x0 for item in items]), np.array([item.y0 for item in items])
    lat, lon = centres(crs, x0 + 5.0 * SIDE, y0 - 5.0 * SIDE)
    mask = np.stack([item.mask for item in items])
    s2 = ([item.s2_names for item in items], np.stack([item.times for item in items]))
    s1_times = np.sort(np.stack([item.s1_times for item in items]), axis=1)
    s1 = ([item.s1_names for item in items], s1_times)
    for product_name in items[0].values:
        is_radar = product_name == "S1GRD"
        names, times = s1 if is_radar else s2
        (folder / product_name).mkdir(parents=True, exist_ok=True)
        tiles = TileTable(
            ids=ids, times=times, file_ids=names, lat=lat, lon=lon, crs=crs, x0=x0, y0=y0
        )
        values = np.stack([item.values[product_name] for item in items])
        path = folder / product_name / name
        write_release_a(path, product_name, values, tiles, None if is_radar else mask)
    _write_land_cover(folder / LAND_COVER.name / name, ids, items, (lat, lon))


def _write_land_cover(
    path: Path, ids: Sequence[str], items: Sequence[PlaceSeen], centres: tuple[Array, Array]
) -> None:
    """Write the cover of each pixel as the product LULC, the same at all dates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tiles = TileTable(
        ids=ids,
        times=np.stack([item.times for item in items]),
        file_ids=[item.s2_names for item in items],
        lat=centres[0],
        lon=centres[1],
        crs=np.array([item.crs for item in items]),
        x0=np.array([item.x0 for item in items]),
        y0=np.array([item.y0 for item in items]),
    )
    land = LAND[np.stack([item.place.cover for item in items])].astype(np.uint8)
    values = np.broadcast_to(land[:, None, None], (len(ids), DATES, 1, SIDE, SIDE))
    write_release_a(path, LAND_COVER.name, values, tiles)


def centres(crs: Array, x: Array, y: Array) -> tuple[Array, Array]:
    transformer = require("pyproj", "geo").Transformer
    lat, lon = np.empty(len(crs)), np.empty(len(crs))
    for zone in np.unique(crs):
        here = crs == zone
        change = transformer.from_crs(int(zone), 4326, always_xy=True)
        lon[here], lat[here] = change.transform(x[here], y[here])
    return lat, lon


def _write_labels(folder: Path, split: str, places: Sequence[tuple[str, Location]]) -> None:
    folder.mkdir(exist_ok=True)
    factors = list(places[0][1].factors)
    with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sample", "label", "name", *factors])
        for key, place in places:
            numbers = [f"{place.factors[name]:.5f}" for name in factors]
            writer.writerow([key, place.label, COVERS[place.label], *numbers])
    np.savez_compressed(
        folder / f"{split}_cover.npz",
        sample=np.array([key for key, _ in places]),
        cover=np.stack([place.cover for _, place in places]),
        names=np.array(COVERS),
    )
