"""Registered phantoms of CT and PET: the same layers in both, and uptake that CT does not show.

Body, organs and layers are shared. Grain, noise and part of the level are drawn for each scan
anew; foci of uptake reach the PET scan alone, calcifications the CT scan alone.
"""

from __future__ import annotations

from collections.abc import Callable
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
    "GRID",
    "PETCT",
    "UPRIGHT",
    "PetCT",
    "petct",
    "upright_ct",
    "write_petct",
    "write_upright",
]

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

_EXAMS = {"train": 160, "val": 96}
PETCT = Plan("petct", _EXAMS, (("ct", "pet"), ()))
UPRIGHT = Plan("upright", _EXAMS, (("ct",), ()), patterns=UPRIGHT_PATTERNS)
GRID = Grid((40, 40, 36), (4.0, 4.0, 4.0))
# centre and radii in mm, Hounsfield units, uptake over that of the tissue around
_ORGANS = {
    "liver": ((46, 14, 20), (48, 42, 44), 62, 1.25),
    "spleen": ((-62, -22, 24), (24, 22, 26), 54, 1.15),
    "right kidney": ((44, -42, -30), (16, 16, 26), 32, 1.4),
    "left kidney": ((-44, -42, -30), (16, 16, 26), 32, 1.4),
    "bowel": ((-20, 28, -32), (32, 26, 26), 22, 1.1),
}
_GRAIN_MM = (10.0, 14.0)  # finer than the layers; each scan has its own
_HU_PER_LAYER, _UPTAKE_PER_LAYER = 50.0, 0.3


@dataclass(frozen=True, kw_only=True)
class PetCT:
    """A phantom and the numbers that it was made from.

    Attributes:
        ct: Hounsfield units, float32 (X, Y, Z).
        pet: Standardised uptake, float32 (X, Y, Z).
        layers: The layers that both scans show, unit variance, zero outside of tissue.
        factors: `level`, `period_mm`, `contrast` and `size` are shared; `ct_level`,
            `calcifications` and `pet_level`, `foci` reach one scan.
    """

    ct: Array
    pet: Array
    layers: Array
    factors: dict[str, float]


def petct(split: str, number: int) -> PetCT:
    """Draw an exam of the sample, without writing any file."""
    rng, body_rng = PETCT.generators(split, number)
    return _draw(rng, body_rng, int(PETCT.classes(split)[number]), layered)


def upright_ct(split: str, number: int) -> PetCT:
    """Draw an exam of CT whose pattern a turn about the axis of the body leaves as it is.

    Its level and contrast are those of all exams: methods that tell crops apart would otherwise
    tell them by that.
    """
    rng, body_rng = UPRIGHT.generators(split, number)
    return _draw(rng, body_rng, int(UPRIGHT.classes(split)[number]), upright, varies=0.0)


def write_petct(folder: Path, split: str, number: int) -> dict[str, str]:
    """Write the files of an exam and return their cells of the manifest."""
    exam, case = petct(split, number), PETCT.case(split, number)
    (folder / case).mkdir()
    cells = {name: f"{case}/{name}.nii.gz" for name in ("ct", "pet")}
    _write_ct(folder / cells["ct"], exam.ct, number)
    uptake, scaling = exam.pet.round(2), None
    if number % 4:
        scaling = (float(exam.pet.max()) / 4000, 0.0)
        uptake = np.round(exam.pet / scaling[0]).astype(np.int16)
    affine, ends = affine_of(GRID.shape, GRID.spacing_mm), _ends(number + 2)
    write_nifti(folder / cells["pet"], uptake, affine, orientation=ends, scaling=scaling)
    return cells


def write_upright(folder: Path, split: str, number: int) -> dict[str, str]:
    """Write the file of an exam and return its cell of the manifest."""
    case = UPRIGHT.case(split, number)
    (folder / case).mkdir()
    _write_ct(folder / case / "ct.nii.gz", upright_ct(split, number).ct, number)
    return {"ct": f"{case}/ct.nii.gz"}


def _ends(number: int) -> str:
    return ORIENTATIONS[number % len(ORIENTATIONS)]


def _write_ct(path: Path, ct: Array, number: int) -> None:
    units, scaling = np.round(ct).astype(np.int16), None
    if number % 3:  # unsigned with an offset, as some converters write
        units, scaling = (units + 1024).astype(np.uint16), (1.0, -1024.0)
    affine = affine_of(GRID.shape, GRID.spacing_mm)
    write_nifti(path, units, affine, orientation=_ends(number), scaling=scaling)


def _draw(
    rng: Rng, body_rng: Rng, pattern: int, textured: Callable[..., Array], varies: float = 1.0
) -> PetCT:
    """Draw a phantom.

    Args:
        rng: Source of what differs between exams of a patient.
        body_rng: Source of the patient's body.
        pattern: Class, position in the patterns of `textured`.
        textured: Draws the layers, `layered` or `upright`.
        varies: How much level and contrast differ between exams.
    """
    places = GRID.places()
    size = float(np.exp(body_rng.normal(0, 0.04)))
    body = ellipsoid(places, (*body_rng.normal(0, 3, 2), 0), (122 * size, 104 * size, 1e4))
    body *= np.exp(0.04 * smooth(body_rng, GRID, 30))
    inside, tissue = body < 1, body < 0.92
    spine = (np.hypot(places[0], places[1] + 72 * size) < 14 * size) & tissue
    organs = [
        (ellipsoid(places, np.add(c, body_rng.normal(0, 3, 3)), np.multiply(r, size)), hu, up)
        for c, r, hu, up in _ORGANS.values()
    ]
    period, contrast = rng.uniform(40, 60), float(np.exp(varies * rng.normal(0, 0.15)))
    layers = np.where(tissue, textured(rng, GRID, pattern, period), 0.0)
    ct, uptake = np.where(inside, -95.0, -1000.0), np.where(inside, 0.5, 0.02)
    ct[tissue], uptake[tissue] = 40.0, 1.0
    for distance, hu, up in organs:
        ct[(distance < 1) & tissue], uptake[(distance < 1) & tissue] = hu, up
    level = varies * rng.normal()
    own = {"ct_level": varies * rng.normal(0, 10), "pet_level": varies * rng.normal(0, 0.1)}
    scan = ct + np.where(inside, 25 * level + own["ct_level"], 0)
    scan += _HU_PER_LAYER * contrast * np.exp(rng.normal(0, 0.1)) * layers
    scan += np.where(tissue, 25 * grain(rng, GRID, _GRAIN_MM), 0)
    scan[spine] = 260 + 0.5 * (scan[spine] - ct[spine])
    stones = _spots(rng, tissue & ~spine, 3.0)
    scan[stones[0]] += 180
    scan += 18 * np.exp(rng.normal(0, 0.2)) * rng.standard_normal(GRID.shape, np.float32)
    log = _UPTAKE_PER_LAYER * contrast * np.exp(rng.normal(0, 0.1)) * layers
    log += np.where(tissue, 0.16 * grain(rng, GRID, _GRAIN_MM), 0)
    log += 0.25 * level + own["pet_level"]
    pet = uptake * np.exp(log)
    foci = _spots(rng, tissue & ~spine, 7.0)
    pet[foci[0]] *= 2.2
    noise = 0.12 * np.exp(rng.normal(0, 0.2)) * rng.standard_normal(GRID.shape, np.float32)
    pet += noise * np.sqrt(pet + 0.05)
    return PetCT(
        ct=scan.clip(-1024, 3000).astype(np.float32),
        pet=pet.clip(0).astype(np.float32),
        layers=layers.astype(np.float32),
        factors={
            "level": float(level),
            "period_mm": float(period),
            "contrast": contrast,
            "size": size,
            **{name: float(value) for name, value in own.items()},
            "calcifications": float(stones[1]),
            "foci": float(foci[1]),
        },
    )


def _spots(rng: Rng, where: Array, radius_mm: float) -> tuple[Array, int]:
    """Return up to three small balls at random places of `where`, and their number."""
    count = int(rng.integers(0, 4))
    centres = rng.permutation(np.argwhere(where))[:count]
    voxels = np.argwhere(np.ones(GRID.shape, bool)).reshape(*GRID.shape, 3)
    found = np.zeros(GRID.shape, bool)
    for centre in centres:
        offsets = (voxels - centre) * np.asarray(GRID.spacing_mm)
        found |= (offsets**2).sum(-1) <= radius_mm**2
    return found & where, count
