"""Random fields that scenes of the embedded samples are made of: unit variance, (side, side)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from scipy.special import ndtri

__all__ = ["frequency", "layers", "slope", "shaped", "smooth"]

Array = np.ndarray[Any, Any]
Rng = np.random.Generator


@cache
def frequency(side: int) -> Array:
    """Return the cycles per pixel of every place of a half spectrum, float32."""
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    found = np.sqrt(rows**2 + columns**2).astype(np.float32)
    found.setflags(write=False)  # shared by all calls
    return found


def _unit(field: Array) -> Array:
    field = field - field.mean()
    return np.asarray(field / max(float(field.std()), 1e-6))


def shaped(rng: Rng, side: int, gain: Array) -> Array:
    """Return a field whose spectrum follows `gain`."""
    white = np.fft.rfft2(rng.standard_normal((side, side), np.float32))
    return _unit(np.fft.irfft2(white * gain, (side, side)).astype(np.float32))


def smooth(rng: Rng, side: int, length_px: float) -> Array:
    """Return a field with the correlation length given."""
    return shaped(rng, side, np.exp(-((frequency(side) * length_px * 2.0) ** 2)))


def layers(rng: Rng, side: int, spacing: float, small: float) -> Array:
    """Return bright and dark objects on even ground, large ones and small ones, (2, side, side).

    Large ones stand every `spacing` pixels, small ones every `small` of that. Bright and dark ones
    have one distribution, and large and small ones are independent, so that their sum and their
    difference have one, too; each layer has the variance 1/2.
    """
    found = []
    for length in (spacing, small * spacing):
        ring = np.exp(-(((frequency(side) - 1 / length) / (0.3 / length)) ** 2))
        field = shaped(rng, side, ring)
        found.append(_unit(np.sign(field) * (np.abs(field) - 0.6).clip(0, 0.8) ** 0.5))
    return np.stack(found) * np.float32(0.5**0.5)


def slope(rng: Rng, side: int, length_px: float, angle: float, share: float) -> Array:
    """Return hilly land that rises to one side, whose values are normally distributed.

    Args:
        rng: Source of the draw.
        side: Pixels along each side.
        length_px: Distance of hills.
        angle: Where it rises, radians from the rows, towards the first row.
        share: Of the variance that is the rise.
    """
    at = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    rise = (np.cos(angle) * at[None] - np.sin(angle) * at[:, None]) * 12**0.5
    ring = np.exp(-(((frequency(2 * side) - 1 / length_px) / (0.3 / length_px)) ** 2))
    hills = shaped(rng, 2 * side, ring)[:side, :side]
    field = share**0.5 * rise + (1 - share) ** 0.5 * hills
    values = np.empty(field.size, np.float32)
    values[np.argsort(field, axis=None)] = ndtri((np.arange(field.size) + 0.5) / field.size)
    return values.reshape(field.shape)
