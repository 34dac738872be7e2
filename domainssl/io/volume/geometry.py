"""Voxel grids in the world: RAS axis order, voxel sizes, and whether two grids are the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from domainssl.errors import DataError, require

__all__ = [
    "LPS_TO_RAS",
    "TOLERANCE",
    "Axes",
    "axis_codes",
    "check_same_grid",
    "displacement",
    "ras_affine",
    "ras_axes",
    "spacing_of",
    "to_ras",
]

Array = np.ndarray[Any, Any]
Axes = tuple[tuple[int, bool], tuple[int, bool], tuple[int, bool]]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
TOLERANCE = 0.1  # voxels of the finer grid


def ras_axes(affine: Array, path: str) -> Axes:
    """Return the stored axis that runs along X, Y and Z, and whether each is flipped.

    The choice is that of nibabel and MONAI, for which the result is in RAS order already.

    Args:
        affine: Voxel to RAS mm, (4, 4).
        path: The file, for messages.

    Raises:
        DataError: The affine is singular or not finite.
    """
    block = np.asarray(affine, np.float64)[:3, :3]
    sizes = np.linalg.norm(block, axis=0)
    is_good = np.isfinite(affine).all() and (sizes > 0).all()
    if not is_good or abs(np.linalg.det(block / sizes)) < 1e-4:
        rows = np.array2string(np.asarray(affine)[:3], precision=4, separator=", ")
        raise DataError(
            f"{path}: the affine of the header is singular or not finite: "
            f"{' '.join(rows.split())}; expected three independent directions. Correct the header."
        )
    found = require("nibabel", "medical").orientations.io_orientation(affine)
    axes = sorted((int(world), axis, bool(sign < 0)) for axis, (world, sign) in enumerate(found))
    (_, x, flip_x), (_, y, flip_y), (_, z, flip_z) = axes
    return (x, flip_x), (y, flip_y), (z, flip_z)


def axis_codes(axes: Axes) -> str:
    """Return the direction in which each stored axis runs, such as `LPS`."""
    codes = [""] * 3
    for (axis, is_flipped), code in zip(axes, ("RL", "AP", "SI"), strict=True):
        codes[axis] = code[is_flipped]
    return "".join(codes)


def to_ras(values: Array, axes: Axes) -> Array:
    """Return a view of (I, J, K) in RAS axis order, (X, Y, Z)."""
    turned = values.transpose([axis for axis, _ in axes])
    return turned[tuple(slice(None, None, -1 if is_flipped else 1) for _, is_flipped in axes)]


def ras_affine(affine: Array, sizes: Sequence[int], axes: Axes) -> Array:
    """Return the affine of the array that `to_ras` returns, (4, 4) float64.

    Args:
        affine: Voxel to RAS mm of the stored axes, (4, 4).
        sizes: Voxels along the stored axes.
        axes: From `ras_axes`.
    """
    result = np.eye(4)
    result[:3, 3] = affine[:3, 3]
    for column, (axis, is_flipped) in enumerate(axes):
        direction = np.asarray(affine, np.float64)[:3, axis]
        result[:3, column] = -direction if is_flipped else direction
        if is_flipped:
            result[:3, 3] += direction * (sizes[axis] - 1)
    return result + 0.0  # no negative zeros


def spacing_of(affine: Array) -> tuple[float, float, float]:
    """Return the voxel sizes in mm: the lengths of the affine's columns."""
    x, y, z = (float(size) for size in np.linalg.norm(affine[:3, :3], axis=0))
    return x, y, z


def displacement(affine: Array, other: Array, shape: Sequence[int]) -> tuple[float, float]:
    """Return how far the corners of a grid move at most between two affines: mm, and voxels.

    Args:
        affine: Voxel to RAS mm, (4, 4).
        other: The same of the other grid.
        shape: Voxels along the axes.

    Returns:
        The distance in mm, and in voxels of the finer grid: along each direction of either grid,
        divided by that direction's voxel size, the largest.
    """
    ends = [(0, max(0, size - 1)) for size in shape]
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*ends)])
    moved = (corners @ (np.asarray(other) - np.asarray(affine)).T)[:, :3]
    steps = [moved @ np.linalg.inv(np.asarray(grid)[:3, :3]).T for grid in (affine, other)]
    voxels = max(float(np.abs(step).max()) for step in steps)
    return float(np.linalg.norm(moved, axis=1).max()), voxels


def check_same_grid(
    reference: tuple[str, Sequence[int], Array],
    other: tuple[str, Sequence[int], Array],
    *,
    option: str = "resample_to: <contrast>",
) -> None:
    """Refuse two scans whose voxels do not lie at the same places.

    Args:
        reference: Name, shape (X, Y, Z) and affine (4, 4) of one.
        other: The same of the other.
        option: What resamples the other to the first, for the message.

    Raises:
        DataError: The shapes differ, or a corner of the grid moves by more than 0.1 voxel of the
            finer grid.
    """
    (name, shape, affine), (other_name, other_shape, other_affine) = reference, other
    if tuple(shape) == tuple(other_shape):
        distance, voxels = displacement(affine, other_affine, shape)
        if voxels <= TOLERANCE:
            return
        found = f"its corners lie up to {distance:.4g} mm ({voxels:.3g} voxels) off"
    else:
        ends = np.array([(*np.asarray(s) - 1, 1.0) for s in (shape, other_shape)])
        first = float(np.linalg.norm((np.asarray(other_affine) - np.asarray(affine))[:3, 3]))
        places = [a @ end for a, end in zip((affine, other_affine), ends, strict=True)]
        last = float(np.linalg.norm((places[1] - places[0])[:3]))
        sizes = [" × ".join(map(str, s)) for s in (other_shape, shape)]
        found = (
            f"it has {sizes[0]} voxels instead of {sizes[1]}, and its first and last corner lie "
            f"{first:.4g} and {last:.4g} mm off"
        )
    raise DataError(
        f"{other_name}: not on the grid of {name}: {found}; expected at most {TOLERANCE} voxel. "
        f"If both show the same anatomy in world coordinates, resample it with `{option}`."
    )
