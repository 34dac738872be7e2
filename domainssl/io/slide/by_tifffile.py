"""Slides through tifffile: OME-TIFF, levels in SubIFDs, colours as planes, untiled TIFF."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from domainssl.errors import DataError, parsing, require
from domainssl.files import open_regular
from domainssl.io.slide.colors import to_rgb
from domainssl.io.slide.facts import Region, Stored, level_factors
from domainssl.io.slide.tiff_pages import Layout, Level, decoded, layout_of

__all__ = ["TiffPyramid", "opened"]

Array = np.ndarray[Any, Any]
_KEPT = 2**26  # bytes of decoded tiles


def opened(path: str) -> Any:
    """Open a TIFF file; other files that its metadata name are never opened.

    Raises:
        DataError: It is no TIFF file.
    """
    tifffile = require("tifffile", "pathology")
    with parsing(f"{path}: the header", also=(tifffile.TiffFileError,)):
        open_regular(path).close()
        return tifffile.TiffFile(path, _multifile=False)


class TiffPyramid:
    """An open slide.

    Args:
        path: The file.

    Raises:
        DataError: It cannot be opened, or its layout is not that of a slide.
    """

    def __init__(self, path: str) -> None:
        require("imagecodecs", "pathology")
        tifffile = require("tifffile", "pathology")
        self._path = path
        self._tiff = opened(path)
        self._cache: OrderedDict[tuple[int, int, int], Array | None] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        try:
            with parsing(f"{path}: the header", also=(tifffile.TiffFileError,)):
                self._layout: Layout = layout_of(self._tiff, path)
                self._size = os.path.getsize(path)
        except BaseException:
            self.close()
            raise
        self.stored: Stored = self._layout.stored
        self._factors = self.stored.factors or level_factors(self.stored.levels)

    def close(self) -> None:
        """Give the file free."""
        tiff, self._tiff = getattr(self, "_tiff", None), None
        if tiff is not None:
            tiff.close()

    def __del__(self) -> None:
        self.close()

    @property
    def orientation(self) -> int:
        """How the stored rows and columns are to be shown, 1 to 8 of TIFF; never applied here."""
        return self._layout.orientation

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        """Read a box that lies inside a level, in pixels of the level.

        Stored tiles that cannot be read are not valid and named, those that were never written
        are not valid.
        """
        values, seen, damaged = self.numbers(level, x, y, width, height)
        if self.stored.is_rgb:
            values, opaque = to_rgb(
                values[..., : values.shape[-1] - self._layout.unknown],
                self._layout.coding,
                what=self._path,
                bits=self._layout.bits,
                palette=self._layout.palette,
                is_premultiplied=self._layout.is_premultiplied,
            )
            seen &= opaque
        return Region(
            values=values,
            valid=None if seen.all() else seen,
            origin=(float(x), float(y)),
            damaged=damaged,
        )

    def numbers(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> tuple[Array, Array, tuple[tuple[int, int, str], ...]]:
        """Read a box as it is stored.

        Returns:
            Values (H, W, C); True where they were read, (H, W) bool; damaged tiles as in `Region`.
        """
        layout = self._layout.levels[level]
        values = np.zeros((height, width, layout.channels), layout.dtype)
        seen = np.ones((height, width), bool)
        damaged: dict[tuple[int, int], str] = {}
        tile_width, tile_height = layout.tile
        for row in range(y // tile_height, -(-(y + height) // tile_height)):
            for column in range(x // tile_width, -(-(x + width) // tile_width)):
                left, upper = column * tile_width, row * tile_height
                box = (
                    slice(max(upper, y) - y, min(upper + tile_height, y + height) - y),
                    slice(max(left, x) - x, min(left + tile_width, x + width) - x),
                )
                for start, tile, reason in self._planes(level, row * layout.columns + column):
                    if tile is None:
                        seen[box] = False
                        if reason:
                            fx, fy = self._factors[level]
                            damaged[round(left * fx), round(upper * fy)] = reason
                        continue
                    part = tile[max(y - upper, 0) :, max(x - left, 0) :]
                    part = part[: box[0].stop - box[0].start, : box[1].stop - box[1].start]
                    values[box[0], box[1], start : start + part.shape[-1]] = part
        named = tuple((*place, reason) for place, reason in damaged.items())
        return values, seen, named

    def _planes(self, level: int, index: int) -> Iterator[tuple[int, Array | None, str]]:
        """Yield first channel, pixels (H, W, C) or None, and what is wrong with them."""
        layout = self._layout.levels[level]
        for plane in range(len(layout.planes)):
            start = plane * layout.contiguous
            key = (level, plane, index)
            with self._lock:
                if key in self._cache:
                    self._cache.move_to_end(key)
                    yield start, self._cache[key], ""
                    continue
            try:
                tile = self._decode(level, plane, index)
            except DataError as error:
                yield start, None, str(error)
                continue
            with self._lock:
                if key not in self._cache:
                    self._cache[key] = tile
                    self._bytes += 0 if tile is None else tile.nbytes
                while self._bytes > _KEPT and len(self._cache) > 1:
                    old = self._cache.popitem(last=False)[1]
                    self._bytes -= 0 if old is None else old.nbytes
            yield start, tile, ""

    def _decode(self, level: int, plane: int, index: int) -> Array | None:
        layout = self._layout.levels[level]
        page, first = layout.planes[plane]
        stored, piece = divmod(index, layout.pieces or 1)
        offset = page.dataoffsets[first + stored]
        count = page.databytecounts[first + stored]
        if not offset or not count:  # never written
            return None
        if layout.pieces:
            return self._rows(layout, offset, count, piece)
        return decoded(page, self._read(offset, count), first + index)

    def _read(self, offset: int, count: int) -> bytes:
        if offset + count > self._size:
            raise DataError(f"lies beyond the end of the file, at byte {offset}")
        with self._lock:
            handle = self._tiff.filehandle
            handle.seek(offset)
            found: bytes = handle.read(count)
        return found

    def _rows(self, layout: Level, offset: int, count: int, piece: int) -> Array:
        """Return some rows of a strip without compression, (H, W, C).

        Raises:
            DataError: The file ends before them.
        """
        width, height = layout.tile
        row = width * layout.contiguous * layout.dtype.itemsize
        begin = piece * height * row
        data = self._read(offset + begin, min(height * row, max(0, count - begin) // row * row))
        values = np.frombuffer(data, layout.dtype.newbyteorder(self._tiff.byteorder))
        return values.reshape(-1, width, layout.contiguous).astype(layout.dtype, copy=False)
