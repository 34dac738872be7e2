"""The embedded sample of relief: locations of TerraMesh whose class is to which side land rises.

768 training and 128 held-out locations of 40 px, as S2RGB and DEM: about 10 MB. Land is hilly and
rises to the east, north, west or south. Heights show that, and colours do, because valleys are
green and heights are bare. Heights of a place are drawn from one distribution, and its altitude,
its relief, its light and small things on the ground, others for each sensor, are the same in all
classes, so that no histogram tells them. `labels/<split>.csv` holds the class of each location.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.fields import slope, smooth
from domainssl.datamodules.samples.ssl4eo import centres
from domainssl.io.ssl4eo.write import TileTable, write_release_b

__all__ = ["ASPECTS", "LOCATIONS", "VERSION", "Land", "build", "draw_land", "sample_root"]

VERSION = "1"
LOCATIONS = {"train": 768, "val": 128}
ASPECTS = ("rises_east", "rises_north", "rises_west", "rises_south")
_SIDE = 40
_PER_SHARD = 128
_SEED = 20261128
_ZONE = 32632
_HILLS_PX = (14.0, 30.0)  # least and largest distance of hills
_RISE = 0.2  # share of the rise in the variance of heights
_MIDDLE_M, _ALTITUDE_M, _RELIEF_M, _SMALL_M = 650.0, 150.0, 150.0, 75.0
# red, green and blue of bare ground and of leaves
_BARE = np.array([160, 130, 95], np.float32)[:, None, None]
_LEAF = np.array([60, 70, 55], np.float32)[:, None, None]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Land:
    """What both sensors see of one location.

    Attributes:
        label: To which side it rises, position in `ASPECTS`.
        heights: In metres, int16 (1, Y, X).
        colours: Red, green, blue, uint8 (3, Y, X).
    """

    label: int
    heights: Array
    colours: Array


def sample_root() -> Path:
    """Return the folder of the sample, made on first use in seconds."""
    return made_once("relief", VERSION, "sample of relief", build)


def build(folder: Path) -> None:
    """Write the sample into an empty folder; the same pixels every time."""
    (folder / "labels").mkdir()
    for split, total in LOCATIONS.items():
        labels = np.random.default_rng([_SEED, len(split)]).permutation(total) % len(ASPECTS)
        keys = [f"majortom_{split}_{number:07d}" for number in range(total)]
        for shard, low in enumerate(range(0, total, _PER_SHARD), 1):
            numbers = range(low, min(low + _PER_SHARD, total))
            lands = [draw_land(split, int(labels[number]), number) for number in numbers]
            name = f"majortom_shard_{shard:06d}.tar"
            _write_shard(folder / split, name, lands, [keys[number] for number in numbers])
        with open(folder / "labels" / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            rows = [(key, at, ASPECTS[at]) for key, at in zip(keys, labels.tolist(), strict=True)]
            csv.writer(file).writerows([("sample", "label", "name"), *rows])


def draw_land(split: str, label: int, number: int) -> Land:
    """Draw a location of a split that rises to the side `label`."""
    rng = np.random.default_rng([_SEED, len(split), number])
    angle = 2 * np.pi * label / len(ASPECTS) + rng.normal(0, 0.2)
    distance = float(np.exp(rng.uniform(*np.log(_HILLS_PX))))
    relief = slope(rng, _SIDE, distance, angle, _RISE) * np.exp(rng.uniform(-0.3, 0.3))
    green = (0.5 - 0.2 * relief + 0.14 * smooth(rng, _SIDE, 3)).clip(0, 1)
    colours = (_BARE * (1 - green) + _LEAF * green) * np.exp(rng.normal(0, 0.06))
    colours += 3 * rng.standard_normal(colours.shape)
    heights = _MIDDLE_M + _ALTITUDE_M * rng.normal() + _RELIEF_M * relief
    heights += _SMALL_M * smooth(rng, _SIDE, 3)
    return Land(
        label,
        heights.round().astype("<i2")[None],
        colours.round().clip(1, 255).astype(np.uint8),
    )


def _write_shard(folder: Path, name: str, lands: Sequence[Land], keys: Sequence[str]) -> None:
    numbers = np.array([int(key[-7:]) for key in keys])
    rows, columns = np.divmod(numbers, 32)
    crs = np.full(len(keys), _ZONE)
    x0, y0 = 300_000.0 + 10 * _SIDE * columns, 5_300_000.0 - 10 * _SIDE * rows
    if folder.name == "val":
        y0 -= 100_000.0
    lat, lon = centres(crs, x0 + 5.0 * _SIDE, y0 - 5.0 * _SIDE)
    day = np.datetime64("2021-06-01T10:30:00", "ns")
    for product, stored in (
        ("S2RGB", [land.colours for land in lands]),
        ("DEM", [land.heights for land in lands]),
    ):
        table = TileTable(
            ids=[key[-7:] for key in keys],
            times=np.full((len(keys), 1), day),
            file_ids=[["20210601T103000_20210601T103007_T32TPS"]] * len(keys),
            lat=lat, lon=lon, crs=crs, x0=x0, y0=y0,
        )  # fmt: skip
        (folder / product).mkdir(parents=True, exist_ok=True)
        write_release_b(folder / product / name, product, np.stack(stored)[:, None], table, keys)
