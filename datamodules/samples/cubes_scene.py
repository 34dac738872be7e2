"""Fields of the cube sample: what grows on them, and what both sensors see of it over a year.

A crop shows itself twice. Its objects (rows, clumps) are large and small, bright and dark; the
large ones change VH as they change VV, or the other way round, and so do the small ones, and
visible, near-infrared and short-wave light change together or against each other. That is the
crop's own on nine fields of ten, and another crop's on the tenth; one date is enough to see it,
but no histogram of a band tells it. And it greens in a season of its own, always, but on a
level that differs from field to field more than seasons do: only several dates tell it. Levels,
gains, haze and moisture are drawn for each field and date anew, so that band means of one date
tell little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from domainssl.datamodules.samples import fields

__all__ = [
    "CROPS", "FIELD", "Field", "draw_field", "draw_objects", "optical", "radar", "smooth",
]  # fmt: skip

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

FIELD = 64  # pixels along the side
CROPS = ("winter_crop", "orchard", "summer_crop", "meadow")

_TYPICAL = 0.9  # share of fields whose objects are those of their crop
_PEAK_MONTH = np.array([1.5, 4.5, 7.5, 10.5])
# how (large, small) objects of each crop change VH where they brighten VV
_SENSE = np.array([[-1, 1], [-1, -1], [1, 1], [1, -1]], np.float32)
# how objects of each crop change (visible, near-infrared, short-wave) light
_HUE = np.array([[1, 1, 1], [1, 1, -1], [1, -1, -1], [1, -1, 1]], np.float32)
_LIGHT = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])  # which of the three a band sees
_SMALL = 0.4  # distance of small objects, in that of large ones
_WAVELENGTH_UM = np.array(
    [0.443, 0.493, 0.560, 0.665, 0.704, 0.741, 0.783, 0.833, 0.865, 0.945, 1.614, 2.202],
    np.float32,
)
# reflectance of bare soil, leaves and dry matter in the bands of L2A
_SOIL = np.array([9, 11, 14, 18, 20, 22, 23, 24, 25, 26, 31, 28], np.float32) / 100
_LEAF = np.array([3, 4, 7, 4, 10, 26, 33, 35, 36, 37, 19, 9], np.float32) / 100
_DRY = np.array([7, 9, 12, 16, 19, 23, 26, 28, 30, 31, 34, 25], np.float32) / 100
_IS_NEAR_INFRARED = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0])
_SPECTRA = np.stack([_SOIL, _LEAF, _DRY])


@dataclass(kw_only=True)
class Field:
    """Latent factors of one field.

    Attributes:
        label: What grows.
        kind: The crop whose objects it has.
        objects: Large and small objects, bright and dark, zero mean, variance 1/2, (2, Y, X).
        roughness: What radar alone sees, unit variance, (Y, X).
        strength: Contrast of the objects in both sensors, about 1.
        wetness: Water in the ground, 0..1.
        level: Greenness without the season, 0..1.
        swing: Strength of the season.
        delay: Shift of the season in months.
        mix: Shares of soil, leaves and dry matter, (3,).
    """

    label: int
    kind: int
    objects: Array
    roughness: Array
    strength: float
    wetness: float
    level: float
    swing: float
    delay: float
    mix: Array

    def greenness(self, months: Array) -> Array:
        """Return the state of the vegetation, (T,), at months since January."""
        season = np.cos(2 * np.pi * (months - _PEAK_MONTH[self.label] - self.delay) / 12)
        return (self.level + self.swing * season).clip(0.02, 0.98).astype(np.float32)


def smooth(rng: Rng, length_px: float) -> Array:
    """Return a unit-variance field with the correlation length given."""
    return fields.smooth(rng, FIELD, length_px)


def draw_objects(rng: Rng, spacing: float) -> Array:
    """Return large and small objects, (2, Y, X); see `fields.layers`."""
    return fields.layers(rng, FIELD, spacing, _SMALL)


def draw_field(rng: Rng, label: int) -> Field:
    """Draw the factors of a field on which crop `label` grows."""
    spacing = rng.uniform(10.0, 18.0)
    others = [crop for crop in range(len(CROPS)) if crop != label]
    kind = label if rng.random() < _TYPICAL else int(rng.choice(others))
    return Field(
        label=label,
        kind=kind,
        objects=draw_objects(rng, spacing),
        roughness=smooth(rng, 8),
        strength=float(np.exp(rng.uniform(-0.4, 0.4))),
        wetness=float(rng.uniform(0.25, 0.75)),
        level=float(rng.uniform(0.3, 0.7)),
        swing=float(rng.uniform(0.14, 0.2)),
        delay=float(rng.normal(0, 0.4)),
        mix=(0.15 * rng.dirichlet([12, 12, 12]) + 0.85 / 3).astype(np.float32),
    )


def radar(rng: Rng, field: Field, months: Array) -> Array:
    """Return backscatter of all dates in dB, float32 (T, 2, Y, X)."""
    contrast = 3.5 * field.strength * np.exp(rng.normal(0, 0.05))
    both = [field.objects.sum(0), np.tensordot(_SENSE[field.kind], field.objects, 1)]
    fixed = np.float32(contrast) * np.stack(both)  # in VV and in VH
    fixed = fixed + np.array([0.7, 0.35], np.float32)[:, None, None] * field.roughness
    level = np.array([-12.0, -19.0]) + rng.normal(0, 0.9, 2)
    green, wet = field.greenness(months) - 0.5, field.wetness - 0.5
    out = np.empty((len(months), 2, *field.roughness.shape), np.float32)
    for date in range(len(months)):
        shift = np.array([8 * wet + 2 * green[date], 4 * wet + 10 * green[date]])
        base = (level + shift + rng.normal(0, 0.4, 2)).astype(np.float32)
        speckle = rng.standard_normal(out.shape[1:], np.float32)
        out[date] = fixed + base[:, None, None] + speckle
    return out


def optical(rng: Rng, field: Field, months: Array) -> Array:
    """Return surface reflectance of all dates in the bands of L2A, float32 (T, 12, Y, X)."""
    contrast = 0.3 * field.strength * np.exp(rng.normal(0, 0.05))
    change = np.float32(contrast) * field.objects.sum(0) * _HUE[field.kind][:, None, None]
    change = (1 + change).clip(0.1)[_LIGHT]
    tone = rng.normal(0, 0.12, 2)
    relative = np.log(_WAVELENGTH_UM / 0.8)
    dry_out = np.exp(-0.9 * (field.wetness - 0.5) * (1.2 + relative))
    out = np.empty((len(months), 12, *field.roughness.shape), np.float32)
    for date, green in enumerate(field.greenness(months)):
        weights = field.mix * np.array([1.0, 4 * green, 2 * (1 - green)], np.float32)
        gain = np.exp(tone + rng.normal(0, 0.05, 2))[_IS_NEAR_INFRARED] * dry_out
        spectrum = (weights / weights.sum()) @ _SPECTRA * gain
        haze = 0.015 * np.exp(rng.normal(0, 0.5)) * (_WAVELENGTH_UM / 0.49) ** -1.3
        ground = spectrum.astype(np.float32)[:, None, None] * change
        ground += np.float32(0.001) * rng.standard_normal(ground.shape, np.float32)
        veil = haze.astype(np.float32) + np.float32(rng.normal(0, 0.008))
        out[date] = (ground + veil[:, None, None]).clip(0.002, 1.1)
    return out
