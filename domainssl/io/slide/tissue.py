"""Tissue on an overview of a slide: what is coloured or dark, without pen marks and crumbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from domainssl.errors import ConfigError, nearest, require
from domainssl.io.slide.pyramid import Slide

__all__ = ["TissueMask", "TissueOptions", "slide_tissue", "tissue"]

Array = np.ndarray[Any, Any]
_METHODS = ("otsu", "fixed")
_SATURATION = (8, 64)  # limits of Otsu's threshold, of 255: blank slides, slides full of tissue
_BRIGHTNESS = (160, 225)
_MEDIAN = 3  # pixels


@dataclass(frozen=True, kw_only=True)
class TissueOptions:
    """How tissue is told from glass.

    Attributes:
        method: `otsu`: thresholds of saturation and brightness from the slide's own histogram;
            `fixed`: saturation above `saturation`.
        saturation: Threshold of `fixed`, of 255; 8 finds pale tissue, 15 less dirt.
        mpp_um: Micrometres per pixel of the overview.
        most_px: Longest side of the overview.
        min_part_mm2: Smaller parts are left out.
        min_hole_mm2: Smaller holes count as tissue.
        remove_pen: Whether green, strongly blue and black strokes are left out; not for stains of
            these colours, such as trichrome.
    """

    method: Literal["otsu", "fixed"] = "otsu"
    saturation: int = 8
    mpp_um: float = 8.0
    most_px: int = 4096
    min_part_mm2: float = 0.005
    min_hole_mm2: float = 0.002
    remove_pen: bool = True

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ConfigError(
                f"tissue.method: got {self.method!r}, expected 'otsu' or 'fixed'."
                + nearest(self.method, _METHODS)
            )
        if not 0 <= self.saturation < 255:
            raise ConfigError(f"tissue.saturation: got {self.saturation!r}, expected 0 to 254.")
        if not (self.mpp_um > 0 and self.most_px >= 16):
            raise ConfigError(
                f"tissue: got mpp_um {self.mpp_um!r} and most_px {self.most_px!r}, expected a "
                "positive resolution and at least 16 pixels."
            )


@dataclass(frozen=True, kw_only=True)
class TissueMask:
    """Tissue of a slide on its overview.

    Attributes:
        mask: (H, W) bool, True is tissue.
        downsample: Level-0 pixels per pixel of the overview in x and y.
        pen_fraction: Share of the overview that was left out as pen.
    """

    mask: Array
    downsample: tuple[float, float]
    pen_fraction: float

    def fractions(self, coords: Array, size: tuple[int, int]) -> Array:
        """Return the share of tissue under tiles, exact for the mask.

        Args:
            coords: Upper left corners in level-0 pixels, (N, 2), x and y.
            size: Width and height of the tiles in level-0 pixels.

        Returns:
            Shares in [0, 1], (N,); outside the slide is no tissue.
        """
        return area_fractions(self.mask, self.downsample, coords, size)


def area_fractions(
    mask: Array, downsample: tuple[float, float], coords: Array, size: tuple[int, int]
) -> Array:
    """Return which share of each tile is True in a mask; pixels are counted by their area."""
    height, width = mask.shape
    total = np.zeros((height + 1, width + 1))
    np.cumsum(np.cumsum(mask, 0, dtype=np.float64), 1, out=total[1:, 1:])

    def upto(x: Array, y: Array) -> Array:
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        i, j = np.minimum(x.astype(int), width - 1), np.minimum(y.astype(int), height - 1)
        u, v = x - i, y - j
        upper = (1 - u) * total[j, i] + u * total[j, i + 1]
        lower = (1 - u) * total[j + 1, i] + u * total[j + 1, i + 1]
        return np.asarray((1 - v) * upper + v * lower)

    left, upper = coords[:, 0] / downsample[0], coords[:, 1] / downsample[1]
    right = (coords[:, 0] + size[0]) / downsample[0]
    lower = (coords[:, 1] + size[1]) / downsample[1]
    inside = upto(right, lower) - upto(left, lower) - upto(right, upper) + upto(left, upper)
    area = size[0] / downsample[0] * size[1] / downsample[1]
    return np.clip(inside / area, 0.0, 1.0)


def slide_tissue(slide: Slide, options: TissueOptions | None = None) -> TissueMask:
    """Find the tissue of a slide.

    Args:
        slide: The slide; its resolution has to be known.
        options: How tissue is told from glass.

    Raises:
        DataError: The resolution is not known, it is no RGB slide, or most of it is damaged.
    """
    options = options or TissueOptions()
    slide.refuse_channels()
    mpp = slide.facts.resolution()
    rgb, valid, downsample = slide.overview(options.most_px, options.mpp_um)
    area_mm2 = downsample[0] * mpp[0] * downsample[1] * mpp[1] / 1e6
    pen = _pen(rgb) & valid if options.remove_pen else np.zeros(valid.shape, bool)
    mask = tissue(rgb, valid & ~pen, options, pixel_mm2=area_mm2)
    return TissueMask(
        mask=mask, downsample=downsample, pen_fraction=float(pen.mean()) if pen.size else 0
    )


def tissue(
    rgb: Array, valid: Array, options: TissueOptions | None = None, *, pixel_mm2: float = 0.0
) -> Array:
    """Return where an overview shows tissue.

    Args:
        rgb: (H, W, 3) uint8.
        valid: (H, W) bool; False is never tissue.
        options: How tissue is told from glass.
        pixel_mm2: Area of a pixel; parts and holes are kept where it is 0.

    Returns:
        (H, W) bool.
    """
    ndimage = require("scipy.ndimage", "pathology")

    options = options or TissueOptions()
    if not valid.any():
        return np.zeros(valid.shape, bool)
    high, low = rgb.max(-1).astype(int), rgb.min(-1).astype(int)
    saturation = ((high - low) * 255 // np.maximum(high, 1)).astype(np.uint8)
    saturation = ndimage.median_filter(saturation, _MEDIAN)
    if options.method == "fixed":
        mask = saturation > options.saturation
    else:
        grey = ndimage.median_filter(rgb.mean(-1).astype(np.uint8), _MEDIAN)
        limit = np.clip(_otsu(saturation[valid]), *_SATURATION)
        dark = np.clip(_otsu(grey[valid]), *_BRIGHTNESS)
        mask = (saturation > limit) | (grey <= dark)
    mask &= valid
    if pixel_mm2 > 0:
        mask = _without_small(mask, options.min_part_mm2 / pixel_mm2)
        mask = ~_without_small(~mask, options.min_hole_mm2 / pixel_mm2) & valid
    return np.asarray(mask)


def _otsu(values: Array) -> int:
    """Return the threshold that parts a histogram of 256 best (Otsu 1979)."""
    share = np.bincount(values.ravel(), minlength=256) / max(values.size, 1)
    below, mean = np.cumsum(share), np.cumsum(share * np.arange(256))
    spread = below * (1 - below)
    between = np.where(spread > 0, (mean[-1] * below - mean) ** 2 / np.maximum(spread, 1e-12), 0)
    return int(np.argmax(between))


def _without_small(mask: Array, least: float) -> Array:
    """Drop connected parts of fewer pixels."""
    ndimage = require("scipy.ndimage", "pathology")

    parts, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    kept = sizes >= least
    kept[0] = False
    return np.asarray(kept[parts])


def _pen(rgb: Array) -> Array:
    """Return where felt pens have written: green, strongly blue, black."""
    ndimage = require("scipy.ndimage", "pathology")

    red, green, blue = (ndimage.median_filter(rgb[..., c], _MEDIAN).astype(int) for c in range(3))
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = high - low
    is_green = (green == high) & (green - red > 20) & (green >= blue - 10) & (chroma > 40)
    is_blue = (blue == high) & (green > red) & (chroma > 120)
    is_black = (high < 50) & (chroma < 20)
    return np.asarray(is_green | is_blue | is_black)
