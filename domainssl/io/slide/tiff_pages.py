"""How the pages of a TIFF file make up levels and channels, and the decoding of one tile."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainssl.errors import DataError, parsing, require
from domainssl.io.slide.colors import Coding
from domainssl.io.slide.facts import CONVERT, Stored
from domainssl.io.slide.ome import OmeImage, ome_images
from domainssl.io.volume.codestream import image_size

__all__ = [
    "Layout",
    "Level",
    "decoded",
    "imagej_unit",
    "is_ome",
    "layout_of",
    "orientation_of",
    "resolution_tags",
]

Array = np.ndarray[Any, Any]

_MOST_TILE = 2**28  # decoded bytes of a tile
_MOST_STRIP = 2**30  # of a strip, which may be the whole picture
_PIECE = 2**22  # bytes of a strip without compression that are read at a time
_SUSPECT = 2**28  # bytes that a stream may unfold to before it is looked at
_CODECS = {
    1: None, 5: "lzw", 7: None, 8: "zlib", 32946: "zlib", 32773: None, 33003: None, 33004: None,
    33005: None, 34712: None, 34925: "lzma", 34926: "zstd", 50000: "zstd", 50001: None,
    50013: "zlib",
}  # fmt: skip
_JPEG = 7
_CODINGS: dict[int, Coding] = {
    0: "white_is_zero", 1: "grey", 2: "rgb", 3: "palette", 5: "cmyk", 6: "ycbcr",
}  # fmt: skip
_UNITS_UM = {2: 25_400.0, 3: 10_000.0}  # of TIFF's ResolutionUnit: inch, centimetre
_IMAGEJ_UM = {"micron": 1.0, "microns": 1.0, "um": 1.0, "µm": 1.0, "μm": 1.0, "nm": 1e-3, "mm": 1e3,
              "cm": 1e4, "inch": 25_400.0}  # fmt: skip
_NOT_SLIDES = ("label", "macro", "thumbnail", "overview")
_RGB = ("red", "green", "blue")
_RGB_COLORS = (0xFF0000FF, 0x00FF00FF, 0x0000FFFF)


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level: pages with their first segment per plane, and the tiles of each plane.

    Attributes:
        size: Width and height.
        tile: Width and height of stored tiles, or of strips.
        columns: Tiles side by side.
        planes: Page and index of the first tile, for each plane.
        contiguous: Channels in one plane.
        dtype: Type of the numbers.
        pieces: Tiles that a stored strip is read in, from one above the other; 0 where a tile is
            what is stored.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    columns: int
    planes: tuple[tuple[Any, int], ...]
    contiguous: int
    dtype: np.dtype[Any]
    pieces: int = 0

    @property
    def channels(self) -> int:
        """Channels of all planes."""
        return self.contiguous * len(self.planes)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All levels, what their numbers mean, and how they are to be shown (1 to 8 of TIFF).

    `unknown` channels behind the colours are neither colours nor alpha.
    """

    stored: Stored
    levels: tuple[Level, ...]
    coding: Coding
    bits: int | None
    palette: Array | None
    is_premultiplied: bool
    orientation: int
    unknown: int = 0


def is_ome(page: Any) -> bool:
    """Whether the first page holds OME-XML."""
    text = page.description[: 2**20] if page.description else ""
    return "<OME" in text or "openmicroscopy.org" in text


def orientation_of(page: Any) -> int:
    """Return how the stored rows and columns are to be shown, 1 to 8; 1 is as they are."""
    value = page.tags.valueof(274, 1)
    return int(value) if value in range(1, 9) else 1


def layout_of(tiff: Any, path: str) -> Layout:
    """Return levels and channels of the image in a file; labels and macros are passed over.

    Raises:
        DataError: The layout is not that of a slide.
    """
    first = tiff.pages[0]
    described = ome_images(first.description) if is_ome(first) else []
    series = _main_series(tiff, path)
    image = _described(described, series)
    pages = [_level_pages(level, path) for level in _series_levels(series, path)]
    levels, warnings = _kept([_level(found, path) for found in pages], path)
    page = pages[0][0].keyframe
    sizes = dict(zip(series.axes, series.shape, strict=True))
    expected = int(sizes.get("C", 1)) * int(sizes.get("S", 1))
    if levels[0].channels != expected:
        raise DataError(
            f"{path}: has pages for {levels[0].channels} of {expected} channels. Write every "
            "channel to a page of its own, such as OME-TIFF does."
        )
    coding = _coding(page, path)
    extra = [int(kind) for kind in page.extrasamples or ()]
    names, is_rgb, odd = _channels(levels[0], coding, image, extra)
    if is_rgb and _has_unknown(levels[0], coding, extra):
        odd = [*odd, "a further channel, which is not said to be alpha (ExtraSamples), is not read"]
    if coding in ("grey", "white_is_zero") and is_rgb and levels[0].channels == 3:
        coding = "rgb"
    orientation = orientation_of(first)
    if orientation != 1:
        odd = [*odd, f"orientation {orientation} is not applied: places are those of the pixels "
                     "as they are stored"]  # fmt: skip
    layout = Stored(
        path=path,
        backend="tifffile",
        format="ome" if described else str(series.kind),
        levels=tuple(level.size for level in levels),
        stated=tuple(_stated(image, first)),
        objective_power=image.power if image and image.power and image.power > 0 else None,
        channels=names,
        is_rgb=is_rgb,
        dtype=levels[0].dtype.name,
        tile_size=levels[0].tile,
        has_color_profile=34675 in page.tags,
        warnings=(*warnings, *odd),
    )
    return Layout(
        stored=layout,
        levels=levels,
        coding=coding,
        bits=image.bits if image and image.bits else _bits(page),
        palette=None if page.colormap is None else np.asarray(page.colormap, np.uint16),
        is_premultiplied=extra[:1] == [1],
        orientation=orientation,
        unknown=int(is_rgb and _has_unknown(levels[0], coding, extra)),
    )


def _main_series(tiff: Any, path: str) -> Any:
    """Return the largest image that is not named a label, macro or overview."""
    found = list(tiff.series)
    if not found:
        raise DataError(f"{path}: holds no image. Get the file again.")
    named = [s for s in found if not any(word in str(s.name).lower() for word in _NOT_SLIDES)]
    return max(named or found, key=lambda s: _area(s) * (1 if s in named else 0))


def _area(series: Any) -> int:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    return int(sizes.get("X", 0)) * int(sizes.get("Y", 0))


def _described(images: Sequence[OmeImage], series: Any) -> OmeImage | None:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    fitting = [i for i in images if i.size == (sizes.get("X"), sizes.get("Y"))]
    named = [i for i in fitting if i.name == series.name]
    return next(iter(named or fitting), None)


def _series_levels(series: Any, path: str) -> list[Any]:
    """Return the levels of a series, each a list of pages."""
    sizes = dict(zip(series.axes, series.shape, strict=True))
    more = {axis: n for axis, n in sizes.items() if axis not in "YXSC" and n > 1}
    if more or "X" not in sizes or "Y" not in sizes:
        shown = ", ".join(f"{axis} {n}" for axis, n in sizes.items())
        raise DataError(
            f"{path}: axes are {shown}, expected rows Y, columns X and channels C or S. Choose one "
            "plane and write it to a file of its own."
        )
    levels = [list(level.pages) for level in series.levels]
    if len(levels) == 1 and series.pages[0] is not None and series.pages[0].subifds:
        per_page = [list(page.pages) for page in series.pages]
        levels += [list(pages) for pages in zip(*per_page, strict=False)]
    return levels


def _level_pages(pages: Sequence[Any], path: str) -> list[Any]:
    if not pages or any(page is None for page in pages):
        raise DataError(
            f"{path}: planes are in other files or missing. Write the image to a single file."
        )
    return list(pages)


def _level(pages: Sequence[Any], path: str) -> Level:
    """Return one level.

    Raises:
        DataError: It cannot be read, or only with too much memory.
    """
    key = pages[0].keyframe
    is_separate = int(key.planarconfig) == 2 and key.samplesperpixel > 1
    contiguous = 1 if is_separate else int(key.samplesperpixel)
    width, height = int(key.imagewidth), int(key.imagelength)
    if key.is_tiled:
        tile = int(key.tilewidth), int(key.tilelength)
    else:
        tile = width, min(int(key.rowsperstrip), height)
    strip, tile = tile, _piece(key, tile, height, contiguous)
    if key.dtype is None or key.dtype.kind not in "ub" or key.dtype.itemsize > 2:
        raise DataError(
            f"{path}: holds {key.dtype} numbers, expected 8 or 16 bit without sign. Convert it, "
            "saying which values are black and white."
        )
    if int(key.compression) not in _CODECS:
        raise DataError(
            f"{path}: compression {getattr(key.compression, 'name', key.compression)} is not read. "
            "Convert it to JPEG, deflate, LZW, JPEG 2000, WebP or zstd."
        )
    if min(*tile, width, height, contiguous) < 1 or int(key.imagedepth) != 1:
        raise DataError(f"{path}: states an image of {width} x {height} in tiles of {tile}.")
    most = _MOST_TILE if key.is_tiled else _MOST_STRIP
    if tile[0] * tile[1] * contiguous * key.dtype.itemsize > most:
        raise DataError(
            f"{path}: is stored in pieces of {tile[0]} x {tile[1]} pixels, which take more than "
            f"{most >> 20} MiB each. Convert it to a tiled pyramid: {CONVERT}."
        )
    columns, rows = -(-width // strip[0]), -(-height // strip[1])
    planes = [
        (page, plane * columns * rows)
        for page in pages
        for plane in range(int(key.samplesperpixel) if is_separate else 1)
    ]
    for page, first in planes:
        if min(len(page.dataoffsets), len(page.databytecounts)) < first + columns * rows:
            found, wanted = len(page.dataoffsets), first + columns * rows
            raise DataError(
                f"{path}: has places for {found} of {wanted} tiles. "
                "The file is damaged or cut off; get it again."
            )
    pieces = 0 if tile == strip else -(-strip[1] // tile[1])
    wanted = width * height * contiguous * key.dtype.itemsize
    for page, first in planes if pieces else ():
        held = sum(page.databytecounts[first : first + columns * rows])
        if held < wanted:
            raise DataError(
                f"{path}: states {width} x {height} pixels without compression, which take "
                f"{wanted} bytes, and holds {held}. The header is damaged; get the file again."
            )
    return Level(
        size=(width, height),
        tile=tile,
        columns=columns,
        planes=tuple(planes),
        contiguous=contiguous,
        dtype=np.dtype(key.dtype),
        pieces=pieces,
    )


def _piece(key: Any, strip: tuple[int, int], height: int, channels: int) -> tuple[int, int]:
    """Return the part of a strip that is read at a time: of one without compression a few rows."""
    is_plain = (int(key.compression), int(key.predictor), int(key.fillorder)) == (1, 1, 1)
    if key.is_tiled or not is_plain or key.dtype is None:
        return strip
    if key.bitspersample != 8 * key.dtype.itemsize:
        return strip
    most = max(1, _PIECE // max(1, strip[0] * channels * key.dtype.itemsize))
    if strip[1] <= most:
        return strip
    if strip[1] == height:
        return strip[0], most
    return strip[0], next(rows for rows in range(most, 0, -1) if strip[1] % rows == 0)


def _kept(levels: Sequence[Level], path: str) -> tuple[tuple[Level, ...], list[str]]:
    """Leave out levels that are no smaller version of the first one."""
    first, kept, odd = levels[0], [levels[0]], []
    for level in levels[1:]:
        x, y = first.size[0] / level.size[0], first.size[1] / level.size[1]
        is_same_shape = abs(x - y) <= max(0.05 * max(x, y), x / level.size[0] + y / level.size[1])
        is_like = (level.channels, level.dtype) == (first.channels, first.dtype)
        if is_same_shape and is_like and level.size[0] < kept[-1].size[0]:
            kept.append(level)
        else:
            odd.append(
                f"a level of {level.size[0]} x {level.size[1]} pixels is left out: it is no "
                f"smaller version of {first.size[0]} x {first.size[1]}"
            )
    return tuple(kept), odd


def _coding(page: Any, path: str) -> Coding:
    photometric = int(page.photometric)
    if photometric not in _CODINGS:
        raise DataError(
            f"{path}: colours are stored as {getattr(page.photometric, 'name', photometric)}, "
            f"expected RGB, YCbCr, grey, palette or CMYK. Convert it to RGB."
        )
    coding = _CODINGS[photometric]
    if coding == "ycbcr" and int(page.compression) == _JPEG:
        return "rgb"  # the decoder converts
    return coding


def _channels(
    level: Level, coding: Coding, image: OmeImage | None, extra: Sequence[int]
) -> tuple[tuple[str, ...], bool, list[str]]:
    """Return names of channels, whether they are colours, and what is odd about it."""
    count = level.channels
    if coding in ("rgb", "ycbcr", "palette", "cmyk"):
        least = {"palette": 1, "cmyk": 4}.get(coding, 3)  # one more may be alpha
        is_rgb = count in (least, least + 1)
        return (_RGB, True, []) if is_rgb else (_numbered(count), False, [])
    if count == 2 and image is None and extra in ([1], [2]):
        return _RGB, True, ["grey with alpha is read as colours"]
    names = tuple(image.channels) if image and len(image.channels) == count else ()
    colors = tuple(image.colors) if image and names else ()
    is_named = bool(names) and all(names)
    lowered = tuple(name.strip().lower() for name in names)
    if count == 3 and (lowered in (_RGB, ("r", "g", "b")) or colors == _RGB_COLORS):
        return _RGB, True, []
    if count == 3 and not is_named and level.dtype == np.uint8:
        return _RGB, True, ["three planes without names are read as red, green and blue"]
    if count == 1 and not is_named:
        return _RGB, True, ["one channel without a name is read as grey"]
    shown = names if is_named else _numbered(count)
    return tuple(shown), False, []


def _has_unknown(level: Level, coding: Coding, extra: Sequence[int]) -> bool:
    """Whether a channel behind the colours is not said to be alpha."""
    colors = {"palette": 1, "cmyk": 4, "rgb": 3, "ycbcr": 3}.get(coding, level.channels)
    return level.channels == colors + 1 and list(extra[:1]) not in ([1], [2])


def _bits(page: Any) -> int | None:
    """Return the bits that a page states for every number, where it is one and at most 16."""
    bits = page.bitspersample
    return bits if isinstance(bits, int) and 1 < bits <= 16 else None


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"channel {n}" for n in range(count))


def _stated(image: OmeImage | None, page: Any) -> Iterator[tuple[str, float, float]]:
    """Yield the resolutions that a file states, the trusted one first."""
    if image is not None and image.mpp is not None:
        yield "OME PhysicalSize", *image.mpp
    found = resolution_tags(page)
    if found is not None:
        yield "TIFF resolution", *found


def resolution_tags(page: Any) -> tuple[float, float] | None:
    """Return micrometres per pixel in x and y from the tags of a page, None without a unit."""
    unit = _UNITS_UM.get(int(page.tags.valueof(296, 1)))  # pixels per nothing without it
    unit = unit or imagej_unit(str(page.description or ""))
    values = []
    for tag in (282, 283):
        value = page.tags.valueof(tag)
        if value is None or unit is None or len(value) != 2 or not value[0] or not value[1]:
            return None
        values.append(unit * value[1] / value[0])
    return (values[0], values[1])


def imagej_unit(description: str) -> float | None:
    """Return the unit in um that ImageJ states beside resolution tags without one, if it does."""
    if not description.startswith("ImageJ="):
        return None
    found = re.search(r"^unit=(.*)$", description, re.MULTILINE)
    return _IMAGEJ_UM.get(found[1].strip().replace("\\u00B5", "µ").lower()) if found else None


def decoded(page: Any, data: bytes, index: int) -> Array:
    """Return the pixels of one tile or strip, (H, W, C).

    Raises:
        DataError: It cannot be decoded, or unfolds to more than it is.
    """
    imagecodecs = require("imagecodecs", "pathology")
    key = page.keyframe
    with parsing("the stored tile", advice=""):
        _check(key, data, imagecodecs)
        values, _, _ = key.decode(
            data, index, jpegtables=page.jpegtables, jpegheader=key.jpegheader
        )
        if values is None:
            raise DataError("holds nothing")
        return np.asarray(values)[0]


def _check(key: Any, data: bytes, imagecodecs: Any) -> None:
    """Compare what a compressed tile says of itself with its place.

    Raises:
        ValueError: It is larger.
    """
    if key.is_tiled:
        width, height = int(key.tilewidth), int(key.tilelength)
    else:
        width, height = int(key.imagewidth), min(int(key.rowsperstrip), int(key.imagelength))
    samples = 1 if int(key.planarconfig) == 2 else int(key.samplesperpixel)
    most = width * height * samples * max(1, key.dtype.itemsize)
    name = _CODECS[int(key.compression)]
    if int(key.compression) == 50001:
        size: tuple[int, int] | None = _webp_size(data)
    else:
        size = image_size(data) if name is None and int(key.compression) > 1 else None
    if size is not None and (size[0] > height or size[1] > width):
        raise ValueError(f"states {size[1]} x {size[0]} pixels in a place of {width} x {height}")
    if name is None or len(data) * _RATIOS[name] <= _SUSPECT:
        return
    if name == "zlib":
        found = zlib.decompressobj().decompress(data, most + 1)
    else:
        found = _decoders(imagecodecs)[name](data, out=most + 1)
    if len(found) > most:
        raise ValueError(f"unfolds to more than the {most} bytes of its place")


_RATIOS = {"zlib": 1032, "lzw": 2800, "lzma": 8192, "zstd": 32768}


def _decoders(imagecodecs: Any) -> Mapping[str, Callable[..., Any]]:
    return {
        "lzw": imagecodecs.lzw_decode,
        "lzma": imagecodecs.lzma_decode,
        "zstd": imagecodecs.zstd_decode,
    }


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Return rows and columns from the header of a WebP image."""
    kind = data[12:16]
    if kind == b"VP8X":
        return (
            1 + int.from_bytes(data[27:30], "little"),
            1 + int.from_bytes(data[24:27], "little"),
        )
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if kind == b"VP8 ":
        size = int.from_bytes(data[26:30], "little")
        return size >> 16 & 0x3FFF, size & 0x3FFF
    raise ValueError("no WebP image")
