"""The embedded sample of weather: fields of the cube sample with heights and a year's weather.

Four sites of 64 fields, 32 x 32 pixels of 10 m each, as Zarr v3 below `s1`, `s2`, `dem`, `era5` and
`labels`. All series have the same six dates, one in two months; some fields lack one of
Sentinel-2. Weather has pixels of a field's size. What grows and how it shows itself is that of the
cube sample, and the rest of a field's year follows from its height and its rain: seasons are later
and the air is colder the higher a field lies, and its ground is as wet as its rain makes it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.cubes import new_store, put_array, stored_numbers
from domainssl.datamodules.samples.cubes_scene import (
    CROPS,
    Field,
    draw_field,
    optical,
    radar,
    smooth,
)
from domainssl.sensors import L2A_BANDS

__all__ = ["DATES", "FIELD", "SITES", "VERSION", "build", "sample_root"]

VERSION = "1"
DATES = 6
FIELD = 32  # pixels along the side
SITES = {"valley_a": 32632, "valley_b": 32633, "valley_c": 32631, "valley_d": 32635}
_ALONG = 8  # fields along each side of a site
_SEED = 20261127
# half a month from the height of a crop's season, whichever it is: each is as green over the year
_TIMES = np.array([f"2021-{month:02d}-01T10:30:00" for month in range(2, 13, 2)], "datetime64[s]")
_MONTHS = np.arange(1.0, 12, 2)
_MIDDLE_M, _SPREAD_M = 700.0, 350.0  # heights of fields
_DELAY = 0.5  # months per deviation of height
_LAPSE_K = 0.0065  # per metre
Array = np.ndarray[Any, Any]
Rng = np.random.Generator


def sample_root() -> Path:
    """Return the folder of the sample, made on first use in seconds."""
    return made_once("weather", VERSION, "sample of cubes with heights and weather", build)


def build(folder: Path) -> None:
    """Write the sample into an empty folder; the same pixels every time."""
    for number, (site, epsg) in enumerate(SITES.items()):
        _write_site(folder, number, site, epsg)


def _write_site(folder: Path, number: int, site: str, epsg: int) -> None:
    side = _ALONG * FIELD
    s2 = np.empty((DATES, len(L2A_BANDS), side, side), np.uint16)
    s1 = np.empty((DATES, 2, side, side), np.int16)
    ground = np.empty((2, side, side), np.float32)
    weather = np.empty((DATES, 2, _ALONG, _ALONG), np.float32)
    crops = np.empty((side, side), np.uint8)
    labels = np.random.default_rng([_SEED, number]).permutation(_ALONG**2) % len(CROPS)
    for at, label in enumerate(labels):
        rng = np.random.default_rng([_SEED, number, at])
        row, column = divmod(at, _ALONG)
        part = (
            slice(row * FIELD, (row + 1) * FIELD), slice(column * FIELD, (column + 1) * FIELD)
        )  # fmt: skip
        field, height = _field(rng, int(label))
        s2[(..., *part)] = stored_numbers(optical(rng, field, _MONTHS))
        if rng.random() < 0.2:
            s2[(int(rng.integers(DATES)), slice(None), *part)] = 0
        # steps of 0.5 dB, stored in hundredths
        s1[(..., *part)] = np.round(radar(rng, field, _MONTHS) * 2) * 50
        ground[(..., *part)] = _relief(rng, height)
        weather[:, :, row, column] = _weather(rng, height, field.wetness)
        crops[part] = label
    corner = (400_000.0 + 10_000 * number, 5_200_000.0 - 10_000 * number)
    _write(folder, site, epsg, corner, s1=s1, s2=s2, ground=ground, weather=weather, crops=crops)


def _field(rng: Rng, label: int) -> tuple[Field, float]:
    """Return a field and its height in metres."""
    place = draw_field(rng, label)
    deviation = float(rng.normal())
    part = (slice(FIELD), slice(FIELD))
    field = replace(
        place,
        objects=place.objects[(..., *part)],
        roughness=place.roughness[part],
        level=float(rng.uniform(0.4, 0.6)),
        swing=float(rng.uniform(0.25, 0.35)),
        delay=_DELAY * deviation + float(rng.normal(0, 0.1)),
    )
    return field, _MIDDLE_M + _SPREAD_M * deviation


def _relief(rng: Rng, height: float) -> Array:
    """Return heights in metres and slopes in degrees, (2, Y, X)."""
    relief = height + rng.uniform(5, 25) * smooth(rng, 14)[:FIELD, :FIELD]
    rise = np.hypot(*np.gradient(relief, 10.0))
    return np.stack([relief, np.degrees(np.arctan(rise))]).astype(np.float32)


def _weather(rng: Rng, height: float, wetness: float) -> Array:
    """Return temperatures in K and monthly rain in metres, (T, 2)."""
    warm = 292.0 - _LAPSE_K * height + 9 * np.cos(2 * np.pi * (_MONTHS - 6.7) / 12)
    rain = 0.14 * wetness * np.exp(rng.normal(0, 0.15, DATES))
    return np.stack([warm + rng.normal(0, 0.7, DATES), rain], 1).astype(np.float32)


def _write(
    folder: Path, site: str, epsg: int, corner: tuple[float, float], *, s1: Array, s2: Array,
    ground: Array, weather: Array, crops: Array,
) -> None:  # fmt: skip
    def store(layer: str, size: tuple[int, ...], *, dated: bool = True, step: float = 10.0) -> Any:
        path = folder / layer / f"{site}.zarr"
        return new_store(path, epsg, corner, size, _TIMES if dated else None, step)

    mapped = {"grid_mapping": "spatial_ref"}
    optical_store = store("s2", s2.shape[-2:])
    names = optical_store.create_array(
        "band", shape=(len(L2A_BANDS),), dtype=str, dimension_names=["band"]
    )
    names[:] = np.array(L2A_BANDS)
    attrs = {"scale_factor": 1e-4, "add_offset": -0.1, "_FillValue": 0, "units": "1",
             "long_name": "surface reflectance", **mapped}  # fmt: skip
    put_array(optical_store, "reflectance", s2, ("time", "band", "y", "x"), attrs)
    radar_store = store("s1", s1.shape[-2:])
    attrs = {"scale_factor": 0.01, "_FillValue": -32768, "units": "dB", **mapped}
    for at, name in enumerate(("vv", "vh")):
        put_array(radar_store, name, s1[:, at], ("time", "y", "x"), attrs)
    heights = store("dem", ground.shape[-2:], dated=False)
    for at, (name, unit) in enumerate((("elevation", "m"), ("slope", "degree"))):
        put_array(heights, name, ground[at], ("y", "x"), {"units": unit, **mapped})
    sky = store("era5", weather.shape[-2:], step=10.0 * FIELD)
    for at, (name, unit) in enumerate((("temperature_2m", "K"), ("total_precipitation_sum", "m"))):
        put_array(sky, name, weather[:, at], ("time", "y", "x"), {"units": unit, **mapped})
    classes = store("labels", crops.shape, dated=False)
    attrs = {"flag_values": list(range(len(CROPS))), "flag_meanings": " ".join(CROPS), **mapped}
    put_array(classes, "label", crops, ("y", "x"), attrs)
