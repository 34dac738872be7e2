"""The embedded sample of cubes: four small UTM sites as Zarr v3, sharded, as people store them.

Each site is 256 x 640 pixels of 10 m, a patchwork of 40 square fields. `s2/<site>.zarr` holds one
array (time, band, y, x) of numbers with scale, offset and fill value, and `scl`; `s1/<site>.zarr`
one array per polarisation in scaled dB; `labels/<site>.zarr` the crop of every pixel. Dates are
irregular and differ between the sensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.cubes_scene import CROPS, FIELD, draw_field, optical, radar
from domainssl.errors import require
from domainssl.sensors import L2A_BANDS

__all__ = [
    "DATES", "SITES", "VERSION", "build", "new_store", "put_array", "sample_root",
    "stored_numbers", "write_layers",
]  # fmt: skip

VERSION = "4"
DATES = 6
SITES = {"fields_a": 32632, "fields_b": 32633, "fields_c": 32631, "fields_d": 32736}
_DOWN, _ACROSS = 4, 10  # fields
_CHUNK = 128
_SEED = 20260404
_STEP_DN = 64  # coarse numbers: less to store
Array = np.ndarray[Any, Any]


def sample_root() -> Path:
    """Return the folder of the sample, made on first use in seconds."""
    return made_once("cubes", VERSION, "sample of Sentinel cubes", build)


def build(folder: Path) -> None:
    """Write the sample into an empty folder; the same pixels every time."""
    for number, (site, epsg) in enumerate(SITES.items()):
        _write_site(folder, number, site, epsg)


def _write_site(folder: Path, number: int, site: str, epsg: int) -> None:
    rng = np.random.default_rng([_SEED, number])
    s2_times, s1_times = _times(rng)
    count = _DOWN * _ACROSS
    labels = rng.permutation(np.arange(count) % len(CROPS))
    height, width = _DOWN * FIELD, _ACROSS * FIELD
    s2 = np.empty((DATES, len(L2A_BANDS), height, width), np.uint16)
    s1 = np.empty((DATES, 2, height, width), np.int16)
    crops = np.empty((height, width), np.uint8)

    def fill(at: int) -> None:
        own = np.random.default_rng([_SEED, number, at])
        field = draw_field(own, int(labels[at]))
        row, column = (FIELD * v for v in divmod(at, _ACROSS))
        part = (slice(row, row + FIELD), slice(column, column + FIELD))
        s2[(..., *part)] = stored_numbers(optical(own, field, _months(s2_times)))
        # steps of 0.5 dB, stored in hundredths
        s1[(..., *part)] = np.round(radar(own, field, _months(s1_times)) * 2) * 50
        crops[part] = field.label

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(count)))
    scl = _clouds(rng, s2)
    corner = (300_000.0 + 40_000 * number, 5_200_000.0 - 10_000 * number)
    write_layers(
        folder, site, s2=s2, scl=scl, s2_times=s2_times, s1=s1, s1_times=s1_times, classes=crops,
        names=CROPS, epsg=epsg, corner=corner,
    )  # fmt: skip


def write_layers(
    folder: Path,
    site: str,
    *,
    s2: Array,
    scl: Array,
    s2_times: Array,
    s1: Array,
    s1_times: Array,
    classes: Array,
    names: Sequence[str],
    epsg: int,
    corner: tuple[float, float],
) -> None:
    """Write both sensors and the map of classes of one site.

    Args:
        folder: Of all sites.
        site: Name of the site.
        s2: Stored numbers, uint16 (T, 12, Y, X).
        scl: Scene classes, uint8 (T, Y, X).
        s2_times: Times of `s2`, (T,).
        s1: Hundredths of dB, int16 (T, 2, Y, X).
        s1_times: Times of `s1`, (T,).
        classes: Class of each pixel, uint8 (Y, X).
        names: Of the classes.
        epsg: Reference system.
        corner: Left and top edge in it.
    """
    _write_optical(folder / "s2" / f"{site}.zarr", s2, scl, s2_times, epsg, corner)
    _write_radar(folder / "s1" / f"{site}.zarr", s1, s1_times, epsg, corner)
    _write_labels(folder / "labels" / f"{site}.zarr", classes, names, epsg, corner)


def _times(rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the times of both sensors: about every two months, some days apart."""
    day = np.datetime64("2021-01-08T10:26:11") + np.timedelta64(int(rng.integers(0, 20)), "D")
    steps = np.arange(DATES) * 60 + rng.integers(-12, 13, DATES)
    s2 = day + np.sort(steps).astype("timedelta64[D]")
    gap = rng.integers(-5, 6, DATES).astype("timedelta64[D]") + np.timedelta64(5 * 3600, "s")
    return s2.astype("datetime64[s]"), np.sort(s2 + gap).astype("datetime64[s]")


def _months(times: Array) -> Array:
    return (times - np.datetime64("2021-01-01")).astype(np.float64) / (86_400 * 30.44)


def stored_numbers(reflectance: Array) -> Array:
    """Return stored numbers: 1000 is reflectance 0, 0 is no data."""
    return (np.round(reflectance * (10_000 / _STEP_DN)) * _STEP_DN + 1000).astype(np.uint16)


def _clouds(rng: np.random.Generator, s2: Array) -> Array:
    """Lay a cloud and a strip without data over some dates; return the scene classes."""
    scl = np.full((len(s2), *s2.shape[2:]), 4, np.uint8)
    rows, columns = np.mgrid[: s2.shape[2], : s2.shape[3]]
    cloudy = int(rng.integers(0, len(s2)))
    middle, radius = (rng.integers(40, s2.shape[2] - 40), rng.integers(40, 600)), 26
    inside = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < radius**2
    s2[cloudy][:, inside] = 8000
    scl[cloudy][inside] = 9
    strip = (cloudy + 3) % len(s2)
    s2[strip][:, :, : int(rng.integers(4, 12))] = 0
    scl[strip][(s2[strip] == 0).any(0)] = 0
    return scl


def _write_optical(
    path: Path, values: Array, scl: Array, times: Array, epsg: int, corner: tuple[float, float]
) -> None:
    group = new_store(path, epsg, corner, values.shape[-2:], times)
    names = group.create_array("band", shape=(len(L2A_BANDS),), dtype=str, dimension_names=["band"])
    names[:] = np.array(L2A_BANDS)
    attrs = {"scale_factor": 1e-4, "add_offset": -0.1, "_FillValue": 0, "units": "1",
             "long_name": "surface reflectance", "grid_mapping": "spatial_ref"}  # fmt: skip
    put_array(group, "reflectance", values, ("time", "band", "y", "x"), attrs)
    put_array(group, "scl", scl, ("time", "y", "x"), {"grid_mapping": "spatial_ref"})


def _write_radar(
    path: Path, values: Array, times: Array, epsg: int, corner: tuple[float, float]
) -> None:
    group = new_store(path, epsg, corner, values.shape[-2:], times)
    attrs = {"scale_factor": 0.01, "_FillValue": -32768, "units": "dB",
             "grid_mapping": "spatial_ref"}  # fmt: skip
    for at, name in enumerate(("vv", "vh")):
        put_array(group, name, values[:, at], ("time", "y", "x"), attrs)


def _write_labels(
    path: Path, crops: Array, names: Sequence[str], epsg: int, corner: tuple[float, float]
) -> None:
    group = new_store(path, epsg, corner, crops.shape, None)
    attrs = {"flag_values": list(range(len(names))), "flag_meanings": " ".join(names),
             "grid_mapping": "spatial_ref"}  # fmt: skip
    put_array(group, "label", crops, ("y", "x"), attrs)


def new_store(
    path: Path,
    epsg: int,
    corner: tuple[float, float],
    size: Sequence[int],
    times: Array | None,
    step: float = 10.0,
) -> Any:
    """Make a store with its coordinates and reference system, as xarray and rioxarray do.

    Args:
        path: Of the store.
        epsg: Reference system.
        corner: Left and top edge in it.
        size: Rows and columns.
        times: Times, (T,); None for none.
        step: Side of a pixel.
    """
    zarr = require("zarr", "geo")
    pyproj = require("pyproj", "geo")
    path.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    left, top = corner
    for name, values in (
        ("y", top - step * (np.arange(size[0]) + 0.5)),
        ("x", left + step * (np.arange(size[1]) + 0.5)),
    ):
        array = group.create_array(
            name, shape=values.shape, dtype="float64", dimension_names=[name]
        )
        array[:] = values
    if times is not None:
        array = group.create_array(
            "time", shape=times.shape, dtype="int64", dimension_names=["time"],
            attributes={"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"},
        )  # fmt: skip
        array[:] = times.astype(np.int64)
    group.create_array(
        "spatial_ref", shape=(), dtype="int64",
        attributes={"crs_wkt": pyproj.CRS.from_epsg(epsg).to_wkt(),
                    "GeoTransform": f"{left} {step} 0.0 {top} 0.0 {-step}"},
    )  # fmt: skip
    return group


def put_array(
    group: Any, name: str, values: Array, dims: Sequence[str], attrs: Mapping[str, Any]
) -> None:
    """Write one array: chunks of 128 x 128 pixels of one date at most, a shard per date."""
    codecs = require("zarr.codecs", "geo")
    inner = tuple(
        {"y": min(_CHUNK, n), "x": min(_CHUNK, n), "band": n}.get(d, 1)
        for d, n in zip(dims, values.shape)
    )
    shard = tuple(1 if d == "time" else n for d, n in zip(dims, values.shape))
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=inner,
        shards=shard,
        dimension_names=list(dims),
        compressors=codecs.BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
        fill_value=0,
        attributes=dict(attrs),
    )
    array[...] = values
