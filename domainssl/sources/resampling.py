"""Scans, validity and labels on another grid of voxels, by MONAI's resampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from domainssl.errors import require

__all__ = ["resample_labels", "resample_scan", "straight_grid"]

Array = np.ndarray[Any, Any]
_WHOLLY = 0.999  # share of valid voxels that an interpolated one is made of


def straight_grid(
    shape: Sequence[int], affine: Array, spacing_mm: Sequence[float]
) -> tuple[tuple[int, ...], Array]:
    """Return shape and affine of the straight grid of a voxel size over the same box.

    Args:
        shape: Voxels along X, Y, Z.
        affine: Voxel to RAS mm, (4, 4); a shear, as of a tilted gantry, is taken away.
        spacing_mm: Voxel size along X, Y, Z.
    """
    utils: Any = require("monai.data.utils", "medical")
    out = utils.zoom_affine(affine, spacing_mm, diagonal=False)
    sizes, offset = utils.compute_shape_offset(shape, affine, out)
    out[:3, 3] = np.asarray(offset)[:3]
    return tuple(int(n) for n in sizes), out


def resample_scan(
    values: Array, valid: Array, affine: Array, shape: Sequence[int], to: Array
) -> tuple[Array, Array]:
    """Return values (C, *shape), float32, and validity (*shape) on another grid, linearly.

    A voxel is valid only if every voxel that it was interpolated from is.

    Args:
        values: (C, X, Y, Z).
        valid: True where a voxel was measured, (X, Y, Z).
        affine: Voxel to RAS mm, (4, 4).
        shape: Voxels of the other grid.
        to: Its affine, (4, 4).
    """
    weight = _resample(valid[None], affine, shape, to, "bilinear")[0]
    return _resample(values, affine, shape, to, "bilinear"), weight > _WHOLLY


def resample_labels(
    labels: Array, affine: Array, shape: Sequence[int], to: Array, *, outside: int = 0
) -> Array:
    """Return labels (*shape) of the nearest voxel on another grid; see `resample_scan`.

    Args:
        labels: Whole numbers, (X, Y, Z).
        affine: Voxel to RAS mm, (4, 4).
        shape: Voxels of the other grid.
        to: Its affine, (4, 4).
        outside: Label beyond the labels' own grid.
    """
    moved = _resample(labels[None].astype(np.int64) - outside, affine, shape, to, "nearest")[0]
    return np.asarray(moved.round().astype(np.int64) + outside)


def _resample(values: Array, affine: Array, shape: Sequence[int], to: Array, mode: str) -> Array:
    """Resample (C, X, Y, Z); outside of the values' own grid there are zeros."""
    transforms: Any = require("monai.transforms", "medical")
    meta: Any = require("monai.data.meta_tensor", "medical")
    tensor = meta.MetaTensor(
        torch.from_numpy(values.astype(np.float32)), affine=torch.from_numpy(affine)
    )
    resample = transforms.SpatialResample(mode=mode, padding_mode="zeros", dtype=np.float32)
    out = resample(tensor, dst_affine=torch.from_numpy(to), spatial_size=tuple(shape))
    return np.asarray(out.as_tensor().numpy())
