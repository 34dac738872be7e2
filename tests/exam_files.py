"""Small scans with a bright spot at a known place of the world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

__all__ = ["SPOT_MM", "spot", "spot_scan", "write_scan"]

SPOT_MM = (-12.0, 21.0, 33.0)  # RAS


def write_scan(path: Path, values: np.ndarray[Any, Any], affine: np.ndarray[Any, Any]) -> Path:
    """Write an array (X, Y, Z) with its affine to RAS mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


def spot_scan(
    path: Path,
    *,
    codes: str = "RAS",
    shape: Sequence[int] = (40, 36, 30),
    spacing: Sequence[float] = (2.0, 2.0, 3.0),
    background: int = 40,
    peak: int = 1000,
    at_mm: Sequence[float] = SPOT_MM,
    air: int = -1000,
    noise: int = 0,
) -> Path:
    """Write a body in air with a bright spot of 6 mm at a place, stored in an orientation."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-45.0, -20.0, -10.0)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    inside = (grid >= 4).all(-1) & (grid < np.array(shape) - 4).all(-1)
    values = np.where(inside, background, air).astype(np.int16)
    if noise:
        rng = np.random.default_rng(0)
        values[inside] += rng.integers(-noise, noise, inside.sum(), dtype=np.int16)
    values[np.linalg.norm(world - np.array(at_mm), axis=-1) <= 4.0] = peak
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(tuple(codes)))
    stored = nibabel.orientations.apply_orientation(values, turn)
    return write_scan(path, stored, affine @ inv_ornt_aff(turn, values.shape))


def spot(values: np.ndarray[Any, Any], affine: Any) -> np.ndarray[Any, Any]:
    """Return the place in mm of the bright voxels of an array (X, Y, Z), their centre."""
    bright = np.argwhere(values > 0.6 * values.max()).mean(0)
    return np.asarray((np.asarray(affine) @ [*bright, 1.0])[:3])
