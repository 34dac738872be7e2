"""Phantoms for segmentation: regions that neither brightness nor place tells, but their layers.

They look as those of `volumes_ctmr` and `volumes_brain` do, with layers of several kinds in one
exam: tissue around is diffuse, each kind of region has layers of a direction of its own. All have
the same mean, variance and distribution of values, and lie anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples.volumes_brain import (
    CONTRASTS,
    Head,
    draw_scans,
    head_tissues,
    write_head,
)
from domainssl.datamodules.samples.volumes_brain import GRID as HEAD_GRID
from domainssl.datamodules.samples.volumes_ctmr import (
    TISSUES,
    CtOrMr,
    draw_ct,
    draw_mr,
    write_ct_or_mr,
)
from domainssl.datamodules.samples.volumes_plan import Plan
from domainssl.datamodules.samples.volumes_scene import PATTERNS, Grid, ellipsoid, layered

__all__ = [
    "LESIONS", "ORGANS", "ORGAN_GRID", "lesions", "organs", "write_lesions", "write_organs",
]  # fmt: skip

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

_EXAMS = {"train": 96, "val": 32}
ORGANS = Plan("organs", _EXAMS, (("scan", "source"), ("mask",)), patterns=())
LESIONS = Plan("lesions", _EXAMS, (CONTRASTS, ("mask",)), patterns=())
ORGAN_GRID = Grid((40, 40, 40), (3.2, 3.2, 3.0))
# what is around, then the kinds of regions by number: position in `PATTERNS`
_ORGAN_LAYERS = tuple(PATTERNS.index(p) for p in ("diffuse", "sagittal", "coronal", "axial"))
_LESION_LAYERS = tuple(PATTERNS.index(p) for p in ("diffuse", "sagittal", "axial"))


def organs(split: str, number: int) -> CtOrMr:
    """Draw an exam of the sample, without writing any file; even ones are CT."""
    rng, _ = ORGANS.generators(split, number)
    labels, layers = _regions(rng, ORGAN_GRID, _ORGAN_LAYERS, 40, rng.uniform(32, 48))
    draw, tissue = (draw_ct, draw_mr)[number % 2], np.full_like(labels, TISSUES.index("muscle"))
    scan = draw(rng, ORGAN_GRID, tissue, layers)
    return CtOrMr(scan=scan, source=("ct", "mr")[number % 2], labels=labels, layers=layers)


def write_organs(folder: Path, split: str, number: int) -> dict[str, str]:
    """Write the files of an exam and return their cells of the manifest."""
    case = ORGANS.case(split, number)
    return write_ct_or_mr(folder, case, number, organs(split, number), ORGAN_GRID)


def lesions(split: str, number: int) -> Head:
    """Draw an exam of the sample, without writing any file."""
    rng, body_rng = LESIONS.generators(split, number)
    tissues = head_tissues(body_rng)
    labels, layers = _regions(rng, HEAD_GRID, _LESION_LAYERS, 32, rng.uniform(25, 37))
    brain = tissues > 3
    labels *= brain
    layers *= brain
    scans = draw_scans(rng, tissues, layers, np.zeros_like(labels))
    return Head(scans=scans, lesions=labels, layers=layers)


def write_lesions(folder: Path, split: str, number: int) -> dict[str, str]:
    """Write the files of an exam and return their cells of the manifest."""
    return write_head(folder, LESIONS.case(split, number), number, lesions(split, number))


def _regions(
    rng: Rng, grid: Grid, kinds: tuple[int, ...], radius_mm: float, period_mm: float
) -> tuple[Array, Array]:
    """Return the kind of every voxel, uint8 (X, Y, Z), and its layers, float32 (X, Y, Z)."""
    labels, places = np.zeros(grid.shape, np.uint8), grid.places()
    reach = 0.3 * np.multiply(grid.shape, grid.spacing_mm)
    for kind in rng.permutation(np.arange(1, len(kinds))):
        radii = radius_mm * np.exp(rng.normal(0, 0.1, 3))
        labels[ellipsoid(places, rng.uniform(-reach, reach), radii) < 1] = kind
    fields = [layered(rng, grid, kind, period_mm) for kind in kinds]
    return labels, np.choose(labels, fields).astype(np.float32)
