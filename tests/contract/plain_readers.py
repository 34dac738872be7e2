"""Values of one held-out item, read with other people's libraries and none of our readers.

Every DataModule has a function here. It gets the source and the batch of its first held-out item,
and returns the values that the batch must hold, by modality; NaN where it does not say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Expected = dict[str, Array]

__all__ = ["READERS"]


def _middle(values: Array, size: tuple[int, ...]) -> Array:
    """Return the middle of the last axes."""
    at = [(room - side) // 2 for room, side in zip(values.shape[-len(size) :], size, strict=True)]
    return values[(..., *(slice(b, b + s) for b, s in zip(at, size, strict=True)))]


def _days(times: Any) -> Array:
    return np.asarray(times).astype("datetime64[D]").astype(np.int64)


def _by_day(stored: Array, days: Array, batch: Any, name: str) -> Array:
    """Return stored dates (T, C, H, W) in the batch's order; NaN for days stored twice."""
    wanted = np.asarray(batch[f"{name}.dates"])[0]
    out = np.full((len(wanted), *stored.shape[1:]), np.nan)
    for at, day in enumerate(wanted):
        places = np.flatnonzero(days == day)
        assert len(places), f"{name}: day {day} is not in the file"
        if len(places) == 1:
            out[at] = stored[places[0]]
    return out


def _ssl4eo(source: Any, batch: Any) -> Expected:
    import xarray
    import zarr

    group, found = source.catalogue.groups[0], {}
    for name in source.catalogue.products:
        store = zarr.storage.ZipStore(group.files[name], mode="r")
        file = xarray.open_zarr(store, consolidated=False, mask_and_scale=False)
        stored = file["bands"][0].values.astype(np.float64)  # (T, C, Y, X)
        if name == "s2":
            stored = np.where(stored == 0, np.nan, stored - 1000)
        size = tuple(batch[name].shape[-2:])
        found[name] = _by_day(_middle(stored, size), _days(file["time_"][0]), batch, name)
        store.close()
    return found


def _terramesh(source: Any, batch: Any) -> Expected:
    import io
    import tarfile
    import zipfile

    import numcodecs

    group, found = source.catalogue.groups[0], {}
    for name in source.catalogue.products:
        with tarfile.open(group.files[name]) as tar:
            member = tar.extractfile(f"{batch['id'][0]}.zarr.zip")
            assert member is not None
            file = zipfile.ZipFile(io.BytesIO(member.read()))
        facts = json.loads(file.read("bands/.zarray"))
        raw = numcodecs.get_codec(facts["compressor"]).decode(file.read("bands/0.0.0.0"))
        stored = np.frombuffer(raw, facts["dtype"]).reshape(facts["chunks"])[0].astype(np.float64)
        if name == "s2":
            has_offset = int(batch["id"][0][-7:]) % 2  # as the sample is made
            stored = np.where(stored == 0, np.nan, stored - 1000 * has_offset)
        found[name] = _middle(stored, tuple(batch[name].shape[-2:]))
    return found


def _cubes(source: Any, batch: Any) -> Expected:
    import xarray

    site = source.sites[source.blocks[0].site]
    found = {}
    for name, layer in source.layers.items():
        root = Path(site.layers[name].files[0].path)
        file = xarray.open_zarr(root, consolidated=False)
        if name == "s1":
            stored = np.stack([file[band.lower()].values for band in layer.bands], 1)
        else:
            stored = file["reflectance"].sel(band=list(layer.bands)).values * 1e4
        day = int(batch[f"{name}.dates"][0])
        place = int(np.flatnonzero(_days(file["time"]) == day)[0])
        corner, (height, width) = batch[f"{name}.geo"][0], batch[name].shape[-2:]
        column = int(np.abs(file["x"].values - (corner["c"] + 5)).argmin())
        row = int(np.abs(file["y"].values - (corner["f"] - 5)).argmin())
        found[name] = stored[place, :, row : row + height, column : column + width]
    return found


def _treesatai(source: Any, batch: Any) -> Expected:
    import h5py
    import rasterio

    root, stem = Path(source.tiles.catalogue.root), batch["id"][0]
    found = {}
    with rasterio.open(root / "aerial" / f"{stem}.tif") as file:
        inner = file.read()[:, 2:-2, 2:-2]  # 304 px are 60.8 m
    cells = batch["aerial"].shape[-1] // 50  # the window lies on the grid of 6 x 6 series pixels
    at = slice((6 - cells) // 2 * 50, ((6 - cells) // 2 + cells) * 50)
    found["aerial"] = inner[:, at, at].astype(np.float64)
    path = next((root / "sentinel-ts").glob(f"{stem}_*.h5"))
    with h5py.File(path) as file:
        for name, key in (("s2", "sen-2"), ("s1_asc", "sen-1-asc"), ("s1_des", "sen-1-des")):
            products = [text.decode() for text in file[f"{key}-products"][:]]
            at = 2 if name == "s2" else 4
            stamps = [p.split("_")[at][:8] for p in products]
            days = _days([f"{s[:4]}-{s[4:6]}-{s[6:]}" for s in stamps])
            stored = file[f"{key}-data"][:].astype(np.float64)
            if name != "s2":
                with np.errstate(divide="ignore", invalid="ignore"):
                    stored = 10 * np.log10(stored[:, :2])
            if np.asarray(batch[f"{name}.present"])[0]:
                cut = _middle(stored, tuple(batch[name].shape[-2:]))
                found[name] = _by_day(cut, days, batch, name)
    return found


def _pastis(source: Any, batch: Any) -> Expected:
    root, number = Path(source.tiles.catalogue.root), batch["id"][0].split("_")[0]
    features = json.loads((root / "metadata.geojson").read_text())["features"]
    facts = next(f["properties"] for f in features if str(f["properties"]["ID_PATCH"]) == number)
    found = {}
    for name, folder, many in (("s2", "S2", 10), ("s1_asc", "S1A", 2), ("s1_des", "S1D", 2)):
        stored = np.load(root / f"DATA_{folder}" / f"{folder}_{number}.npy")[:, :many]
        dates = facts[f"dates-{folder}"]
        texts = [str(dates[place]) for place in sorted(dates, key=int)]
        days = _days([f"{t[:4]}-{t[4:6]}-{t[6:]}" for t in texts])
        cut = stored.astype(np.float64)[..., :2, :2]  # the first of the windows side by side
        found[name] = _by_day(cut, days, batch, name)
    return found


def _volumes(source: Any, batch: Any) -> Expected:
    import nibabel

    found = {}
    for name, path in source.exams[0].scans.items():
        image = nibabel.load(path)
        stored = np.asarray(image.dataobj, np.float64)
        there = np.linalg.inv(image.affine) @ np.array(batch[f"{name}.affine"][0])
        size = batch[name].shape[2:]
        index = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
        voxel = index @ there[:3, :3].T + there[:3, 3]
        places = voxel.round().astype(int)
        inside = (places >= 0).all(-1) & (places < stored.shape).all(-1)
        assert np.abs(voxel - places)[inside].max() < 1e-3, "this recipe resamples"
        values = np.full(size, np.nan)
        values[inside] = stored[tuple(places[inside].T)]
        found[name] = values[None]
    return found


def _tiles(source: Any, batch: Any) -> Expected:
    from PIL import Image

    found = {}
    for name, paths in source.sets[0].pictures.items():
        at = source.sets[0].names.index(batch["id"][0])
        stored = np.asarray(Image.open(paths[at]).convert("RGB")).transpose(2, 0, 1)
        found[name] = _middle(stored, tuple(batch[name].shape[-2:])).astype(np.float64)
    return found


def _dataset(source: Any, batch: Any) -> Expected:
    import h5py

    with h5py.File(Path(source.dataset.root) / "validation.h5") as file:
        s1 = file["sen1"][0].astype(np.float64)[..., [5, 4]]
        s2 = file["sen2"][0].astype(np.float64)
    return {
        "s1": 10 * np.log10(s1).transpose(2, 0, 1),
        "s2": 1e4 * s2.transpose(2, 0, 1),
    }


def _slides(source: Any, batch: Any) -> Expected:
    import h5py

    with h5py.File(source.slides[0].file.path) as file:
        features, coords = file["features"][:], file["coords"][:]
    features = features.reshape(-1, features.shape[-1])
    geo = batch["tile_features.geo"][0]
    corners = np.asarray(batch["tile_features.coords"][0])[:, ::-1] * geo["step"] + geo["origin"]
    values = np.full((len(corners), features.shape[-1]), np.nan)
    for feature, corner in zip(features, coords, strict=True):
        values[(corners == corner).all(1)] = feature
    return {"tile_features": values}


READERS: dict[str, Callable[[Any, Any], Expected]] = {
    "DatasetDataModule": _dataset,
    "PastisDataModule": _pastis,
    "SSL4EOS12DataModule": _ssl4eo,
    "SentinelCubeDataModule": _cubes,
    "SlideFeatureDataModule": _slides,
    "TerraMeshDataModule": _terramesh,
    "TileDataModule": _tiles,
    "TreeSatAIDataModule": _treesatai,
    "VolumeDataModule": _volumes,
}
