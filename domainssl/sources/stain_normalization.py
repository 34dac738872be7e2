"""Bring the colours of a tile to those of a reference: Macenko for H&E, Reinhard for any stain."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["NORMALIZATIONS", "macenko", "macenko_vectors", "normalized", "reinhard"]

NORMALIZATIONS = ("none", "macenko", "reinhard")
Array = np.ndarray[Any, Any]

_LIGHT = 240.0  # what passes glass
_LEAST_DENSITY = 0.15
_TAIL = 1.0  # percent of the angles beyond a stain
_LEAST_TISSUE = 0.01  # of the valid pixels; a tile with less has no stains to estimate
_TARGET = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])  # columns H, E
_TARGET_MOST = np.array([1.9705, 1.0308])
_TO_CONES = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_TO_OPPONENTS = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ [[1, 1, 1], [1, 1, -2], [1, -1, 0]]
_REINHARD_MEAN = np.array([8.63234435, -0.11501964, 0.03868433])
_REINHARD_STD = np.array([0.57506023, 0.10403329, 0.01364062])


def normalized(colors: Array, valid: Array, method: str) -> Array:
    """Return the colours of a tile after one of `NORMALIZATIONS`.

    Args:
        colors: (H, W, 3) uint8.
        valid: bool (H, W); other pixels neither count nor change.
        method: One of `NORMALIZATIONS`.
    """
    if method == "none":
        return colors
    return macenko(colors, valid) if method == "macenko" else reinhard(colors, valid)


def macenko_vectors(density: Array) -> Array | None:
    """Estimate how hematoxylin and eosin absorb.

    Args:
        density: Optical densities of tissue, (N, 3).

    Returns:
        (3, 2), columns hematoxylin and eosin of unit length; None where densities span no plane.
    """
    if len(density) < 3:
        return None
    values, vectors = np.linalg.eigh(np.cov(density.T))
    if values[1] <= 1e-9 * max(values[2], 1e-9):
        return None
    plane = vectors[:, 1:]
    along = density @ plane
    angles = np.arctan2(along[:, 1], along[:, 0])
    ends = np.percentile(angles, (_TAIL, 100 - _TAIL))
    found: Array = plane @ np.array([np.cos(ends), np.sin(ends)])
    return found if found[0, 0] > found[0, 1] else found[:, ::-1]  # hematoxylin takes more red


def macenko(colors: Array, valid: Array) -> Array:
    """Return H&E colours with the stains of the reference; a tile without tissue as it is.

    Args:
        colors: (H, W, 3) uint8.
        valid: bool (H, W).

    Source: Macenko et al., ISBI 2009; constants of MONAI's NormalizeHEStains. That takes the vector
    with the lower ratio of red to blue density for hematoxylin, which is eosin; here hematoxylin
    is the one that absorbs more red. Amounts below 0 become 0.
    """
    pixels = colors[valid].astype(np.float64) + 1.0
    density = -np.log(pixels.clip(max=_LIGHT) / _LIGHT)
    tissue = (density > _LEAST_DENSITY).all(1)
    if tissue.sum() < max(3, _LEAST_TISSUE * len(density)):
        return colors
    vectors = macenko_vectors(density[tissue])
    if vectors is None:
        return colors
    amounts = np.linalg.lstsq(vectors, density.T, rcond=None)[0].clip(min=0)  # (2, N)
    most = np.percentile(amounts, 99, axis=1)
    if most.min() <= 1e-6:
        return colors
    amounts *= (_TARGET_MOST / most)[:, None]
    return _changed(colors, valid, _LIGHT * np.exp(-_TARGET @ amounts).T)


def reinhard(colors: Array, valid: Array) -> Array:
    """Return colours whose mean and deviation in the opponent space are those of the reference.

    Only tissue counts and changes: what absorbs light. A tile without tissue stays as it is.

    Args:
        colors: (H, W, 3) uint8.
        valid: bool (H, W).

    Source: Reinhard et al., 2001; reference statistics of HistomicsTK, of an H&E slide of TCGA.
    """
    pixels = colors.astype(np.float64) + 1.0
    is_tissue = valid & (-np.log(pixels.clip(max=_LIGHT) / _LIGHT) > _LEAST_DENSITY).any(-1)
    if is_tissue.sum() < max(3, _LEAST_TISSUE * valid.sum()):
        return colors
    space = np.log(pixels[is_tissue] @ _TO_CONES.T) @ _TO_OPPONENTS.T  # (N, 3)
    spread = space.std(0)
    if spread.min() <= 1e-6:
        return colors
    space = (space - space.mean(0)) / spread * _REINHARD_STD + _REINHARD_MEAN
    back = np.exp(space @ np.linalg.inv(_TO_OPPONENTS).T) @ np.linalg.inv(_TO_CONES).T
    return _changed(colors, is_tissue, back - 1.0)


def _changed(colors: Array, where: Array, values: Array) -> Array:
    out = colors.copy()
    out[where] = values.clip(0, 255).round().astype(np.uint8)
    return out
