"""The embedded sample of change: fields of the cube sample at two dates, and where they changed.

Eight sites of 40 fields, as in `cubes.py`, with two dates a year apart. On a part of each field
something else grows at the second date. Objects are drawn anew for each date, as plants grow anew,
and so are level, gain and haze: pixels differ between the dates everywhere. Only which bands its
objects brighten or darken together tells that another crop grows there. `labels/<site>.zarr` holds
the map: 0 unchanged, 1 changed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.cubes import SITES, stored_numbers, write_layers
from domainssl.datamodules.samples.cubes_scene import (
    CROPS,
    FIELD,
    Field,
    draw_field,
    draw_objects,
    optical,
    radar,
    smooth,
)
from domainssl.sensors import L2A_BANDS

__all__ = ["CHANGES", "VERSION", "build", "sample_root"]

VERSION = "3"
CHANGES = ("unchanged", "changed")
_SITES = 8
_DOWN, _ACROSS = 4, 10  # fields
_SEED = 20261127
_SHARE = (0.25, 0.5)  # of a field that changes
_SPACING_PX = (8.0, 12.0)  # of large objects: each patch of 8 pixels shows some
_LENGTH_PX = 14  # of changed areas
Array = np.ndarray[Any, Any]
Rng = np.random.Generator


def sample_root() -> Path:
    """Return the folder of the sample, made on first use in seconds."""
    return made_once("change", VERSION, "sample of change between two dates", build)


def build(folder: Path) -> None:
    """Write the sample into an empty folder; the same pixels every time."""
    zones = list(SITES.values())
    for number in range(_SITES):
        _write_site(folder, number, f"fields_{'abcdefgh'[number]}", zones[number % len(zones)])


def _write_site(folder: Path, number: int, site: str, epsg: int) -> None:
    start = np.datetime64("2021-06-11T10:26:11") + np.timedelta64(9 * number, "D")
    s2_times = start + np.array([0, 366]).astype("timedelta64[D]")
    s1_times = s2_times + np.timedelta64(29, "h")
    height, width = _DOWN * FIELD, _ACROSS * FIELD
    s2 = np.empty((2, len(L2A_BANDS), height, width), np.uint16)
    s1 = np.empty((2, 2, height, width), np.int16)
    changes = np.empty((height, width), np.uint8)

    def fill(at: int) -> None:
        row, column = (FIELD * v for v in divmod(at, _ACROSS))
        part = (slice(row, row + FIELD), slice(column, column + FIELD))
        changes[part], optical_part, radar_part = _field(np.random.default_rng([_SEED, number, at]))
        s2[(..., *part)] = stored_numbers(optical_part)
        s1[(..., *part)] = np.round(radar_part * 2) * 50  # steps of 0.5 dB, in hundredths

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(_DOWN * _ACROSS)))
    corner = (300_000.0 + 40_000 * number, 5_200_000.0 - 10_000 * number)
    scl = np.full((2, height, width), 4, np.uint8)
    write_layers(
        folder, site, s2=s2, scl=scl, s2_times=s2_times, s1=s1, s1_times=s1_times, classes=changes,
        names=CHANGES, epsg=epsg, corner=corner,
    )  # fmt: skip


def _field(rng: Rng) -> tuple[Array, Array, Array]:
    """Return where a field changed, (Y, X), and both sensors' images of two dates, (2, C, Y, X)."""
    before = int(rng.integers(len(CROPS)))
    after = int(rng.choice([crop for crop in range(len(CROPS)) if crop != before]))
    area = smooth(rng, _LENGTH_PX)
    changed = area > np.quantile(area, 1 - rng.uniform(*_SHARE))
    spacing = rng.uniform(*_SPACING_PX)
    place = draw_field(rng, before)
    months = np.array([5.3])
    images: list[tuple[Array, Array]] = []
    for date in range(2):
        state = replace(
            place,
            kind=before,
            objects=draw_objects(rng, spacing),
            wetness=float(rng.uniform(0.25, 0.75)),
            level=float(rng.uniform(0.3, 0.7)),
        )
        seed = int(rng.integers(2**31))
        first = _images(seed, state, months)
        if date:
            other = _images(seed, replace(state, kind=after), months)
            first = (
                np.where(changed, other[0], first[0]),
                np.where(changed, other[1], first[1]),
            )
        images.append(first)
    return (
        changed.astype(np.uint8),
        np.concatenate([image for image, _ in images]),
        np.concatenate([image for _, image in images]),
    )


def _images(seed: int, field: Field, months: Array) -> tuple[Array, Array]:
    """Return what both sensors see, with the nuisance of `seed`: equal for all kinds of objects."""
    rng = np.random.default_rng(seed)
    return optical(rng, field, months), radar(rng, field, months)
