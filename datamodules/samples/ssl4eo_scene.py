"""Latent factors of one sample location, and what radar and optical sensors make of them.

Land cover, season and terrain are shared by both sensors; roughness reaches the radar alone, haze
and cloud the optical sensor alone. A location is open land with objects on it, large ones and
small ones, as many bright as dark; land cover is what kind of objects. The large ones of a kind
change VH as they change VV, or the other way round, and so do the small ones; and in its own way
visible, near-infrared and short-wave light change together or against each other. Every band
alone is the same mixture of large and small, bright and dark objects in all covers, and levels
and tones are drawn for each location and sensor anew, so that the histograms of the bands, their
means, spreads and percentiles, do not tell the covers apart: which bands change together does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from domainssl.datamodules.samples.fields import frequency, layers, shaped, smooth
from domainssl.sensors import L1C_BANDS

__all__ = ["COVERS", "DATES", "SIDE", "Location", "draw_location", "optical", "radar"]

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

SIDE = 132
DATES = 4
COVERS = ("trees", "ponds", "roofs", "clearings")

_WAVELENGTH_UM = np.array(
    [0.443, 0.493, 0.560, 0.665, 0.704, 0.741, 0.783, 0.833, 0.865, 0.945, 1.374, 1.614, 2.202],
    np.float32,
)
# reflectance of bare soil, leaves and dry matter in the bands of L1C
_SOIL = np.array([9, 11, 14, 18, 20, 22, 23, 24, 25, 26, 1, 31, 28], np.float32) / 100
_LEAF = np.array([3, 4, 7, 4, 10, 26, 33, 35, 36, 37, 1, 19, 9], np.float32) / 100
_DRY = np.array([7, 9, 12, 16, 19, 23, 26, 28, 30, 31, 1, 34, 25], np.float32) / 100
# how (large, small) objects of each cover change VH where they brighten VV
_SENSE = np.array([[-1, 1], [-1, -1], [1, 1], [1, -1]], np.float32)
# how objects of each cover change (visible, near-infrared, short-wave) light
_HUE = np.array([[1, 1, 1], [1, 1, -1], [1, -1, -1], [1, -1, 1]], np.float32)
_LIGHT = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])  # which of the three a band sees
_IS_NEAR_INFRARED = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0])
_SMALL = 0.4  # distance of small objects, in that of large ones
_STEP_PX = {10: 1, 20: 2, 60: 6}
_RESOLUTION_M = (60, 10, 10, 10, 20, 20, 20, 10, 20, 60, 60, 20, 20)


@dataclass(kw_only=True)
class Location:
    """Latent factors of one location.

    Attributes:
        label: Dominant cover.
        cover: Cover of each pixel, uint8 (Y, X).
        objects: Large and small objects, bright and dark, zero mean, variance 1/2, (2, Y, X).
        terrain: Heights, unit variance, (Y, X).
        relief: Strength of the terrain, 0..1.
        wetness: Water in the ground, 0..1.
        strength: Contrast of the objects in both sensors, about 1.
        greenness: Vegetation state at each date, 0..1, (T,).
        roughness: What the radar alone sees, unit variance, (Y, X).
        factors: Numbers that describe the location, for the factor table.
    """

    label: int
    cover: Array
    objects: Array
    terrain: Array
    relief: float
    wetness: float
    strength: float
    greenness: Array
    roughness: Array
    factors: dict[str, float]

    def echo(self) -> Array:
        """Return how objects change VV and VH, float32 (2, Y, X)."""
        both = [self.objects, self.objects * _SENSE.T[:, self.cover]]
        return np.asarray(np.stack(both).sum(1))

    def light(self) -> Array:
        """Return how they change visible, near- and short-wave infrared light, (3, Y, X)."""
        return np.asarray(self.objects.sum(0) * _HUE.T[:, self.cover])


def draw_location(rng: Rng, label: int, month: Array) -> Location:
    """Draw the factors of a location.

    Args:
        rng: Source of all draws.
        label: The cover that shall dominate.
        month: Months since January of each date, (T,).
    """
    fields = np.stack([smooth(rng, SIDE, 11) for _ in COVERS])
    share = rng.uniform(0.8, 0.95)
    fields[label] += _boost(fields, label, share)
    cover = fields.argmax(0).astype(np.uint8)
    spacing = rng.uniform(12.0, 20.0)
    green, swing, peak = rng.uniform(0.4, 0.6), rng.uniform(0.03, 0.08), rng.uniform(0, 12)
    relief, wetness = rng.uniform(0.0, 0.2), rng.uniform(0.4, 0.6)
    strength = np.exp(rng.uniform(-0.4, 0.4))
    return Location(
        label=label,
        cover=cover,
        objects=layers(rng, SIDE, spacing, _SMALL),
        terrain=shaped(rng, SIDE, 1 / np.maximum(frequency(SIDE), 0.5 / SIDE) ** 1.8),
        relief=relief,
        wetness=wetness,
        strength=float(strength),
        greenness=(green + swing * np.cos(2 * np.pi * (month - peak) / 12)).astype(np.float32),
        roughness=smooth(rng, SIDE, 8),
        factors={
            "share": float((cover == label).mean()),
            "spacing_px": float(spacing),
            "strength": float(strength),
            "greenness": float(green),
            "wetness": float(wetness),
            "relief": float(relief),
        },
    )


def _boost(fields: Array, label: int, share: float) -> float:
    """Return what to add to one field so that it is the largest on `share` of the pixels."""
    others = np.delete(fields, label, 0).max(0)
    return float(np.quantile(others - fields[label], share))


def radar(rng: Rng, place: Location, looks_east: bool) -> tuple[Array, dict[str, float]]:
    """Return backscatter in dB, float16 (T, 2, Y, X), and what of its level radar alone sees."""
    contrast = 3.5 * place.strength * np.exp(rng.normal(0, 0.05))
    slope = np.gradient(place.terrain, axis=1) * (1 if looks_east else -1)
    fixed = np.float32(contrast) * place.echo()
    fixed += 6.0 * place.relief * slope
    fixed += np.array([0.7, 0.35], np.float32)[:, None, None] * place.roughness
    own = rng.normal(0, 0.4, 2)
    level = np.array([-12.0, -19.0], np.float32) + own.astype(np.float32)
    out = np.empty((DATES, 2, SIDE, SIDE), np.float16)
    for date in range(DATES):
        green, wet = place.greenness[date] - 0.5, place.wetness - 0.5
        shift = np.array([8 * wet + 2 * green, 4 * wet + 10 * green], np.float32)
        speckle = rng.standard_normal((2, SIDE, SIDE), np.float32)
        base = level + shift + rng.normal(0, 0.2, 2).astype(np.float32)
        values = fixed + base[:, None, None] + speckle
        out[date] = np.round(values * 2) / 2  # steps of 0.5 dB: less to store
    return out, {"level_vv_db": float(own[0]), "level_vh_db": float(own[1])}


def optical(
    rng: Rng, place: Location, cloudy: Array
) -> tuple[Array, Array, Array, dict[str, float]]:
    """Return reflectance at the surface and at the top of the atmosphere, and the cloud mask.

    Args:
        rng: Source of all draws.
        place: The location.
        cloudy: Which dates have clouds, bool (T,).

    Returns:
        L2A and L1C reflectance in the 13 bands of L1C, float32 (T, 13, Y, X), the mask classes,
        uint8 (T, Y, X), and the tones that the optical sensor alone sees.
    """
    mixes = rng.dirichlet([12, 12, 12], len(COVERS)).astype(np.float32)
    mixes = 0.15 * mixes + 0.85 * mixes.mean(0)  # colours of the covers hardly differ
    contrast = 0.3 * place.strength * np.exp(rng.normal(0, 0.05))
    change = np.float32(contrast) * place.light()
    slope = np.gradient(place.terrain, axis=0) + 0.5 * np.gradient(place.terrain, axis=1)
    surface = np.empty((DATES, len(L1C_BANDS), SIDE, SIDE), np.float32)
    top = np.empty_like(surface)
    mask = np.zeros((DATES, SIDE, SIDE), np.uint8)
    tone = rng.normal(0, 0.05, 2)
    relative = np.log(_WAVELENGTH_UM / 0.8)
    for date in range(DATES):
        green = place.greenness[date]
        weights = mixes * np.array([1.0, 4 * green, 2 * (1 - green)], np.float32)
        weights /= weights.sum(1, keepdims=True)
        spectra = weights @ np.stack([_SOIL, _LEAF, _DRY])  # (covers, bands)
        gain = np.exp((tone + rng.normal(0, 0.02, 2)).astype(np.float32)[_IS_NEAR_INFRARED])
        gain *= np.exp(-0.9 * (place.wetness - 0.5) * (1.2 + relative))
        bias = rng.normal(0, 0.004) * np.ones(13, np.float32)
        haze = 0.015 * np.exp(0.3 * smooth(rng, SIDE, 30) + rng.normal(0, 0.3))
        sun = rng.uniform(0.6, 1.4) * place.relief * slope
        thick, thin, shade = _clouds(rng) if cloudy[date] else (None, None, None)
        for step in _STEP_PX.values():
            bands = [b for b, m in enumerate(_RESOLUTION_M) if _STEP_PX[m] == step]
            cover = place.cover[step // 2 :: step, step // 2 :: step]
            ground = spectra[:, bands].T[:, cover] * np.exp(_coarse(sun, step))
            ground *= _stand_out(change, step)[_LIGHT[bands]]
            ground = ground * gain[bands, None, None] + bias[bands, None, None]
            ground += 0.001 * rng.standard_normal(ground.shape, np.float32)
            veil = _coarse(haze, step) * (_WAVELENGTH_UM[bands, None, None] / 0.49) ** -1.3
            surface[date, bands] = _fine((ground + 0.6 * veil).clip(0.002, 1.1), step)
            top[date, bands] = _fine((0.85 * ground + 0.03 + 2 * veil).clip(0.002, 1.1), step)
        top[date, 10] = 0.0015 + 0.0005 * rng.standard_normal()
        if thick is not None and thin is not None and shade is not None:
            for image in (surface[date], top[date]):
                image *= 1 - 0.5 * shade
                image += thin * (0.35 - 0.5 * image) + thick * (0.75 - image)
            mask[date][shade[0] > 0.5] = 5
            mask[date][thin[0] > 0.2] = 3
            mask[date][thick[0] > 0.5] = 4
    return surface, top, mask, {"tone_visible": float(tone[0]), "tone_infrared": float(tone[1])}


def _stand_out(change: Array, step: int) -> Array:
    """Return what objects multiply reflectance by on pixels `step` times as large, (3, Y, X)."""
    coarse = np.stack([_coarse(field, step) for field in change])
    if step == 2:  # keep the spread
        coarse *= (change.std((1, 2)) / coarse.std((1, 2)))[:, None, None]
    return (1 + coarse).clip(0.1)


def _clouds(rng: Rng) -> tuple[Array, Array, Array]:
    """Return thick cloud, thin cloud and shadow, 0..1, (1, Y, X)."""
    field = smooth(rng, SIDE, 12)
    level = rng.uniform(1.2, 2.2)
    thick = np.clip((field - level) * 6, 0, 1)
    thin = np.clip((field - level + 0.4) * 2, 0, 0.6) * (1 - thick)
    shade = np.roll(thick, tuple(rng.integers(4, 12, 2)), (0, 1)) * (thick < 0.1) * (thin < 0.1)
    return thick[None], thin[None], shade[None]


def _coarse(field: Array, step: int) -> Array:
    n = SIDE // step
    return field if step == 1 else field.reshape(n, step, n, step).mean((1, 3))


def _fine(field: Array, step: int) -> Array:
    return field if step == 1 else field.repeat(step, -2).repeat(step, -1)
