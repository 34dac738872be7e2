"""A year of vegetation and what Sentinel-1 and Sentinel-2 make of it, for the series samples.

What grows where is told by *when* it is green, not by how green: the kinds have seasons of one
length and form at four times of the year, further apart than those of real plants. So mean and
spread over a year do not tell kinds apart; gains, levels and amplitudes are drawn anew for each
place, so a single date tells little either. Whoever knows the season can say what a date that is
hidden looks like, which is what methods learn that reconstruct.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BANDS", "cloud_cover", "greenness", "optical_series", "radar_series"]

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
_SOIL = np.array([6, 9, 12, 15, 17, 18, 20, 21, 27, 22], np.float32) / 100
_LEAF = np.array([2, 5, 3, 8, 24, 30, 33, 34, 15, 7], np.float32) / 100
_HAZE = np.array([10, 8, 6, 5, 4, 4, 3, 3, 1, 1], np.float32) / 100
_CLOUD = np.array([70, 70, 71, 72, 73, 74, 74, 75, 50, 42], np.float32) / 100
# middle of the season of each kind, half its length, and how gradually it begins and ends, in days
_MIDDLE = np.array([70, 145, 220, 295], np.float32)
_HALF, _EDGE, _YEAR = 60.0, 9.0, 365.25


def greenness(kind: int, day_of_year: Array, shift: float = 0.0) -> Array:
    """Return how green a kind is, 0..1.

    Args:
        kind: 0..3.
        day_of_year: Days, any shape.
        shift: Days by which all seasons of the place are late.
    """
    day = np.asarray(day_of_year, np.float32) - shift - _MIDDLE[kind]
    distance = np.abs((day + _YEAR / 2) % _YEAR - _YEAR / 2)
    return 1 / (1 + np.exp((distance - _HALF) / _EDGE))


def cloud_cover(rng: Rng, dates: int, height: int, width: int, cloudy: float = 0.35) -> Array:
    """Return the probability of cloud in percent, whole numbers, float32 (T, H, W)."""
    out = np.zeros((dates, height, width), np.float32)
    for t in np.flatnonzero(rng.random(dates) < cloudy):
        ramp = np.linspace(-1, 1, height)[:, None] * rng.normal()
        ramp = ramp + np.linspace(-1, 1, width)[None] * rng.normal()
        out[t] = np.round(100 * np.clip(ramp + rng.uniform(-0.3, 1.6), 0, 1))
    return out


def optical_series(rng: Rng, green: Array, cloud: Array, *, is_varied: bool = False) -> Array:
    """Return Sentinel-2 digital numbers of a place.

    Args:
        rng: Source of all draws.
        green: Share of leaves, 0..1, (T, H, W).
        cloud: Cloud in percent, (T, H, W).
        is_varied: Draw how bright soil and leaves are for each pixel instead of for all.

    Returns:
        Whole numbers from 1 on, float32 (T, 10, H, W).
    """
    dates, height, width = green.shape
    cells = (height, width) if is_varied else (1, 1)
    soil = _spectra(rng, _SOIL, 0.12, cells)
    leaf = _spectra(rng, _LEAF, 0.08, cells)
    # dew, drought and view change how green a day looks: neighbouring dates do not tell all
    g = np.clip(green + rng.normal(0, 0.15, (dates, 1, 1)), 0, 1)[:, None]  # (T, 1, H, W)
    x = g * leaf + (1 - g) * soil
    x = x * np.exp(rng.normal(0, 0.05, (dates, 1, 1, 1)))  # sun and view
    x = x + rng.gamma(1.5, 0.08, (dates, 1, 1, 1)) * _HAZE[:, None, None]
    x = x * np.exp(rng.normal(0, 0.03, (dates, 10, height, width)))
    veil = cloud[:, None] / 100
    x = (1 - veil) * x + veil * _CLOUD[:, None, None] * rng.uniform(0.6, 1.2, (dates, 1, 1, 1))
    return np.clip(np.round(x * 10_000), 1, 16_000).astype(np.float32)


def _spectra(rng: Rng, bands: Array, spread: float, shape: tuple[int, int]) -> Array:
    """Return a spectrum per pixel, of another brightness and hue than `bands`, (10, H, W)."""
    brightness = np.exp(rng.normal(0, spread, (1, *shape)))
    hue = np.exp(rng.normal(0, 0.02, (len(bands), *shape)))
    return np.asarray(bands[:, None, None] * brightness * hue)


def radar_series(rng: Rng, green: Array, level_db: float | Array) -> Array:
    """Return Sentinel-1 backscatter in dB, float32 (T, 2, H, W).

    Args:
        rng: Source of all draws.
        green: Share of leaves, 0..1, (T, H, W).
        level_db: Level of the place in VV, of all pixels or each, (H, W).
    """
    dates = len(green)
    wet = rng.normal(0, 0.5, (dates, 1, 1))
    vv = level_db + wet - 2.5 * green
    vh = level_db - 6.0 + 0.6 * wet - 5.0 * green
    x = np.stack([vv, vh], 1)  # (T, 2, H, W)
    return (x + rng.normal(0, 0.5, x.shape)).astype(np.float32)
