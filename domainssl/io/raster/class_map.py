"""Write maps of classes as cloud-optimised GeoTIFF."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.errors import require
from domainssl.files import PART
from domainssl.io.raster.gdal import reading

__all__ = ["write_class_map"]

Array = np.ndarray[Any, Any]
_ROWS = 512  # written at once, and side of a tile


def write_class_map(
    path: Path,
    labels: Array,
    *,
    crs: str,
    corner: tuple[float, float],
    step: float,
    nodata: int,
    classes: Sequence[str],
) -> None:
    """Write a map with overviews of the most frequent class; complete before it has its name.

    Args:
        path: `.tif`.
        labels: Number of the class of every pixel, uint8 or int16 (H, W), north up; may lie in a
            file, as it is read in strips.
        crs: `EPSG:n` or WKT.
        corner: Outer corner of the first pixel, x and y.
        step: Side of a pixel.
        nodata: Label of pixels without a class.
        classes: Names by number; they become tags `CLASS_0`, `CLASS_1`, ...
    """
    rasterio = require("rasterio", "geo")
    shutil = require("rasterio.shutil", "geo")
    height, width = labels.shape
    plain, done = (path.with_name(f".{path.name}{PART}{os.getpid()}{end}") for end in (".0", ".1"))
    facts = {
        "driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": labels.dtype.name,
        "crs": rasterio.crs.CRS.from_string(crs), "nodata": nodata,
        "transform": rasterio.transform.from_origin(*corner, step, step), "bigtiff": "if_safer",
    }  # fmt: skip
    try:
        with reading(str(path)):
            with rasterio.open(plain, "w", **facts) as file:
                file.set_band_description(1, "class")
                file.update_tags(1, **{f"CLASS_{i}": name for i, name in enumerate(classes)})
                for row in range(0, height, _ROWS):
                    part = np.asarray(labels[row : row + _ROWS])
                    window = rasterio.windows.Window(0, row, width, len(part))
                    file.write(part, 1, window=window)
            shutil.copy(
                plain, done, driver="COG", compress="DEFLATE", blocksize=_ROWS,
                overview_resampling="MODE", bigtiff="IF_SAFER",
            )  # fmt: skip
        os.replace(done, path)
    finally:
        for left in (plain, done):
            left.unlink(missing_ok=True)
