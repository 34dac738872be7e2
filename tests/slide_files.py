"""Slides whose content says where it is: squares of 64 pixels, red the column, green the row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
CELL = 64


def squares(width: int, height: int, cell: int = CELL) -> Array:
    """(H, W, 3) uint8."""
    x, y = np.meshgrid(np.arange(width) // cell, np.arange(height) // cell)
    parity = np.where((x + y) % 2, 200, 120)
    return np.stack([40 + 9 * x, 50 + 11 * y, parity], -1).astype(np.uint8)


def shrink(array: Array, factor: int) -> Array:
    """Area average by a whole factor, cut to whole pixels."""
    h, w = array.shape[0] // factor * factor, array.shape[1] // factor * factor
    parts = array[:h, :w].astype(float).reshape(h // factor, factor, w // factor, factor, -1)
    return np.rint(parts.mean((1, 3))).astype(array.dtype)


def write_tiff(
    path: Path,
    levels: Sequence[Array],
    *,
    mpp: tuple[float, float] | None = (0.5, 0.5),
    unit: str = "CENTIMETER",
    tile: int = 64,
    **more: Any,
) -> Path:
    """Write a tiled TIFF, one page per level."""
    import tifffile

    scale = {"CENTIMETER": 10_000.0, "INCH": 25_400.0, "NONE": 10_000.0}[unit]
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"compression": "zlib", "photometric": "rgb", **more}
    with tifffile.TiffWriter(path) as writer:
        for n, level in enumerate(levels):
            factor = levels[0].shape[1] / level.shape[1]
            dots = None if mpp is None else (scale / mpp[0] / factor, scale / mpp[1] / factor)
            writer.write(
                level,
                tile=(tile, tile),
                metadata=None,
                software=False,
                subfiletype=1 if n else 0,
                resolution=dots,
                resolutionunit=None if mpp is None else unit,
                **options,
            )
    return path


def write_ome(
    path: Path, base: Array, axes: str, factors: Sequence[int] = (2, 4), **more: Any
) -> Path:
    """Write an OME-TIFF with its levels in SubIFDs."""
    import tifffile

    def down(factor: int) -> Array:
        if axes == "YXS":
            return shrink(base, factor)
        return np.ascontiguousarray(np.moveaxis(shrink(np.moveaxis(base, 0, -1), factor), -1, 0))

    metadata = {
        "axes": axes,
        "PhysicalSizeX": 0.25,
        "PhysicalSizeY": 0.25,
        **more.pop("metadata", {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"tile": (64, 64), "compression": "zlib", **more}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(base, subifds=len(factors), metadata=metadata, **options)
        for factor in factors:
            writer.write(down(factor), subfiletype=1, **options)
    return path


def damage_tile(path: Path, x: int, y: int) -> None:
    """Overwrite the stored tile of the first page that holds a pixel."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        columns = -(-page.imagewidth // page.tilewidth)
        index = y // page.tilelength * columns + x // page.tilewidth
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\xff" * count)
