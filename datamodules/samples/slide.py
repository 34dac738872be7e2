"""The embedded sample of a slide: a tiled pyramid in H&E, and one in a second stain beside it.

1536 x 1024 pixels at 0.5 microns, three levels; tissue of `tissue_scene.py` lies on white glass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples import made_once
from domainssl.datamodules.samples.tissue_scene import STAINS, draw_look, draw_tissue, render
from domainssl.errors import require

__all__ = ["LEVELS", "MPP_UM", "SIZE", "VERSION", "build", "sample_root"]

VERSION = "1"
SIZE = (1536, 1024)  # width, height
MPP_UM = 0.5
LEVELS = (1, 2, 4)
_SEED = 20261129
_TILE = 128
_GLASS = 244
Array = np.ndarray[Any, Any]


def sample_root() -> Path:
    """Return the folder of the sample, made on first use in seconds."""
    return made_once("slide", VERSION, "sample of a slide", build)


def build(folder: Path) -> None:
    """Write the slide in both stains into an empty folder; the same values every time."""
    rng = np.random.default_rng(_SEED)
    inside = _outline(rng)
    tissues = [draw_tissue(rng, kind, SIZE[1]) for kind in (0, 1)]
    for stain in STAINS:
        look = draw_look(rng, stain)
        halves = [render(rng, tissue, stain, look) for tissue in tissues]
        picture = np.concatenate([half[:, : SIZE[0] // 2] for half in halves], axis=1)
        glass = _GLASS + rng.integers(-2, 3, picture.shape)
        picture = np.where(inside[..., None], picture, glass).astype(np.uint8)
        (folder / stain).mkdir()
        _write(folder / stain / "phantom.tif", picture)


def _outline(rng: np.random.Generator) -> Array:
    """Return where tissue is: two parts with uneven edges, bool (Y, X)."""
    width, height = SIZE
    y, x = np.mgrid[:height, :width]
    inside = np.zeros((height, width), bool)
    for cx, cy, rx, ry in ((0.3, 0.5, 0.22, 0.36), (0.74, 0.45, 0.17, 0.3)):
        angle = np.arctan2(y - cy * height, x - cx * width)
        radius = np.hypot((x - cx * width) / (rx * width), (y - cy * height) / (ry * height))
        edge = 1.0 + sum(
            0.06 * rng.normal() * np.cos(n * angle + rng.uniform(0, 2 * np.pi)) for n in (2, 3, 5)
        )
        inside |= radius < edge
    return inside


def _write(path: Path, picture: Array) -> None:
    """Write a tiled TIFF, a page per level, with the resolution in its tags."""
    tifffile: Any = require("tifffile", "pathology")
    with tifffile.TiffWriter(path) as file:
        for level in LEVELS:
            height, width = (side // level for side in picture.shape[:2])
            blocks = picture.reshape(height, level, width, level, 3).astype(np.float32)
            per_cm = 1e4 / (MPP_UM * level)
            file.write(
                blocks.mean((1, 3)).round().astype(np.uint8),
                tile=(_TILE, _TILE),
                photometric="rgb",
                compression="zlib",
                metadata=None,
                software=False,
                datetime=None,
                subfiletype=int(level > 1),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
            )
