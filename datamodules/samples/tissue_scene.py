"""Tissue in two stains, H&E and immunohistochemistry, made from known factors.

Glands some twenty pixels wide and nuclei of five pixels lie in stroma, at the same places in both
stains. The class is what the glands are filled with: it decides which colours of a stain grow
darker together and which one against the others. Where a gland lies nobody can tell from its class,
and mean and spread of every colour are drawn for slide and tile, whatever the class; so no
statistics of single colours tell the classes apart, but texture of the right size does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["KINDS", "STAINS", "Look", "Tissue", "draw_look", "draw_tissue", "render"]

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

KINDS = ("nests", "glands", "keratin", "mucin")
STAINS = ("he", "ihc")
# Which colours (red, green, blue) of a gland change together; as many grow darker as brighter.
_SENSE = {
    "he": np.array([[1, 1, 1], [1, 1, -1], [1, -1, -1], [1, -1, 1]], np.float32),
    "ihc": np.array([[1, -1, 1], [1, 1, 1], [1, 1, -1], [1, -1, -1]], np.float32),
}
# optical densities per unit of dye, hematoxylin and eosin or DAB, and how much there is of it
_VECTORS = {
    "he": np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], np.float32),
    "ihc": np.array([[0.65, 0.70, 0.29], [0.27, 0.57, 0.78]], np.float32),
}
_AMOUNT = {"he": (0.5, 0.25), "ihc": (0.4, 0.25)}
_SPREAD = 0.13  # of a colour over its mean


@dataclass(frozen=True, kw_only=True)
class Tissue:
    """What both stains show of a place.

    Attributes:
        kind: Class, position in `KINDS`.
        glands: Where they lie, zero mean, unit variance, (Y, X).
        nuclei: The same of nuclei.
        cells: How many nuclei there are: more of the blue dye in both stains.
        matrix: How dense the stroma is: more of the other dye in both.
        contrast: How clearly glands stand out, about 1.
    """

    kind: int
    glands: Array
    nuclei: Array
    cells: float
    matrix: float
    contrast: float


@dataclass(frozen=True)
class Look:
    """How a slide was stained and scanned.

    Attributes:
        vectors: Optical density per unit of each dye, (2, 3): the hue.
        amount: Gain of each dye, (2,).
        light: Brightness of the background per colour, (3,).
    """

    vectors: Array
    amount: Array
    light: Array


def draw_look(rng: Rng, stain: str) -> Look:
    """Draw the look of a slide in one of `STAINS`."""
    return Look(
        vectors=_VECTORS[stain] * np.exp(rng.normal(0, 0.05, (2, 3))),
        amount=np.asarray(_AMOUNT[stain]) * np.exp(rng.normal(0, 0.08, 2)),
        light=rng.uniform(236, 250, 3),
    )


def draw_tissue(rng: Rng, kind: int, side: int) -> Tissue:
    """Draw a place of a kind.

    Args:
        rng: Source of all draws.
        kind: Position in `KINDS`.
        side: Pixels along each axis.
    """
    spacing = rng.uniform(14.0, 26.0)
    return Tissue(
        kind=kind,
        glands=_shaped(rng, side, _ring(side, spacing)),
        nuclei=_spots(rng, side, 7.0, 0.9),
        cells=float(rng.normal()),
        matrix=float(rng.normal()),
        contrast=float(np.exp(rng.uniform(-0.5, 0.5))),
    )


def render(rng: Rng, tissue: Tissue, stain: str, look: Look) -> Array:
    """Return what a scanner sees of a place, uint8 (Y, X, 3).

    Args:
        rng: Source of what this section has of its own.
        tissue: The place.
        stain: One of `STAINS`.
        look: Of the slide.
    """
    side = len(tissue.glands)
    stroma = _shaped(rng, side, np.exp(-((_frequency(side) * 24) ** 2)))
    grain = _shaped(rng, side, _ring(side, rng.uniform(5.0, 8.0)))
    density = tissue.contrast * tissue.glands * _SENSE[stain][tissue.kind][:, None, None]
    density = density + 0.3 * tissue.nuclei * np.array([1.2, 1.0, 0.6])[:, None, None]
    density = density + 0.2 * stroma * rng.normal(0, 1, (3, 1, 1))
    density = density + 1.0 * grain * rng.choice([-1.0, 1.0], (3, 1, 1))
    density = density + 0.1 * rng.standard_normal((3, side, side), np.float32)
    density -= density.mean((1, 2), keepdims=True)
    density /= density.std((1, 2), keepdims=True)  # whatever the kind, the spread is drawn below
    shared = 0.3 * np.array([tissue.cells, tissue.matrix])
    amount = look.amount * np.exp(shared + rng.normal(0, 0.05, 2))
    mean = look.light * np.exp(-amount @ look.vectors)
    spread = _SPREAD * mean * np.exp(rng.normal(0, 0.08, 3) + 0.4 * np.log(tissue.contrast))
    picture = mean[:, None, None] - spread[:, None, None] * density
    return np.asarray(picture.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0))


def _frequency(side: int) -> Array:
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    return np.sqrt(rows**2 + columns**2).astype(np.float32)


def _shaped(rng: Rng, side: int, gain: Array) -> Array:
    """Return a unit-variance random field whose spectrum follows `gain`, (side, side)."""
    white = np.fft.rfft2(rng.standard_normal((side, side), np.float32))
    field = np.fft.irfft2(white * gain, (side, side)).astype(np.float32)
    return np.asarray((field - field.mean()) / max(float(field.std()), 1e-6))


def _ring(side: int, spacing: float) -> Array:
    """Return the spectrum of what comes every `spacing` pixels or so."""
    return np.asarray(np.exp(-(((_frequency(side) - 1 / spacing) / (0.3 / spacing)) ** 2)))


def _spots(rng: Rng, side: int, spacing: float, rarity: float) -> Array:
    """Return spots, unit variance, (side, side)."""
    spots = (_shaped(rng, side, _ring(side, spacing)) - rarity).clip(0, 0.8) ** 0.5
    return np.asarray((spots - spots.mean()) / max(float(spots.std()), 1e-6))
