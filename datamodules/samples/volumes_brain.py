"""Phantoms of the head in four MR contrasts: what they share, and lesions that only some show.

Head, tracts, the places of lesions and most of the gain are shared. Oedema is bright in T2 and
FLAIR and hardly shows in T1; its core enhances in T1 with contrast agent alone. The rest of the
gain, bias field, grain and noise are drawn for each scan anew; some exams lack a contrast. The
brain fills the field of view, skull and scalp show in its corners.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples.volumes_files import affine_of, write_nifti
from domainssl.datamodules.samples.volumes_plan import ORIENTATIONS, Plan
from domainssl.datamodules.samples.volumes_scene import (
    UPRIGHT_PATTERNS,
    Grid,
    ellipsoid,
    grain,
    layered,
    smooth,
    upright,
)

__all__ = [
    "BRAIN", "CONTRASTS", "GRID", "HEADS", "Head", "brain", "draw_scan", "draw_scans",
    "head_tissues", "upright_head", "write_brain", "write_head", "write_upright_head",
]  # fmt: skip

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

CONTRASTS = ("t1", "t1c", "t2", "flair")
_EXAMS = {"train": 160, "val": 96}
BRAIN = Plan("brain", _EXAMS, (CONTRASTS, ("mask",)))
HEADS = Plan("heads", _EXAMS, (("t1",), ()), patterns=UPRIGHT_PATTERNS)
GRID = Grid((40, 40, 36), (2.5, 2.5, 2.75))
# signal of air, scalp, skull, cerebrospinal fluid, grey and white matter
_SIGNAL = {
    "t1": (0.0, 0.9, 0.15, 0.3, 0.6, 0.7),
    "t1c": (0.0, 0.95, 0.15, 0.32, 0.64, 0.7),
    "t2": (0.0, 0.7, 0.12, 1.2, 0.64, 0.56),
    "flair": (0.0, 0.6, 0.12, 0.25, 0.64, 0.58),
}
_TRACTS = {"t1": 0.3, "t1c": 0.28, "t2": -0.3, "flair": 0.3}  # logarithm of signal per deviation
_GRAIN, _GRAIN_MM = 0.12, (6.0, 9.0)  # finer than the layers, and of each scan its own
_OEDEMA = {"t1": -0.12, "t1c": -0.12, "t2": 0.5, "flair": 0.6}
_CORE = {"t1": 0.0, "t1c": 0.7, "t2": 0.0, "flair": 0.0}


@dataclass(frozen=True, kw_only=True)
class Head:
    """A phantom.

    Attributes:
        scans: Arbitrary numbers, float32 (X, Y, Z), by contrast; those that the exam has.
        lesions: 0 healthy, 1 oedema, 2 enhancing core, uint8 (X, Y, Z).
        layers: The layers that are the class, unit variance, zero outside of the brain.
    """

    scans: dict[str, Array]
    lesions: Array
    layers: Array


def brain(split: str, number: int) -> Head:
    """Draw an exam of the sample, without writing any file."""
    rng, body_rng = BRAIN.generators(split, number)
    tissues = head_tissues(body_rng)
    layers = layered(rng, GRID, int(BRAIN.classes(split)[number]), rng.uniform(25, 37))
    layers *= tissues > 3
    lesions = _lesions(rng, tissues)
    scans = draw_scans(rng, tissues, layers, lesions)
    return Head(scans=scans, lesions=lesions, layers=layers)


def upright_head(split: str, number: int) -> Head:
    """Draw a T1 scan of a head whose pattern a turn about the axis of the body leaves as it is.

    Gain and contrast of the pattern are those of all exams: methods that tell crops apart would
    otherwise tell them by that. There are no lesions.
    """
    rng, body_rng = HEADS.generators(split, number)
    tissues = head_tissues(body_rng)
    layers = upright(rng, GRID, int(HEADS.classes(split)[number]), rng.uniform(25, 37))
    layers *= tissues > 3
    lesions = np.zeros(GRID.shape, np.uint8)
    scan = draw_scan(rng, "t1", tissues, layers, lesions, gain=1.0)
    return Head(scans={"t1": scan}, lesions=lesions, layers=layers)


def draw_scans(rng: Rng, tissues: Array, layers: Array, lesions: Array) -> dict[str, Array]:
    """Return what the contrasts show, float32 (X, Y, Z) by name; some exams lack one.

    Args:
        rng: Source of the draw.
        tissues: As `head_tissues` returns them.
        layers: Unit variance, zero outside of the brain.
        lesions: 0 healthy, 1 oedema, 2 enhancing core, uint8 (X, Y, Z).
    """
    contrast = np.exp(rng.normal(0, 0.15))
    gain = float(np.exp(rng.normal(0, 0.2)))
    scans = {n: draw_scan(rng, n, tissues, layers * contrast, lesions, gain) for n in CONTRASTS}
    if rng.random() < 0.2:
        del scans[str(rng.choice(CONTRASTS))]
    return scans


def write_brain(folder: Path, split: str, number: int) -> dict[str, str]:
    """Write the files of an exam and return their cells of the manifest."""
    return write_head(folder, BRAIN.case(split, number), number, brain(split, number))


def write_upright_head(folder: Path, split: str, number: int) -> dict[str, str]:
    """Write the file of an exam and return its cell of the manifest."""
    case = HEADS.case(split, number)
    (folder / case).mkdir()
    _write_scan(folder / case / "t1.nii.gz", upright_head(split, number).scans["t1"], number)
    return {"t1": f"{case}/t1.nii.gz"}


def write_head(folder: Path, case: str, number: int, exam: Head) -> dict[str, str]:
    """Write the files of an exam and return their cells of the manifest.

    Args:
        folder: Of all exams.
        case: Id of the exam.
        number: Of the exam; orientations and slopes follow it.
        exam: What is written.
    """
    (folder / case).mkdir()
    affine = affine_of(GRID.shape, GRID.spacing_mm)
    cells = {"mask": f"{case}/lesions.nii.gz"}
    ends = ORIENTATIONS[number % len(ORIENTATIONS)]
    write_nifti(folder / cells["mask"], exam.lesions, affine, orientation=ends)
    for place, (name, values) in enumerate(exam.scans.items()):
        cells[name] = f"{case}/{name}.nii.gz"
        _write_scan(folder / cells[name], values, number + place)
    return cells


def _write_scan(path: Path, values: Array, number: int) -> None:
    """Write a scan; orientation and slope follow the number."""
    scaling = None if number % 3 else (0.5, 0.0)
    stored = np.round(values * (1 if scaling is None else 2)).astype(np.int16)
    affine, ends = affine_of(GRID.shape, GRID.spacing_mm), ORIENTATIONS[number % len(ORIENTATIONS)]
    write_nifti(path, stored, affine, orientation=ends, scaling=scaling)


def head_tissues(rng: Rng) -> Array:
    """Return the tissue of each voxel, position in the rows of `_SIGNAL`, uint8 (X, Y, Z)."""
    places = GRID.places()
    size = np.exp(rng.normal(0, 0.03, 3))
    head = ellipsoid(places, rng.normal(0, 2, 3), np.multiply((68, 77, 74), size))
    head *= np.exp(0.03 * smooth(rng, GRID, 30))
    folds = head + 0.05 * smooth(rng, GRID, 6)
    tissues = np.zeros(GRID.shape, np.uint8)
    tissues[head < 1] = 1
    tissues[head < 0.93] = 2
    tissues[head < 0.88] = 4
    tissues[folds < 0.68] = 5
    for side in (-1, 1):
        centre = np.add((side * 11, -4, 4), rng.normal(0, 2, 3))
        radii = np.multiply((6, 20, 9), np.exp(rng.normal(0, 0.15, 3)))
        tissues[ellipsoid(places, centre, radii) < 1] = 3
    return tissues


def _lesions(rng: Rng, tissues: Array) -> Array:
    """Return one to three lesions in white matter, some of them with a core."""
    places, found = GRID.places(), np.zeros(GRID.shape, np.uint8)
    voxels = np.argwhere(tissues == 5)
    for x, y, z in voxels[rng.permutation(len(voxels))[: int(rng.integers(1, 4))]]:
        radius = rng.uniform(8, 14)
        distance = ellipsoid(places, places[:, x, y, z], np.full(3, radius))
        brain = tissues > 3
        found[(distance < 1) & brain & (found == 0)] = 1
        if rng.random() < 0.6:
            found[(distance < 0.6) & brain] = 2
    return found


def draw_scan(
    rng: Rng, name: str, tissues: Array, layers: Array, lesions: Array, gain: float
) -> Array:
    """Return what one contrast shows, float32 (X, Y, Z); see `draw_scans`."""
    signal = np.asarray(_SIGNAL[name], np.float32) * np.exp(rng.normal(0, 0.04, 6))
    log = _TRACTS[name] * np.exp(rng.normal(0, 0.1)) * layers + 0.08 * smooth(rng, GRID, 70)
    log += np.where(tissues > 3, _GRAIN * grain(rng, GRID, _GRAIN_MM), 0)
    log += np.array([0, _OEDEMA[name], _OEDEMA[name] + _CORE[name]])[lesions]
    noise = 0.05 * np.exp(rng.normal(0, 0.2)) * rng.standard_normal((2, *GRID.shape), np.float32)
    values = np.hypot(signal[tissues] * np.exp(log) + noise[0], noise[1])
    return np.asarray(600 * gain * np.exp(rng.normal(0, 0.08)) * values, np.float32)
