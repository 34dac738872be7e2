"""Maps of vectors as cloud-optimised GeoTIFF: a band per feature, with its description."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.errors import DataError, require
from domainssl.files import PART
from domainssl.io.raster.gdal import writing
from domainssl.io.raster.geozarr import INT8_NODATA, VectorLayout, VectorStore

__all__ = ["CogWriter"]

Array = np.ndarray[Any, Any]
_BLOCK = 256  # sides of a block; smaller maps have one
_MOST_BANDS = 65_535


class CogWriter:
    """Writes a complete store as COG, without holding more of it than a row of shards."""

    ending = ".tif"

    def __call__(self, store: VectorStore, layout: VectorLayout, target: Path) -> None:
        """Write `target`, and with int8 the scales as `<name>_scale.tif`, complete or not at all.

        Raises:
            StorageError: It cannot be written.
        """
        if layout.dim > _MOST_BANDS:
            raise DataError(f"{target}: {layout.dim} features, TIFF has at most {_MOST_BANDS}.")
        group = store.group
        bands = [f"feature {number}" for number in range(layout.dim)]
        if layout.dtype == "int8":
            beside = target.with_name(f"{target.stem}_scale.tif")
            _write(group["scale"], layout, beside, ["scale"], float("nan"))
        nodata = INT8_NODATA if layout.dtype == "int8" else float("nan")
        _write(group["embedding"], layout, target, bands, nodata)


def _write(stored: Any, layout: VectorLayout, target: Path, bands: list[str], nodata: Any) -> None:
    rasterio, copying = require("rasterio", "geo"), require("rasterio.shutil", "geo")
    height, width = layout.shape
    dtype = "float32" if stored.dtype == np.float16 else str(stored.dtype)  # GDAL < 3.11 has none
    number = uuid.uuid4().hex
    plain, hidden = (
        target.with_name(f".{target.name}{PART}{number}{end}") for end in (".tiled", "")
    )
    profile = {
        "driver": "GTiff", "width": width, "height": height, "count": len(bands), "dtype": dtype,
        "nodata": nodata, "crs": layout.crs, "transform": rasterio.Affine(*layout.transform),
        "tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "BIGTIFF": "IF_SAFER",
        "interleave": "pixel",
    }  # fmt: skip
    try:
        with writing(target):
            with rasterio.open(plain, "w", **profile) as file:
                for top in range(0, height, layout.shard[0]):
                    rows = min(layout.shard[0], height - top)
                    values = np.asarray(stored[..., top : top + rows, :])
                    values = values.reshape(len(bands), rows, width).astype(dtype)
                    file.write(values, window=rasterio.windows.Window(0, top, width, rows))
                file.descriptions = tuple(bands)
            with rasterio.Env(GDAL_CACHEMAX=256):
                copying.copy(
                    plain, hidden, driver="COG", BLOCKSIZE=_BLOCK, COMPRESS="ZSTD",
                    OVERVIEWS="NONE", BIGTIFF="IF_SAFER",
                )  # fmt: skip
        os.replace(hidden, target)
    finally:
        for path in (plain, hidden):
            with suppress(OSError):
                path.unlink()
