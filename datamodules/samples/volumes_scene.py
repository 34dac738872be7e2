"""Random fields and shapes on a grid of voxels, in millimetres, for the phantoms of the samples.

The class of a phantom is how the texture of its tissue is layered (`PATTERNS`). All patterns have
the same mean, variance and Gaussian distribution of values, so nothing but their arrangement in
space tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "PATTERNS", "UPRIGHT_PATTERNS", "Grid", "ellipsoid", "grain", "layered", "shaped", "smooth",
    "upright",
]  # fmt: skip

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

# the plane that layers are parallel to; diffuse: none
PATTERNS = ("sagittal", "coronal", "axial", "diffuse")
# those that a turn about the z axis leaves as they are; fibres: along z; lattice: both, half each
UPRIGHT_PATTERNS = ("axial", "fibres", "lattice", "diffuse")


@dataclass(frozen=True)
class Grid:
    """Voxels along x (to the right), y (to the front) and z (to the head).

    Attributes:
        shape: (X, Y, Z).
        spacing_mm: Size of a voxel per axis.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    def places(self) -> Array:
        """Return where voxels are from the centre of the grid, mm, float32 (3, X, Y, Z)."""
        axes = [
            (np.arange(n, dtype=np.float32) - (n - 1) / 2) * step
            for n, step in zip(self.shape, self.spacing_mm, strict=True)
        ]
        return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)

    def frequencies(self) -> Array:
        """Return the frequencies of `rfftn`, cycles per mm, float32 (3, X, Y, Z // 2 + 1)."""
        *ends, last = zip(self.shape, self.spacing_mm, strict=True)
        axes = [np.fft.fftfreq(n, step) for n, step in ends] + [np.fft.rfftfreq(*last)]
        return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def ellipsoid(
    places: Array, centre_mm: Sequence[float] | Array, radii_mm: Sequence[float] | Array
) -> Array:
    """Return the distance from the centre in units of the radii: 1 on the surface, (X, Y, Z)."""
    offsets = places - np.reshape(np.asarray(centre_mm, np.float32), (3, 1, 1, 1))
    scaled = offsets / np.reshape(np.asarray(radii_mm, np.float32), (3, 1, 1, 1))
    return np.asarray(np.sqrt((scaled**2).sum(0)))


def shaped(rng: Rng, grid: Grid, gain: Array) -> Array:
    """Return a random field with zero mean and unit variance whose spectrum follows `gain`."""
    white = np.fft.rfftn(rng.standard_normal(grid.shape, np.float32))
    field = np.fft.irfftn(white * gain, grid.shape, axes=(0, 1, 2)).astype(np.float32)
    field -= field.mean()
    return np.asarray(field / max(float(field.std()), 1e-6))


def smooth(rng: Rng, grid: Grid, length_mm: float) -> Array:
    """Return a unit-variance field with the correlation length given."""
    squared = (grid.frequencies() ** 2).sum(0)
    return shaped(rng, grid, np.exp(-4 * length_mm**2 * squared))


def grain(rng: Rng, grid: Grid, periods_mm: tuple[float, float]) -> Array:
    """Return a unit-variance field without direction, its period drawn between two lengths."""
    frequency = np.sqrt((grid.frequencies() ** 2).sum(0))
    centre = 1 / rng.uniform(*periods_mm)
    return shaped(rng, grid, np.exp(-(((frequency - centre) / (0.3 * centre)) ** 2)))


def layered(
    rng: Rng, grid: Grid, pattern: int, period_mm: float, spread: float = 0.3, tilt: float = 0.35
) -> Array:
    """Return a unit-variance Gaussian field with the layers of a pattern.

    Args:
        rng: Source of the draw.
        grid: Voxels.
        pattern: Position in `PATTERNS`.
        period_mm: Distance between layers.
        spread: Width of the band of frequencies over its centre.
        tilt: Departure of the layers from their plane: how soon they change along it.
    """
    centre = 1 / period_mm
    frequencies = grid.frequencies()
    squared = (frequencies**2).sum(0)
    if PATTERNS[pattern] == "diffuse":
        return shaped(rng, grid, np.exp(-(((np.sqrt(squared) - centre) / (spread * centre)) ** 2)))
    across = np.abs(frequencies[pattern])
    along = (squared - across**2) / (tilt * centre) ** 2
    return shaped(rng, grid, np.exp(-(((across - centre) / (spread * centre)) ** 2) - along))


def upright(
    rng: Rng, grid: Grid, pattern: int, period_mm: float, spread: float = 0.3, tilt: float = 0.35
) -> Array:
    """Return a unit-variance Gaussian field with a pattern of `UPRIGHT_PATTERNS`; see `layered`."""
    name = UPRIGHT_PATTERNS[pattern]
    if name in PATTERNS:
        return layered(rng, grid, PATTERNS.index(name), period_mm, spread, tilt)
    centre = 1 / period_mm
    frequencies = grid.frequencies()
    across, along = np.hypot(frequencies[0], frequencies[1]), frequencies[2]
    gain = np.exp(-(((across - centre) / (spread * centre)) ** 2) - (along / (tilt * centre)) ** 2)
    fibres = shaped(rng, grid, gain)
    if name == "fibres":
        return fibres
    layers = layered(rng, grid, PATTERNS.index("axial"), period_mm, spread, tilt)
    return np.asarray((fibres + layers) / np.float32(2**0.5))
