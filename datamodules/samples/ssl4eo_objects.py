"""Locations of one cover each: large objects, which their surroundings tell, under fine texture.

Land cover is what kind of objects, as in `ssl4eo_scene.py`. Large ones are wider than the patches
of a small model, so that what a mask hides can be told from what is seen beside it. Fine texture,
which nothing tells, lies over them: in which bands it is bright and in which dark is drawn anew for
each location and sensor. So histograms of bands do not tell the cover, and what bands have in
common shows it only over distances longer than the texture's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from domainssl.datamodules.samples.fields import frequency, layers, shaped
from domainssl.datamodules.samples.ssl4eo_scene import SIDE, Location, draw_location

__all__ = ["Objects", "draw_objects"]

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

_SPACING_PX = (16.0, 28.0)
_SMALL = 0.5  # distance of small objects, in that of large ones
_GRAIN_PX = (4.0, 6.0)
_GRAIN = 1.8  # its contrast, in that of the objects


@dataclass(kw_only=True)
class Objects(Location):
    """A location of one cover.

    Attributes:
        grain: Texture that objects are overlaid by, in VV and VH and in visible, near- and
            short-wave infrared light, unit variance, (5, Y, X).
    """

    grain: Array

    def echo(self) -> Array:
        """Return how objects and texture change VV and VH, float32 (2, Y, X)."""
        return _overlaid(super().echo(), self.grain[:2])

    def light(self) -> Array:
        """Return how they change visible, near- and short-wave infrared light, (3, Y, X)."""
        return _overlaid(super().light(), self.grain[2:])


def _overlaid(objects: Array, grain: Array) -> Array:
    return np.asarray((objects + _GRAIN * grain) / np.float32((1 + _GRAIN**2) ** 0.5))


def draw_objects(rng: Rng, label: int, month: Array) -> Objects:
    """Draw the factors of a location; see `draw_location`."""
    place = draw_location(rng, label, month)
    spacing = rng.uniform(*_SPACING_PX)
    grain = [_texture(rng, bands) for bands in (2, 3)]
    return Objects(
        **{
            **vars(place),
            "cover": np.full((SIDE, SIDE), label, np.uint8),
            "objects": layers(rng, SIDE, spacing, _SMALL),
            "factors": {**place.factors, "share": 1.0, "spacing_px": float(spacing)},
        },
        grain=np.concatenate(grain),
    )


def _texture(rng: Rng, bands: int) -> Array:
    """Return texture of one place in some bands: bright in some, dark in others, (bands, Y, X)."""
    centre = 1 / rng.uniform(*_GRAIN_PX)
    field = shaped(rng, SIDE, np.exp(-(((frequency(SIDE) - centre) / (0.3 * centre)) ** 2)))
    return np.asarray(field * rng.choice(np.array([-1, 1], np.float32), (bands, 1, 1)))
