"""Feature bags of our own: a Zarr v3 group per slide.

`features` (N, D) in chunks of 1024 rows, with int8 `scale` float32 (N,) beside it (a value is
feature x scale; NaN of tiles whose features are not finite), `coords` int32 (N, 2) as x, y at level
0, and, where the size of a tile is known, `grid` int32 (N, 2) as row, column; everything else in
the attributes.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.errors import DataError, parsing, require, unwritable
from domainssl.files import PART
from domainssl.io.raster.geozarr import quantize
from domainssl.io.raster.zarr3 import open_v3, v3_members
from domainssl.io.slide.bag import Bag, cells_of
from domainssl.io.storage.archives import FolderStore

__all__ = ["FORMAT", "read_zarr", "stored_type", "write_zarr"]

FORMAT = "domainssl feature bag 1"
_ROWS = 1024  # of a chunk
_LARGEST = 1000.0  # beyond which float16 loses what matters
_FACTS = (
    "patch_size", "patch_size_level0", "overlap_level0", "mpp_um", "level0_mpp_um", "encoder",
)  # fmt: skip


def stored_type(features: Any) -> str:
    """Return `float16`, or `float32` where a feature is beyond 1000 or not finite."""
    fits = features.size == 0 or bool(np.abs(features).max() <= _LARGEST)
    return "float16" if fits else "float32"


def write_zarr(root: Path, bag: Bag, dtype: str | None = None) -> Path:
    """Write `<root>/<slide>.zarr`, complete or not at all.

    Args:
        root: Folder of the bags.
        bag: What is written.
        dtype: Of the features; None takes `stored_type`.

    Raises:
        StorageError: It cannot be written.
    """
    zarr = require("zarr", "pathology")
    target = root / f"{bag.slide}.zarr"
    hidden = root / f".{target.name}{PART}{uuid.uuid4().hex}"
    if dtype == "int8":
        arrays = _quantized(bag.features)
    else:
        arrays = {"features": bag.features.astype(dtype or stored_type(bag.features))}
    if bag.coords is not None:
        arrays["coords"] = bag.coords.astype(np.int32)
        if bag.patch_size_level0 is not None and len(bag):
            cells = cells_of(bag)
            arrays["grid"] = np.stack([cells.rows, cells.columns], 1).astype(np.int32)
    facts = {name: getattr(bag, name) for name in _FACTS}
    facts |= {
        "format": FORMAT,
        "slide_id": bag.slide,
        "encoder_dim": bag.dim,
        "aspect": bag.aspect,
        "level0_size": list(bag.level0_size) if bag.level0_size else None,
        "source": dict(bag.attributes),
    }
    try:
        root.mkdir(parents=True, exist_ok=True)
        group = zarr.open_group(str(hidden), mode="w", zarr_format=3, attributes=facts)
        for name, array in arrays.items():
            chunks = (max(1, min(_ROWS, len(array))), *(max(1, n) for n in array.shape[1:]))
            made = group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks)
            if array.size:
                made[...] = array
        if target.exists():
            shutil.rmtree(target)
        os.rename(hidden, target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return target


def _quantized(features: Any) -> dict[str, Any]:
    """Return int8 features and the scale of each tile, an error of at most half a scale."""
    is_finite = np.isfinite(features).all(1, keepdims=True)
    stored, scale = quantize(np.where(is_finite, features, np.nan).T)
    return {"features": np.ascontiguousarray(stored.T), "scale": scale}


def read_zarr(path: Path) -> Bag:
    """Read a group that `write_zarr` has written.

    Raises:
        DataError: It is damaged or no bag.
    """
    group = open_v3(FolderStore(path), str(path))
    members = v3_members(group, str(path))
    facts: dict[str, Any] = dict(group.attrs)
    if facts.get("format") != FORMAT or "features" not in members:
        raise DataError(
            f"{path}: no feature bag: expected the attribute format {FORMAT!r} and an array "
            f"'features', got {facts.get('format')!r} and {', '.join(sorted(members)) or 'none'}."
        )
    with parsing(f"{path}: the bag"):
        found = members["features"]
        features = np.asarray(found[...], np.float32)
        if "scale" in members:
            scale = np.asarray(members["scale"][...], np.float32)
            if scale.shape != (len(features),):
                raise ValueError(f"scale has the shape {scale.shape}")
            features = features * scale[:, None]
        coords = None
        if "coords" in members:
            coords = np.asarray(members["coords"][...]).astype(np.int64)
            if coords.shape != (len(features), 2):
                raise ValueError(f"coords have the shape {coords.shape}")
        size = facts.get("level0_size")
        known: dict[str, Any] = {name: facts[name] for name in _FACTS}
        return Bag(
            slide=str(facts["slide_id"]),
            features=features.reshape(len(features), -1 if features.size else found.shape[1]),
            coords=coords,
            level0_size=(int(size[0]), int(size[1])) if size else None,
            layout="zarr",
            aspect=float(facts.get("aspect", 1.0)),
            dtype=str(found.dtype),
            path=str(path),
            attributes=dict(facts.get("source") or {}),
            **known,
        )
