"""Write SSL4EO-S12 v1.1 files: the names, metadata, chunks and codec of the published ones.

Used by the embedded sample, by tests, and by whoever wants to bring data of their own into the
layout the DataModule reads.
"""

from __future__ import annotations

import io
import json
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.errors import require
from domainssl.io.ssl4eo.facts import CLOUD_CLASSES, product

__all__ = ["TileTable", "write_release_a", "write_release_b"]

Array = np.ndarray[Any, Any]
_TIME = {"units": "nanoseconds since 1970-01-01", "calendar": "proleptic_gregorian"}


@dataclass(kw_only=True)
class TileTable:
    """What a file says about its n locations besides the pixels.

    Attributes:
        ids: Zero-padded location ids.
        times: Acquisition times, datetime64 (n, T).
        file_ids: Product names, n lists of T.
        lat, lon: Centres, WGS84, (n,).
        crs: EPSG codes, (n,).
        x0, y0: Outer corner of the first pixel, (n,).
    """

    ids: Sequence[str]
    times: Array
    file_ids: Sequence[Sequence[str]]
    lat: Array
    lon: Array
    crs: Array
    x0: Array
    y0: Array


def write_release_a(
    path: str | Path,
    name: str,
    values: Array,
    tiles: TileTable,
    cloud_mask: Array | None = None,
    spacing_m: float = 10.0,
) -> None:
    """Write one release-A file.

    Args:
        path: Ends with `.zarr.zip`.
        name: Product, e.g. `S2L2A`.
        values: Stored values, i.e. S2 digital numbers with the +1000 left in, (n, T, C, Y, X).
        tiles: Ids, times and places.
        cloud_mask: Classes 0..6, uint8 (n, T, Y, X), for S2 products.
        spacing_m: Pixel spacing.
    """
    _, dates, _, rows, columns = values.shape
    x = tiles.x0[:, None] + spacing_m * (np.arange(columns) + 0.5)
    y = tiles.y0[:, None] - spacing_m * (np.arange(rows) + 0.5)
    sample_ids = [[f"{key}_{t}" for t in range(dates)] for key in tiles.ids]
    arrays: dict[str, tuple[Array, str]] = {
        "bands": (values, "sample time band y x"),
        "band": (np.array(_stored_names(name), _band_dtype(name)), "band"),
        "sample": (np.array(tiles.ids, "<U7"), "sample"),
        "time": (np.arange(dates, dtype="<i8"), "time"),
        "x": (np.arange(columns, dtype="<i8"), "x"),
        "y": (np.arange(rows, dtype="<i8"), "y"),
        "x_": (x.astype("<f8"), "sample x"),
        "y_": (y.astype("<f8"), "sample y"),
        "crs": (tiles.crs.astype("<i8"), "sample"),
        "center_lat": (tiles.lat.astype("<f8"), "sample"),
        "center_lon": (tiles.lon.astype("<f8"), "sample"),
        "time_": (tiles.times.astype("datetime64[ns]").astype("<i8"), "sample time"),
        "file_id": (np.array(tiles.file_ids, _file_dtype(name)), "sample time"),
        "sample_id": (np.array(sample_ids, "<U9"), "sample time"),
    }
    if cloud_mask is not None:
        arrays["cloud_mask"] = (cloud_mask.astype(np.uint8), "sample time y x")
    _write_group(str(path), arrays)


def write_release_b(
    path: str | Path,
    name: str,
    values: Array,
    tiles: TileTable,
    keys: Sequence[str],
    cloud_mask: Array | None = None,
    spacing_m: float = 10.0,
) -> None:
    """Write one tar of release B or of TerraMesh; `keys` name the members.

    Values of release B carry no +1000, those of TerraMesh may; its locations have one date. Other
    arguments as for `write_release_a`.
    """
    _, _, _, rows, columns = values.shape
    with tarfile.open(path, "w") as tar:
        for i, key in enumerate(keys):
            arrays: dict[str, tuple[Array, str]] = {
                "bands": (values[i], "time band y x"),
                "band": (np.array(_stored_names(name), _band_dtype(name)), "band"),
                "time": (tiles.times[i].astype("datetime64[ns]").astype("<i8"), "time"),
                "x": (tiles.x0[i] + spacing_m * (np.arange(columns) + 0.5), "x"),
                "y": (tiles.y0[i] - spacing_m * (np.arange(rows) + 0.5), "y"),
                "file_id": (np.array(tiles.file_ids[i], _file_dtype(name)), "time"),
                "center_lat": (np.asarray(tiles.lat[i], "<f8"), ""),
                "center_lon": (np.asarray(tiles.lon[i], "<f8"), ""),
                "crs": (np.asarray(tiles.crs[i], "<i8"), ""),
                "sample": (np.asarray(tiles.ids[i], "<U7"), ""),
                "spatial_ref": (np.asarray(0, "<i8"), ""),
            }
            if cloud_mask is not None:
                arrays["cloud_mask"] = (cloud_mask[i].astype(np.uint8), "time y x")
            data = _packed(arrays)
            info = tarfile.TarInfo(f"{key}.zarr.zip")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _packed(arrays: dict[str, tuple[Array, str]]) -> bytes:
    """Return a small group of zarr format 2 as a zip, which the library takes 50 times as long for.

    Dates are chunks of their own in `bands` and `cloud_mask`, other arrays are one chunk.
    """
    codec = require("numcodecs", "geo").Blosc(cname="lz4", clevel=5, shuffle=1)
    texts: dict[str, Any] = {".zgroup": {"zarr_format": 2}, ".zattrs": {}}
    chunks: dict[str, bytes] = {}
    for name, (data, dims) in arrays.items():
        split = name in ("bands", "cloud_mask")
        shape = [1, *data.shape[1:]] if split else list(data.shape)
        texts[f"{name}/.zarray"] = {
            "zarr_format": 2, "shape": list(data.shape), "chunks": shape, "order": "C",
            "dtype": data.dtype.str, "compressor": codec.get_config() if data.ndim else None,
            "filters": None, "fill_value": None,
        }  # fmt: skip
        texts[f"{name}/.zattrs"] = _attributes(name, dims, is_index=False)
        for at, part in enumerate(data if split else [data]):
            key = ".".join(["0"] * data.ndim) or "0"
            raw = np.ascontiguousarray(part)
            packed = bytes(codec.encode(raw)) if data.ndim else raw.tobytes()
            chunks[f"{name}/{at}{key[1:]}"] = packed
    texts[".zmetadata"] = {"zarr_consolidated_format": 1, "metadata": dict(texts)}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for key, text in texts.items():
            file.writestr(key, json.dumps(text))
        for key, packed in chunks.items():
            file.writestr(key, packed)
    return out.getvalue()


def _attributes(name: str, dims: str, *, is_index: bool) -> dict[str, Any]:
    """Return the attributes of an array; `is_index` where `time` counts dates."""
    found: dict[str, Any] = {"_ARRAY_DIMENSIONS": dims.split()}
    if name == "cloud_mask":
        found["cloud_classes"] = list(CLOUD_CLASSES)
    if name == "time_" or (name == "time" and not is_index):
        found |= _TIME
    return found


def _write_group(path: str, arrays: dict[str, tuple[Array, str]]) -> None:
    zarr = require("zarr", "geo")
    numcodecs = require("numcodecs", "geo")
    from zarr.storage import ZipStore

    codec = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=1)
    with warnings.catch_warnings():
        # consolidating writes the group's metadata again; zip keeps both, readers take the last
        warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
        warnings.filterwarnings("ignore", ".*", category=zarr.errors.ZarrUserWarning)
        store = ZipStore(path, mode="w")
        group = zarr.create_group(store, zarr_format=2)
        for name, (data, dims) in arrays.items():
            chunks = list(data.shape)
            if name in ("bands", "cloud_mask"):
                chunks[1] = 1
            if name == "bands" and not np.isfortran(data):
                data = np.ascontiguousarray(data)
            array = group.create_array(
                name,
                shape=data.shape,
                dtype=data.dtype,
                chunks=tuple(chunks) or "auto",
                compressors=codec if data.ndim else None,
                filters=None,
                fill_value=None,
                attributes=_attributes(name, dims, is_index=True),
            )
            array[...] = data
        zarr.consolidate_metadata(store, zarr_format=2)
        store.close()


def _stored_names(name: str) -> list[str]:
    bands = product(name).bands
    return [band.lower() for band in bands] if name.startswith("S1") else list(bands)


def _band_dtype(name: str) -> str:
    return f"<U{max(map(len, product(name).bands))}"


def _file_dtype(name: str) -> str:
    return "<U67" if name.startswith("S1") else "<U38"
