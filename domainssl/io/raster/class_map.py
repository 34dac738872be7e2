"""Write maps of classes or numbers as cloud-optimised GeoTIFF."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from domainssl.errors import require
from domainssl.files import PART, write_whole
from domainssl.io.raster.gdal import writing

__all__ = ["MapPlace", "write_class_map", "write_number_map"]

Array = np.ndarray[Any, Any]
_ROWS = 512  # written at once, and side of a tile


@dataclass(frozen=True, kw_only=True)
class MapPlace:
    """Where the pixels of a map lie, north up.

    Attributes:
        crs: `EPSG:n` or WKT.
        corner: Outer corner of the first pixel, x and y.
        step: Side of a pixel.
    """

    crs: str
    corner: tuple[float, float]
    step: float


def write_class_map(
    path: Path,
    labels: Array,
    place: MapPlace,
    *,
    nodata: int,
    classes: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
) -> None:
    """Write a map with overviews of the most frequent class; complete before it has its name.

    Args:
        path: `.tif`.
        labels: Number of the class of every pixel, uint8 or int16 (H, W), north up; may lie in a
            file, as it is read in strips.
        place: Where it lies.
        nodata: Label of pixels without a class.
        classes: Names by number; they become tags `CLASS_0`, `CLASS_1`, ..., and the categories
            of the band in `<path>.aux.xml`, where GDAL keeps them and QGIS takes its legend from.
        colours: Red, green and blue by number; the colour table of maps in bytes.
    """
    tags = {f"CLASS_{number}": name for number, name in enumerate(classes)}
    names = "".join(f"      <Category>{escape(name)}</Category>\n" for name in classes)
    beside = (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{names}    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    )
    write_whole(path.with_name(f"{path.name}.aux.xml"), beside.encode())
    table = {number: (*colour, 255) for number, colour in enumerate(colours)}
    table[nodata] = (0, 0, 0, 0)
    palette = table if labels.dtype == np.uint8 else {}
    _write(
        path, labels[None], place, nodata=nodata, bands=["class"], tags=tags, overviews="MODE",
        palette=palette,
    )  # fmt: skip


def write_number_map(path: Path, numbers: Array, place: MapPlace, targets: Sequence[str]) -> None:
    """Write a map of a float32 band per target, with its name, nodata NaN and averaged overviews.

    Args:
        path: `.tif`.
        numbers: (K, H, W), NaN where nothing is known; may lie in a file.
        place: Where it lies.
        targets: Names of the bands.
    """
    _write(path, numbers, place, nodata=float("nan"), bands=targets, tags={}, overviews="AVERAGE")


def _write(
    path: Path,
    values: Array,
    place: MapPlace,
    *,
    nodata: float,
    bands: Sequence[str],
    tags: Mapping[str, str],
    overviews: str,
    palette: Mapping[int, tuple[int, ...]] | None = None,
) -> None:
    rasterio = require("rasterio", "geo")
    shutil = require("rasterio.shutil", "geo")
    count, height, width = values.shape
    plain, done = (path.with_name(f".{path.name}{PART}{os.getpid()}{end}") for end in (".0", ".1"))
    transform = rasterio.transform.from_origin(*place.corner, place.step, place.step)
    facts = {
        "driver": "GTiff", "height": height, "width": width, "count": count,
        "dtype": values.dtype.name, "crs": rasterio.crs.CRS.from_string(place.crs),
        "nodata": nodata, "transform": transform, "bigtiff": "if_safer",
    }  # fmt: skip
    try:
        with writing(path):
            with rasterio.open(plain, "w", **facts) as file:
                file.descriptions = tuple(bands)
                if tags:
                    file.update_tags(1, **tags)
                if palette:
                    file.write_colormap(1, palette)
                for row in range(0, height, _ROWS):
                    part = np.asarray(values[:, row : row + _ROWS])
                    window = rasterio.windows.Window(0, row, width, part.shape[1])
                    file.write(part, window=window)
            shutil.copy(
                plain, done, driver="COG", compress="DEFLATE", blocksize=_ROWS,
                overview_resampling=overviews, bigtiff="IF_SAFER",
            )  # fmt: skip
        os.replace(done, path)
    finally:
        for left in (plain, done):
            left.unlink(missing_ok=True)
