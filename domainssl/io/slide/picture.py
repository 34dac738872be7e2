"""Tile pictures in every mode: RGB uint8 on white, turned as their EXIF says.

rgb, valid = read_tile_picture("tile.png")     # (H, W, 3) uint8, (H, W) bool
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from domainssl.errors import DataError, parsing
from domainssl.files import open_regular
from domainssl.io.slide.colors import on_white, to_rgb
from domainssl.io.slide.facts import CONVERT

__all__ = ["ENDINGS", "PictureFacts", "advice_on_pictures", "is_picture", "picture_facts",
           "read_label_picture", "read_tile_picture"]  # fmt: skip

Array = np.ndarray[Any, Any]
_PLAIN = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_FOLDERS = 64  # that are looked through for pictures
ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".jp2")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "JPEG2000")
_MAGIC = {
    b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP", b"\0\0\0\x0cjP  ": "JPEG2000",
}  # fmt: skip
_MOST_PIXELS = 2**27  # of a picture that is read whole
_INCH_UM = 25_400.0


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """What the header of a picture says.

    Attributes:
        path: Path as given.
        format: `png`, `jpeg`, `tiff` ...
        size: Width and height as shown, after the rotation that EXIF asks for.
        mode: How colours are stored, in Pillow's words.
        dtype: Type of the stored numbers.
        mpp: Micrometres per pixel in x and y from the resolution of the file, which is often that
            of a screen; None without one.
        has_color_profile: Whether an ICC profile comes with it; it is never applied.
    """

    path: str
    format: str
    size: tuple[int, int]
    mode: str
    dtype: str
    mpp: tuple[float, float] | None
    has_color_profile: bool


def advice_on_pictures(folder: str) -> str:
    """Return how to read pictures of tiles where whole slides are asked for, empty without any."""
    names = (name.lower() for _, _, files in islice(os.walk(folder), _FOLDERS) for name in files)
    if not any(name.endswith(_PLAIN) for name in names):
        return ""
    return (
        " Pictures of tiles are read by a DataModule: `embed BACKBONE --config recipes/tiles_mae."
        f"yaml --data.root={folder} --output PATH` (docs/data/tiles.md says how they lie); a task "
        "gives its answers for them in Python, domainssl.load_task(TASK).logits(batch)."
    )


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a picture (TIFF apart), by its first bytes."""
    try:
        with open_regular(path) as file:
            head = file.read(16)
    except OSError:
        return False
    return head.startswith(tuple(_MAGIC)) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def picture_facts(path: str | os.PathLike[str]) -> PictureFacts:
    """Return what the header of a picture says.

    Raises:
        DataError: It is no picture, or too large.
    """
    path = str(path)
    if _is_tiff(path):
        return _tiff_facts(path)
    with _pillow(path) as picture:
        _check_size(path, picture.size)
        with parsing(f"{path}: the header", also=(SyntaxError,)):  # EXIF may lie behind the pixels
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            width, height = picture.size[::-1] if turned else picture.size
            dpi = _dpi(picture.info.get("dpi"))
        return PictureFacts(
            path=path,
            format=str(picture.format).lower(),
            size=(int(width), int(height)),
            mode=picture.mode,
            dtype="uint16" if picture.mode.startswith("I") else "uint8",
            mpp=None if dpi is None else (_INCH_UM / dpi[0], _INCH_UM / dpi[1]),
            has_color_profile="icc_profile" in picture.info,
        )


def _dpi(stated: Any) -> tuple[float, float] | None:
    """Return pixels per inch in x and y, None where none are stated."""
    if not isinstance(stated, tuple) or len(stated) != 2:
        return None
    x, y = float(stated[0]), float(stated[1])
    return (x, y) if 0 < x < 1e9 and 0 < y < 1e9 else None


def read_tile_picture(path: str | os.PathLike[str]) -> tuple[Array, Array]:
    """Return colours on white, and which pixels are not transparent.

    Alpha and palette transparency are composited on white, grey becomes three equal channels, 16
    bit are scaled to 8, CMYK is converted and the rotation of EXIF, which is the orientation of
    TIFF, applied. Colour profiles are not applied.

    Args:
        path: A PNG, JPEG, TIFF, BMP, WebP or JPEG 2000 file.

    Returns:
        Colours (H, W, 3) uint8; valid (H, W) bool.

    Raises:
        DataError: It is no picture, damaged, too large, or no colours.
    """
    path = str(path)
    if _is_tiff(path):
        return _read_tiff(path)
    from PIL import ImageOps

    with _pillow(path) as picture:
        _check_size(path, picture.size)
        with parsing(f"{path}: the picture", also=(SyntaxError,)):
            picture.load()
            shown = ImageOps.exif_transpose(picture)
            return _colors(path, shown)


def read_label_picture(path: str | os.PathLike[str]) -> Array:
    """Return a picture whose numbers are classes, as stored.

    Args:
        path: A PNG or TIFF file: grey, 16 bit, palette (the entries' numbers count, not their
            colours) or three equal channels.

    Returns:
        (H, W) uint8 or uint16.

    Raises:
        DataError: It is no such picture.
    """
    path = str(path)
    if _is_tiff(path):
        values = _tiff_numbers(path)
    else:
        with _pillow(path) as picture:
            _check_size(path, picture.size)
            with parsing(f"{path}: the picture", also=(SyntaxError,)):
                values = np.array(picture)
    if values.ndim == 2:
        values = values[..., None]
    if values.dtype.kind == "i" and values.min() >= 0 and values.max() < 2**16:
        values = values.astype(np.uint16)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    same = values.shape[-1] == 1 or (values.shape[-1] == 3 and (values == values[..., :1]).all())
    if values.dtype.kind != "u" or not same:
        raise DataError(
            f"{path}: holds colours, expected one number per pixel: 0 outside, 1, 2, ... for the "
            "classes. Write it as a grey or palette picture."
        )
    return np.ascontiguousarray(values[..., 0])


def _colors(path: str, picture: Any) -> tuple[Array, Array]:
    mode = picture.mode
    if mode.startswith("I") or mode == "F":
        values = np.asarray(picture)
        if mode == "F" or values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"{path}: holds numbers from {values.min():g} to {values.max():g} (mode {mode}), "
                "expected colours of 8 or 16 bit. Convert it, saying which values are black and "
                "white."
            )
        rgb, valid = to_rgb(values.astype(np.uint16)[..., None], "grey", what=path)
        hidden = picture.info.get("transparency")  # one number that stands for nothing
        if not isinstance(hidden, int):
            return rgb, valid
        return on_white(rgb, np.where(values == hidden, 0, 255).astype(np.uint8))
    if mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        picture = picture.convert("RGB")
    if picture.mode != "RGB":
        rgba = np.asarray(picture.convert("RGBA"))
        return on_white(rgba[..., :3], rgba[..., 3])
    if "transparency" in picture.info:  # one colour that stands for nothing
        rgba = np.asarray(picture.convert("RGBA"))
        return on_white(rgba[..., :3], rgba[..., 3])
    rgb = np.array(picture)
    return rgb, np.ones(rgb.shape[:2], bool)


def _pillow(path: str) -> Any:
    """Open a picture; the caller closes it."""
    from PIL import Image

    with parsing(f"{path}: the picture", also=(Image.DecompressionBombError, SyntaxError)):
        open_regular(path).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are compared with our own limit
            return Image.open(path, formats=_FORMATS)


def _check_size(path: str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > _MOST_PIXELS:
        raise DataError(
            f"{path}: a picture of {size[0]} x {size[1]} pixels, expected at most "
            f"{_MOST_PIXELS / 1e6:.0f} million of a tile. Convert it to a tiled pyramid: {CONVERT}."
        )


def _is_tiff(path: str) -> bool:
    with parsing(f"{path}: the picture"), open_regular(path) as file:
        return file.read(4) in _TIFF


def _tiff_facts(path: str) -> PictureFacts:
    from domainssl.io.slide.by_tifffile import TiffPyramid

    pyramid = TiffPyramid(path)
    stored, width, height = pyramid.stored, *pyramid.stored.levels[0]
    turned = pyramid.orientation >= 5
    pyramid.close()
    mpp = next(((x, y) for _, x, y in stored.stated), None)
    return PictureFacts(
        path=path,
        format="tiff",
        size=(height, width) if turned else (width, height),
        mode=" ".join(stored.channels),
        dtype=stored.dtype,
        mpp=mpp,
        has_color_profile=stored.has_color_profile,
    )


def _tiff_numbers(path: str) -> Array:
    from domainssl.io.slide.by_tifffile import TiffPyramid

    pyramid = TiffPyramid(path)
    width, height = pyramid.stored.levels[0]
    _check_size(path, (width, height))
    values, _, damaged = pyramid.numbers(0, 0, 0, width, height)
    pyramid.close()
    if damaged:
        raise DataError(f"{path}: the picture cannot be read ({damaged[0][2]}). Get it again.")
    return values


def _read_tiff(path: str) -> tuple[Array, Array]:
    from domainssl.io.slide.by_tifffile import TiffPyramid

    pyramid = TiffPyramid(path)
    stored = pyramid.stored
    width, height = stored.levels[0]
    _check_size(path, (width, height))
    if not stored.is_rgb:
        raise DataError(
            f"{path}: holds the channels {', '.join(stored.channels)} ({stored.dtype}), expected "
            "colours. Choose three of them and write them as RGB."
        )
    region = pyramid.region(0, 0, 0, width, height)
    pyramid.close()
    if region.damaged:
        raise DataError(
            f"{path}: the picture cannot be read ({region.damaged[0][2]}). Get the file again."
        )
    valid = np.ones((height, width), bool) if region.valid is None else region.valid
    return _shown(region.values, pyramid.orientation), _shown(valid, pyramid.orientation)


def _shown(values: Array, orientation: int) -> Array:
    """Turn rows and columns as the orientation of TIFF says, 1 to 8."""
    if orientation >= 5:  # the first row is shown as a column
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return np.ascontiguousarray(values)
