"""From pixels of a level to pixels of a tile: area averages, with white and not valid outside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from domainssl.io.slide.facts import Region

__all__ = ["resampled"]

Array = np.ndarray[Any, Any]
Box = tuple[float, float, float, float]
_NEAR = 0.25  # pixels of the level by which a tile that needs no change of scale may be off
_WHITE = 255


def resampled(region: Region, box: Box, size: tuple[int, int]) -> tuple[Array, Array]:
    """Return a tile from the pixels of a level that lie under it.

    Args:
        region: The pixels that exist; those that are missing under the box are outside.
        box: Left, upper, right and lower edge of the tile in pixels of the level.
        size: Width and height of the tile in pixels.

    Returns:
        Values (H, W, C) of the region's type, white (the largest number) where not valid, and
        valid (H, W) bool.
    """
    left, upper = box[0] - region.origin[0], box[1] - region.origin[1]
    right, lower = box[2] - region.origin[0], box[3] - region.origin[1]
    values, valid = region.values, region.valid
    height, width = values.shape[:2]
    x, y = round(left), round(upper)
    is_copy = (
        max(abs(left - x), abs(upper - y)) <= _NEAR
        and abs(right - x - size[0]) <= 2 * _NEAR
        and abs(lower - y - size[1]) <= 2 * _NEAR
    )
    if is_copy:
        left, upper, right, lower = x, y, x + size[0], y + size[1]
    # what sticks out by less than the origin of a region may be off is no edge
    before = max(0, math.ceil(-left - _NEAR)), max(0, math.ceil(-upper - _NEAR))
    after = (
        max(0, math.ceil(right - width - _NEAR)),
        max(0, math.ceil(lower - height - _NEAR)),
    )
    if any(before) or any(after):
        if valid is None:
            valid = np.ones((height, width), bool)
        ends = ((before[1], after[1]), (before[0], after[0]))
        values, valid = np.pad(values, (*ends, (0, 0))), np.pad(valid, ends)
        left, right = left + before[0], right + before[0]
        upper, lower = upper + before[1], lower + before[1]
        height, width = valid.shape
    if is_copy:
        cut = np.s_[int(upper) : int(lower), int(left) : int(right)]
        values, valid = values[cut], None if valid is None else valid[cut]
    else:
        inside = (max(left, 0.0), max(upper, 0.0), min(right, width), min(lower, height))
        values, valid = _scaled(values, valid, inside, size)
    if valid is None:
        return np.ascontiguousarray(values), np.ones(values.shape[:2], bool)
    white = _WHITE if values.dtype == np.uint8 else np.iinfo(values.dtype).max
    return np.where(valid[..., None], values, values.dtype.type(white)), valid


def _scaled(
    values: Array, valid: Array | None, box: Box, size: tuple[int, int]
) -> tuple[Array, Array | None]:
    """Resize; pixels that are not valid take no part in their neighbours' averages."""
    from PIL import Image

    factors = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
    is_whole = all(abs(factor - round(factor)) < 1e-3 and factor >= 1 for factor in factors)
    # the box counts whole pixels only; the window in between comes closest to an area average
    how = Image.Resampling.BOX if is_whole else Image.Resampling.HAMMING
    if values.dtype == np.uint8 and values.shape[-1] == 3:
        if valid is None or valid.all():
            picture = Image.fromarray(np.ascontiguousarray(values))
            return np.asarray(picture.resize(size, how, box)), None
        # the weights of Pillow's alpha are those of an average over the valid pixels
        alpha = np.where(valid, 255, 0).astype(np.uint8)
        picture = Image.fromarray(np.dstack([values, alpha]))
        done = np.asarray(picture.resize(size, how, box))
        return done[..., :3], done[..., 3] >= 128
    return _scaled_channels(values, valid, box, size)


def _scaled_channels(
    values: Array, valid: Array | None, box: Box, size: tuple[int, int]
) -> tuple[Array, Array | None]:
    from PIL import Image

    def resized(plane: Array) -> Array:
        picture = Image.fromarray(np.ascontiguousarray(plane, np.float32))
        return np.asarray(picture.resize(size, Image.Resampling.HAMMING, box))

    weight = None if valid is None else resized(valid)
    planes = []
    for c in range(values.shape[-1]):
        plane = values[..., c].astype(np.float32)
        if valid is None or weight is None:
            planes.append(resized(plane))
        else:
            planes.append(resized(np.where(valid, plane, 0)) / np.maximum(weight, 1e-6))
    limits = np.iinfo(values.dtype)
    done = np.clip(np.rint(np.stack(planes, -1)), limits.min, limits.max).astype(values.dtype)
    return done, None if weight is None else weight >= 0.5
