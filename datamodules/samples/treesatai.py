"""The embedded sample of TreeSatAI Time Series: 96 training and 96 held-out tiles in its layout.

Four of the fifteen genera occur. Aerial images tell them by which bands crowns change together,
which no histogram of a band tells; series by when they are green (`phenology.py`); how dense a
stand is, place by place, both see. Series have 27 to 37 dates instead of some hundred. As in the
real files, passes are stored twice where slices overlap, radar has zeros and NaN, and some tiles
were never seen on descending passes.
"""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
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
from domainssl.io.series.treesatai import GENERA

__all__ = ["KINDS", "TILES", "VERSION", "build", "sample_root"]

VERSION = "7"
TILES = {"train": 96, "val": 96}
KINDS = ("Fagus", "Quercus", "Larix", "Betula")
_SEED = 20261004
_SIDE, _CELLS, _CELL_PX, _MARGIN = 304, 6, 50, 2
# how crowns of each kind change near infrared, green, blue, red
_SENSE = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, -1, -1], [1, -1, 1, 1]], np.float32)
_LEVEL = np.array([150, 92, 85, 80], np.float32)  # near infrared, green, blue, red
_CONTRAST = np.array([26, 20, 18, 20], np.float32)
_STEP = 10  # of grey levels: less to store
Array = np.ndarray[Any, Any]
Rng = np.random.Generator


def sample_root() -> Path:
    """Return the folder of the sample, made on first use in seconds."""
    return made_once("treesatai-ts", VERSION, "TreeSatAI sample", build)


def build(folder: Path) -> None:
    """Write the sample into an empty folder; the same values every time."""
    (folder / "aerial").mkdir()
    (folder / "sentinel-ts").mkdir()
    for split, total in TILES.items():
        rng = np.random.default_rng([_SEED, len(split)])
        kinds = rng.permutation(np.arange(total) % len(KINDS))
        with ThreadPoolExecutor(2) as pool:
            rows = list(pool.map(partial(_tile, folder, split, kinds), range(total)))
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["aerial_name", "sen_name", "aerial_date", *GENERA])
            writer.writerows(rows)


def _tile(folder: Path, split: str, kinds: Array, number: int) -> list[Any]:
    """Write the files of a tile and return its row of the table."""
    rng = np.random.default_rng([_SEED, len(split), number])
    kind = int(kinds[number])
    cover = _cover(rng, kind)
    inner = cover[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    cells = inner.reshape(_CELLS, _CELL_PX, _CELLS, _CELL_PX)
    shares = np.stack([(cells == k).mean((1, 3)) for k in range(len(KINDS))])  # (kinds, 6, 6)
    density = np.clip(0.7 + 0.1 * rng.normal() + 0.3 * rng.normal(size=(_CELLS, _CELLS)), 0.1, 1)
    year = int(rng.integers(2017, 2021))
    stem = f"{KINDS[kind]}_spec._{number % 7 + 1}_{number + (0 if split == 'train' else 20_000)}"
    stem += "_WEFL_NLF"
    _write_aerial(folder / "aerial" / f"{stem}.tif", _aerial(rng, cover, density), rng)
    _write_series(folder / "sentinel-ts" / f"{stem}_{year}.h5", rng, year, shares, density)
    by_name = dict(zip(KINDS, shares.mean((1, 2)), strict=True))
    date = f"{year}{int(rng.integers(6, 9)):02d}{int(rng.integers(1, 29)):02d}"
    values = [f"{by_name.get(name, 0.0):.5f}" for name in GENERA]
    return [f"{stem}.tif", f"{stem}_{year}.h5", date, *values]


def _smooth(rng: Rng, gain: Array) -> Array:
    """Return a unit-variance random field whose spectrum follows `gain`, (304, 304)."""
    white = np.fft.rfft2(rng.standard_normal((_SIDE, _SIDE), np.float32))
    field = np.fft.irfft2(white * gain, (_SIDE, _SIDE)).astype(np.float32)
    return (field - field.mean()) / max(float(field.std()), 1e-6)


def _frequency() -> Array:
    rows, columns = np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE)[None]
    return np.sqrt(rows**2 + columns**2).astype(np.float32)


_FREQUENCY = _frequency()


def _cover(rng: Rng, kind: int) -> Array:
    """Return the kind of each aerial pixel; `kind` covers most of the tile."""
    other = int(rng.choice([k for k in range(len(KINDS)) if k != kind]))
    field = _smooth(rng, np.exp(-((_FREQUENCY * 60) ** 2)))
    edge = np.quantile(field, rng.uniform(0.75, 1.0))
    return np.where(field <= edge, kind, other)


def _aerial(rng: Rng, cover: Array, density: Array) -> Array:
    """Return near infrared, green, blue, red, uint8 (4, 304, 304).

    Undergrowth is finer than crowns and stands out as it happens to: only the texture of the right
    size tells kinds apart.
    """
    crowns = _bumps(rng, rng.uniform(16.0, 26.0))
    low = 0.8 * _bumps(rng, rng.uniform(6.0, 9.0))
    thick = np.pad(density.repeat(_CELL_PX, 0).repeat(_CELL_PX, 1), _MARGIN, mode="edge")
    other = rng.choice([-1.0, 1.0], 3)[[0, 1, 2, 2], None, None]
    stand = crowns * (0.4 + 0.6 * thick) * _SENSE.T[:, cover] + low * other
    contrast = (_CONTRAST * np.exp(rng.normal(0, 0.15)))[:, None, None]
    tone = rng.normal(0, 14, 2)[[0, 1, 1, 1]]
    x = (_LEVEL + tone)[:, None, None] + contrast * stand
    x += 60 * np.array([1, -0.3, -0.3, -0.5])[:, None, None] * (thick - 0.7)
    x += rng.normal(0, 3, (4, _SIDE, _SIDE))
    return np.clip(np.round(x / _STEP) * _STEP, 1, 255).astype(np.uint8)


def _bumps(rng: Rng, spacing: float) -> Array:
    """Return what is brighter or darker every `spacing` pixels or so, unit variance, (304, 304).

    Bright and dark have one distribution, so that neither tells which way a kind stands out.
    """
    ring = np.exp(-(((_FREQUENCY - 1 / spacing) / (0.3 / spacing)) ** 2))
    field = _smooth(rng, ring)
    bumps = np.sign(field) * (np.abs(field) - 0.6).clip(0, 0.8) ** 0.5
    return np.asarray((bumps - bumps.mean()) / bumps.std())


def _write_aerial(path: Path, values: Array, rng: Rng) -> None:
    rasterio = require("rasterio", "geo")
    x0 = float(rng.integers(400_000, 600_000)) - 0.4
    y0 = float(rng.integers(5_700_000, 5_900_000)) + 0.4
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=_SIDE,
        height=_SIDE,
        count=4,
        dtype="uint8",
        crs="EPSG:25832",
        transform=rasterio.Affine(0.2, 0, x0, 0, -0.2, y0),
        compress="deflate",
    ) as file:
        file.write(values)


def _write_series(path: Path, rng: Rng, year: int, shares: Array, density: Array) -> None:
    """Write the HDF5 file of a tile.

    Args:
        path: File.
        rng: Source of all draws.
        year: Year of the series.
        shares: Share of each kind, (kinds, 6, 6).
        density: Share of the ground that leaves can cover, (6, 6).
    """
    h5py = require("h5py", "geo")
    # what stands on a cell is drawn there: 96 tiles alone would soon be known by heart
    cells = (_CELLS, _CELLS)
    shift, base = rng.normal(0, 5), rng.uniform(0, 0.3, cells)
    swing = rng.uniform(0.5, 0.75, cells)

    def green(days: Array) -> Array:
        curves = np.stack([greenness(k, days, shift) for k in range(len(KINDS))])  # (kinds, T)
        return np.asarray(base + swing * np.einsum("kt,khw->thw", curves, shares) * density)

    with h5py.File(path, "w") as file:
        days = _days(rng, 3, 10)
        cloud = cloud_cover(rng, len(days), _CELLS, _CELLS)
        snow = np.zeros_like(cloud)
        snow[(days < 50) & (rng.random(len(days)) < 0.1)] = 40
        file["sen-2-data"] = optical_series(rng, green(days), cloud, is_varied=True)
        file["sen-2-masks"] = np.stack([snow, cloud], 1)
        file["sen-2-products"] = _names("S2{}_MSIL2A_{}T104431_N0208_R008_T32UMD", year, days)
        level = rng.normal(-9, 0.4, cells)
        for name, first, hour in (("sen-1-asc", 2, "171656"), ("sen-1-des", 5, "054940")):
            is_missing = name == "sen-1-des" and rng.random() < 0.03
            days = _days(rng, first, 12)[: 0 if is_missing else None]
            power = 10 ** (radar_series(rng, green(days), level + rng.normal(0, 0.2)) / 10)
            _damage(rng, power)
            if name == "sen-1-des" and rng.random() < 0.3:  # every pass in two slices
                days, power = days.repeat(2), power.repeat(2, 0)
            file[f"{name}-data"] = power.astype(np.float32)
            pattern = f"S1{{}}_IW_GRDH_1SDV_{{}}T{hour}_025287_02CC09_1570"
            file[f"{name}-products"] = _names(pattern, year, days)


def _days(rng: Rng, first: int, every: int) -> Array:
    """Return ascending days of the year on which a satellite came by, a few passes left out.

    They hardly differ between tiles, or which days there are would tell tiles apart better than
    what grows there.
    """
    passes = np.arange(first, 366, every)
    return np.sort(rng.choice(passes, len(passes) - int(rng.integers(0, 5)), replace=False))


def _names(pattern: str, year: int, days: Array) -> list[bytes]:
    """Return product names, as they are stored."""
    dates = np.datetime64(f"{year}-01-01") + (days - 1).astype("timedelta64[D]")
    stamps = [str(date).replace("-", "") for date in dates]
    return [pattern.format("AB"[i % 2], stamp).encode() for i, stamp in enumerate(stamps)]


def _damage(rng: Rng, power: Array) -> None:
    """Put the zeros and NaN in that real files have, in place."""
    for value, probability in ((0.0, 0.3), (np.nan, 0.15)):
        if len(power) and rng.random() < probability:
            t, row, column = (int(rng.integers(n)) for n in (len(power), _CELLS, _CELLS))
            power[t, :, row, column] = value
