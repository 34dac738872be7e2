"""Stored numbers as colours: RGB uint8 on white, and which pixels are not transparent."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from domainssl.errors import DataError

__all__ = ["Coding", "on_white", "to_rgb"]

Array = np.ndarray[Any, Any]
Coding = Literal["rgb", "ycbcr", "grey", "white_is_zero", "palette", "cmyk"]
_COLORS = {"rgb": 3, "ycbcr": 3, "grey": 1, "white_is_zero": 1, "palette": 1, "cmyk": 4}
_OPAQUE = 128  # of 255


def on_white(rgb: Array, alpha: Array, *, is_premultiplied: bool = False) -> tuple[Array, Array]:
    """Composite on white.

    Args:
        rgb: (H, W, 3) uint8.
        alpha: (H, W) uint8.
        is_premultiplied: Whether the colours are multiplied by alpha already.

    Returns:
        Colours (H, W, 3) uint8; True where at least half opaque, (H, W) bool.
    """
    if alpha.min(initial=255) == 255:
        return rgb, np.ones(alpha.shape, bool)
    share = alpha[..., None].astype(np.uint16)
    seen = rgb.astype(np.uint16) if is_premultiplied else (rgb * share + 127) // 255
    return np.minimum(seen + (255 - share), 255).astype(np.uint8), alpha >= _OPAQUE


def to_rgb(
    values: Array,
    coding: Coding,
    *,
    what: str,
    bits: int | None = None,
    palette: Array | None = None,
    is_premultiplied: bool = False,
) -> tuple[Array, Array]:
    """Return colours on white.

    Args:
        values: (H, W, C) bool, uint8 or uint16; a channel behind the colours is alpha.
        coding: What the channels are.
        what: File, for messages.
        bits: Bits that are used of 8 or 16; all if None.
        palette: (3, entries) uint8 or uint16.
        is_premultiplied: Whether colours are multiplied by alpha already.

    Returns:
        Colours (H, W, 3) uint8; True where not transparent, (H, W) bool.

    Raises:
        DataError: The numbers are no colours.
    """
    count = _COLORS[coding]
    if coding == "palette":
        if palette is None or values.dtype.kind != "u":
            raise DataError(f"{what}: colours by a palette that is not there. Get the file again.")
        entries = _eight(palette, None, what).T
        rgb = entries[np.minimum(values[..., 0], len(entries) - 1)]
    else:
        rgb = _eight(values[..., :count], bits, what)
    rgb = _as_rgb(rgb, coding)
    if values.shape[-1] <= count:
        return rgb, np.ones(rgb.shape[:2], bool)
    alpha = _eight(values[..., count], bits, what)
    return on_white(rgb, alpha, is_premultiplied=is_premultiplied)


def _as_rgb(values: Array, coding: Coding) -> Array:
    if coding == "white_is_zero":
        values = 255 - values
    if coding in ("grey", "white_is_zero"):
        return np.repeat(values, 3, -1)
    if coding in ("cmyk", "ycbcr"):
        from PIL import Image

        mode = "CMYK" if coding == "cmyk" else "YCbCr"
        height, width = values.shape[:2]
        picture = Image.frombytes(mode, (width, height), np.ascontiguousarray(values).tobytes())
        return np.asarray(picture.convert("RGB"))
    return values


def _eight(values: Array, bits: int | None, what: str) -> Array:
    """Scale to 0..255; never cut off, never wrap around."""
    if values.dtype == np.uint8 and (bits is None or bits >= 8):
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{what}: holds {values.dtype} numbers, expected colours of 8 or 16 bit. Convert it, "
            "saying which values are black and white."
        )
    most = 2 ** min(bits or 16, 16) - 1
    return np.minimum((values.astype(np.uint32) * 255 + most // 2) // most, 255).astype(np.uint8)
