"""Slides through OpenSlide: regions by level-0 place, and life after a damaged tile."""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from domainssl.errors import DataError, parsing, require
from domainssl.files import read_small
from domainssl.io.slide.facts import CONVERT, Pair, Region, Stored, level_factors
from domainssl.io.slide.tiff_pages import imagej_unit

__all__ = ["OpenSlidePyramid", "is_index", "vendor"]

Array = np.ndarray[Any, Any]
Bounds = tuple[int, int, int, int]

_CENTIMETRE_UM, _INCH_UM = 10_000.0, 25_400.0
_TILE = 256  # where a format names no size
_MOST_TILE_PIXELS = 2**26
_ALPHA = 24 if sys.byteorder == "little" else 0  # its bits in a pixel of RGBA
_MEMBERS = (".mrxs", ".vms", ".vmu")  # whose index names the files with pixels


def is_index(path: str) -> bool:
    """Whether a file is, by its name, the index of a slide whose pixels lie in others beside it."""
    return path.lower().endswith(_MEMBERS)


def vendor(path: str) -> str | None:
    """Return OpenSlide's name of the format, None where it knows none."""
    openslide = require("openslide", "pathology")
    with parsing(f"{path}: the header", also=(openslide.OpenSlideError,)):
        found = openslide.OpenSlide.detect_format(path)
    return None if found is None else str(found)


class OpenSlidePyramid:
    """An open slide.

    Args:
        path: The file.

    Raises:
        DataError: It cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._openslide = require("openslide", "pathology")
        self._path = path
        _check_members(path)
        self._slide = self._opened()
        with parsing(f"{path}: the header", also=(self._openslide.OpenSlideError,)):
            self._downsamples = [float(d) for d in self._slide.level_downsamples]
            self.stored = self._describe()
        self._factors = self.stored.factors or level_factors(self.stored.levels)

    def _opened(self) -> Any:
        with parsing(f"{self._path}: the slide", also=(self._openslide.OpenSlideError,)):
            return self._openslide.OpenSlide(self._path)

    def _reopen(self) -> None:
        self.close()
        self._slide = self._opened()

    def close(self) -> None:
        """Give the file free."""
        slide, self._slide = getattr(self, "_slide", None), None
        if slide is not None:
            slide.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # the library is unloaded then, and frees its slides itself
            self.close()

    def _describe(self) -> Stored:
        properties = dict(self._slide.properties)
        levels = tuple((int(w), int(h)) for w, h in self._slide.level_dimensions)
        self._tiles = [_tile(properties, level) for level in range(len(levels))]
        if max(w * h for w, h in self._tiles) > _MOST_TILE_PIXELS:
            raise DataError(
                f"{self._path}: stored in tiles of {max(self._tiles)} pixels, expected at most "
                f"{_MOST_TILE_PIXELS} per tile. Convert it to a tiled pyramid: {CONVERT}."
            )
        kept = 1  # writers that append a label or a macro image as a level are cut off there
        while kept < len(levels) and _is_smaller(levels[0], levels[kept - 1], levels[kept]):
            kept += 1
        power = _number(properties.get("openslide.objective-power"))
        odd = [f"level {n} of {w} x {h} pixels is left out: it has not the shape of the slide"
               for n, (w, h) in enumerate(levels) if n >= kept]  # fmt: skip
        return Stored(
            path=self._path,
            backend="openslide",
            format=str(properties.get("openslide.vendor", "unknown")),
            levels=levels[:kept],
            stated=tuple(_resolutions(properties)),
            objective_power=power if power and power > 0 else None,
            tile_size=self._tiles[0],
            has_color_profile="openslide.icc-size" in properties,
            warnings=tuple(odd),
        )

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        """Read a box that lies inside a level, in pixels of the level.

        After an error the handle of OpenSlide stays dead, so it is opened again; the box is then
        read in parts, and only stored tiles that cannot be read are not valid.

        Raises:
            DataError: The slide cannot be opened again.
        """
        downsample = self._downsamples[level]
        places = round(x * downsample), round(y * downsample)
        origin = places[0] / downsample, places[1] / downsample
        try:
            values, valid = self._read(level, x, y, width, height)
            return Region(values=values, valid=valid, origin=origin)
        except self._openslide.OpenSlideError as error:
            reason = str(error)
            self._reopen()
        values = np.full((height, width, 3), 255, np.uint8)
        whole = np.zeros((height, width), bool)
        damaged: list[tuple[int, int, str]] = []
        parts = self._halves(level, (x, y, x + width, y + height))
        stack = list(parts)
        if not stack:
            damaged.append(self._named(level, x, y, reason))
        while stack:
            box = stack.pop()
            left, upper, right, lower = box
            inside = np.s_[upper - y : lower - y, left - x : right - x]
            try:
                part, seen = self._read(level, left, upper, right - left, lower - upper)
            except self._openslide.OpenSlideError as error:
                self._reopen()
                smaller = list(self._halves(level, box))
                stack += smaller
                if not smaller:
                    damaged.append(self._named(level, left, upper, str(error)))
                continue
            values[inside] = part
            whole[inside] = True if seen is None else seen
        return Region(values=values, valid=whole, origin=origin, damaged=tuple(damaged))

    def _read(self, level: int, x: int, y: int, w: int, h: int) -> tuple[Array, Array | None]:
        """Return RGB on white and which pixels are scanned."""
        downsample = self._downsamples[level]
        place = round(x * downsample), round(y * downsample)
        rgba = np.asarray(self._slide.read_region(place, level, (w, h)))
        opaque = int(np.bitwise_and.reduce(rgba.view(np.uint32), None))
        if opaque >> _ALPHA & 255 == 255:
            rgb = np.empty((h, w, 3), np.uint8)
            for channel in range(3):  # four times as fast as a copy of rgba[..., :3]
                rgb[..., channel] = rgba[..., channel]
            return rgb, None
        alpha = rgba[..., 3]
        share = alpha[..., None].astype(np.uint16)
        rgb = (rgba[..., :3] * share + 255 * (255 - share) + 127) // 255
        return rgb.astype(np.uint8), alpha >= 128

    def _halves(self, level: int, box: Bounds) -> Iterator[Bounds]:
        """Cut a box in two where stored tiles meet; nothing where it lies in a single one."""
        left, upper, right, lower = box
        tile_width, tile_height = self._tiles[level]
        columns = (right - 1) // tile_width - left // tile_width
        rows = (lower - 1) // tile_height - upper // tile_height
        if columns >= rows and columns:
            cut = (left // tile_width + (columns + 1) // 2) * tile_width
            yield from ((left, upper, cut, lower), (cut, upper, right, lower))
        elif rows:
            cut = (upper // tile_height + (rows + 1) // 2) * tile_height
            yield from ((left, upper, right, cut), (left, cut, right, lower))

    def _named(self, level: int, x: int, y: int, reason: str) -> tuple[int, int, str]:
        """Return place and reason of the stored tile that holds a pixel."""
        tile_width, tile_height = self._tiles[level]
        fx, fy = self._factors[level]
        place = x // tile_width * tile_width * fx, y // tile_height * tile_height * fy
        return round(place[0]), round(place[1]), reason


def _tile(properties: dict[str, str], level: int) -> tuple[int, int]:
    sides = (properties.get(f"openslide.level[{level}].tile-{side}") for side in
             ("width", "height"))  # fmt: skip
    width, height = (int(side) if side and side.isdecimal() else _TILE for side in sides)
    return max(width, 1), max(height, 1)


def _is_smaller(first: Pair, above: Pair, level: Pair) -> bool:
    x, y = first[0] / level[0], first[1] / level[1]
    is_same_shape = abs(x - y) <= max(0.05 * max(x, y), x / level[0] + y / level[1])
    return is_same_shape and level[0] < above[0]


def _number(text: str | None) -> float | None:
    """Return a finite number out of a property, None where there is none."""
    try:
        value = float(str(text).strip().replace(",", "."))
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _resolutions(properties: dict[str, str]) -> Iterator[tuple[str, float, float]]:
    """Yield what is said of micrometres per pixel: OpenSlide, the vendor, the TIFF tags."""
    x, y = (_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if x or y:
        yield "openslide.mpp", float(x or y or 0), float(y or x or 0)
    value = _number(properties.get("aperio.MPP"))
    if value and not x:
        yield "aperio.MPP", value, value
    unit = {"centimeter": _CENTIMETRE_UM, "inch": _INCH_UM}.get(
        properties.get("tiff.ResolutionUnit", "").lower()
    ) or imagej_unit(properties.get("tiff.ImageDescription", ""))
    dots = [_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
    if unit and dots[0] and dots[1] and min(dots[0], dots[1]) > 0:
        found = unit / dots[0], unit / dots[1]
        if not (x and abs(found[0] - x) < 1e-6 * x):  # OpenSlide has it from there
            yield "TIFF resolution", *found


def _check_members(path: str) -> None:
    """Refuse an index whose files with pixels lie elsewhere: it would read any file.

    Raises:
        DataError: A name in it is a path.
    """
    if not is_index(path):
        return
    index = path
    if path.lower().endswith(".mrxs"):
        index = os.path.join(os.path.splitext(path)[0], "Slidedat.ini")
        if not os.path.isfile(index):
            raise DataError(
                f"{path}: the folder beside it with Slidedat.ini is not there. Copy both, the "
                ".mrxs file and the folder of the same name."
            )
    parser = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True)
    with parsing(f"{index}: the index of the slide", also=(configparser.Error,)):
        parser.read_string(read_small(index))
    for section in parser.sections():
        for key, value in parser[section].items():
            is_name = key.startswith(("file_", "imagefile", "optimisationfile")) or key in (
                "indexfile", "mapfile", "macroimage",
            )  # fmt: skip
            if is_name and value and ("/" in value or "\\" in value or value == ".."):
                raise DataError(
                    f"{index}: {key} names {value!r}, expected a file beside it. The slide is not "
                    "opened."
                )
