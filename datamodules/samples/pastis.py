"""The embedded samples of PASTIS, in its layout.

`pastis` has ten patches in each of the five folds. `crops` has others, without SPOT images: a tenth
of its training patches are eight, each with all crops.

Patches have 32 x 32 instead of 128 x 128 pixels and series 11 to 22 dates, to be small. Four of
the crops occur; series tell them by when they are green (`phenology.py`), SPOT images by what
rows look like. Hedges between fields are background, some pixels are void.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.phenology import (
    cloud_cover,
    greenness,
    optical_series,
    radar_series,
)
from domainssl.errors import require
from domainssl.io.series.pastis import SPOT_FOLDER, VOID

__all__ = ["FOLDS", "KINDS", "PER_FOLD", "SAMPLES", "SIDE", "Patches", "build", "sample_root"]

FOLDS, PER_FOLD, SIDE = 5, 10, 32
KINDS = (2, 3, 5, 7)  # soft winter wheat, corn, winter rapeseed, sunflower
_SEED = 20261107
_SPOT_PX = 10  # SPOT pixels per pixel of the series
_START = np.datetime64("2018-09-15")
# how rows stand out in red and in green and blue
_SENSE = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)
Array = np.ndarray[Any, Any]
Rng = np.random.Generator


@dataclass(frozen=True)
class Patches:
    """Which patches a sample has.

    Attributes:
        version: A new one makes caches write the sample anew.
        first: Number of the first one.
        folds: Fold of each.
        spot: Whether there are SPOT images.
    """

    version: str
    first: int
    folds: tuple[int, ...]
    spot: bool


SAMPLES = {
    "pastis": Patches("3", 0, tuple(range(1, FOLDS + 1)) * PER_FOLD, spot=True),
    "crops": Patches("1", FOLDS * PER_FOLD, (1, 2, 3) * 27 + (4,) * 12 + (5,) * 3, spot=False),
}


def sample_root(name: str = "pastis") -> Path:
    """Return the folder of a sample of `SAMPLES`, made on first use in seconds."""
    what = "PASTIS sample" if name == "pastis" else f"PASTIS sample ({name})"
    return made_once(name, SAMPLES[name].version, what, partial(build, patches=SAMPLES[name]))


def build(folder: Path, patches: Patches = SAMPLES["pastis"]) -> None:
    """Write a sample into an empty folder; the same values every time."""
    names = ["DATA_S2", "DATA_S1A", "DATA_S1D", "ANNOTATIONS"]
    for name in [*names, SPOT_FOLDER] if patches.spot else names:
        (folder / name).mkdir(parents=True)
    numbers = range(patches.first, patches.first + len(patches.folds))
    with ThreadPoolExecutor(2) as pool:
        features = list(pool.map(partial(_patch, folder, patches.spot), numbers, patches.folds))
    table = {
        "type": "FeatureCollection",
        "crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::2154"}},
        "features": features,
    }
    (folder / "metadata.geojson").write_text(json.dumps(table))


def _patch(folder: Path, has_spot: bool, number: int, fold: int) -> dict[str, Any]:
    """Write the files of a patch and return its feature."""
    rng = np.random.default_rng([_SEED, number])
    name = str(10_000 + number)
    fields, kind_of = _fields(rng)
    kinds = kind_of[fields]  # (32, 32) position in KINDS
    target = np.array(KINDS)[kinds]
    hedge = (fields != np.roll(fields, 1, 0)) & (rng.random((SIDE, SIDE)) < 0.7)
    target[hedge] = 0
    target[rng.random((SIDE, SIDE)) < 0.01] = VOID
    annotation = np.stack([target, fields + 1, fields + 1]).astype(np.uint8)
    np.save(folder / "ANNOTATIONS" / f"TARGET_{name}.npy", annotation)
    properties: dict[str, Any] = {"ID_PATCH": int(name), "Fold": fold}
    properties |= _series(folder, name, rng, fields, kinds, hedge)
    if has_spot:
        _write_spot(folder / SPOT_FOLDER / f"SPOT6_RVB_1M00_2019_{name}.tif", rng, fields, kinds)
    x, y = 500_000.0 + 320 * number, 6_500_000.0
    ring = [[x, y], [x + 320, y], [x + 320, y - 320], [x, y - 320], [x, y]]
    return {
        "type": "Feature",
        "id": name,
        "properties": properties,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
    }


def _fields(rng: Rng) -> tuple[Array, Array]:
    """Return the number of the field of each pixel, (32, 32), and the kind of each field."""
    count = 5
    seeds = rng.uniform(0, SIDE, (count, 2))
    y, x = np.mgrid[:SIDE, :SIDE]
    distance = (y[..., None] - seeds[:, 0]) ** 2 + (x[..., None] - seeds[:, 1]) ** 2
    return distance.argmin(-1), rng.permutation(np.arange(count) % len(KINDS))


def _series(
    folder: Path, name: str, rng: Rng, fields: Array, kinds: Array, hedge: Array
) -> dict[str, dict[str, int]]:
    """Write the three series and return their dates."""
    shift = rng.normal(0, 5)
    base = rng.uniform(0.0, 0.25, fields.max() + 1)[fields]
    swing = rng.uniform(0.5, 0.75, fields.max() + 1)[fields]
    swing[hedge] *= 0.3
    swing *= np.clip(0.8 + 0.25 * rng.normal(size=(SIDE, SIDE)), 0.2, 1)  # growth is patchy

    def green(dates: Array) -> Array:
        day_of_year = (dates - dates.astype("datetime64[Y]")).astype(int) + 1
        curves = np.stack([greenness(k, day_of_year, shift) for k in range(len(KINDS))])
        return np.asarray(base + swing * curves.T[:, kinds])  # (T, kinds) -> (T, 32, 32)

    level = rng.normal(-10, 1)
    dates = {}
    for sensor, count in (("S2", 22), ("S1A", 14), ("S1D", 14)):
        count -= int(rng.integers(0, 4))
        offsets = np.linspace(3, 361, count) + rng.integers(-3, 4, count)
        days = _START + offsets.astype(np.int64).astype("timedelta64[D]")
        if sensor == "S2":
            cloud = cloud_cover(rng, count, SIDE, SIDE, 0.06)
            values = optical_series(rng, green(days), cloud).astype(np.int16)
        else:
            both = radar_series(rng, green(days), level)
            values = np.concatenate([both, both[:, :1] - both[:, 1:]], 1)  # VV, VH, VV - VH
        np.save(folder / f"DATA_{sensor}" / f"{sensor}_{name}.npy", values)
        stamps = [int(str(day).replace("-", "")) for day in days]
        dates[f"dates-{sensor}"] = {str(i): stamp for i, stamp in enumerate(stamps)}
    return dates


def _write_spot(path: Path, rng: Rng, fields: Array, kinds: Array) -> None:
    """Write red, green, blue of 1 m, uint8 (3, 320, 320)."""
    rasterio = require("rasterio", "geo")
    size = SIDE * _SPOT_PX
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angles = rng.uniform(0, np.pi, fields.max() + 1)
    spacing = rng.uniform(5.0, 9.0)
    fine = fields.repeat(_SPOT_PX, 0).repeat(_SPOT_PX, 1)
    phase = x * np.cos(angles)[fine] + y * np.sin(angles)[fine]
    rows = (np.cos(2 * np.pi * phase / spacing) - 0.5).clip(0)  # few pixels rise
    rows = (rows - rows.mean()) / rows.std()
    sense = _SENSE[kinds.repeat(_SPOT_PX, 0).repeat(_SPOT_PX, 1)][..., [0, 1, 1]]
    tone = rng.normal(0, 15, (fields.max() + 1, 3))[fine]
    values = 120 + tone + 14 * sense * rows[..., None] + rng.normal(0, 4, (size, size, 3))
    values = np.clip(np.round(values / 8) * 8, 1, 255).astype(np.uint8).transpose(2, 0, 1)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=size,
        height=size,
        count=3,
        dtype="uint8",
        crs="EPSG:2154",
        transform=rasterio.Affine(1, 0, 500_000, 0, -1, 6_500_000),
        compress="deflate",
    ) as file:
        file.write(values)
