"""Phantoms of the abdomen in CT or in MR, never of one exam in both, with maps of the organs.

Both scanners show the same kinds of layers and organs, each in its own contrast: Hounsfield units,
or the arbitrary numbers of a T1-weighted sequence with fat bright, a bias field and a gain. Finer
grain, which tells nothing, lies over the layers of both. Bodies fill the field of view.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.datamodules.samples.volumes_files import affine_of, write_dicom, write_nifti
from domainssl.datamodules.samples.volumes_plan import ORIENTATIONS, Plan
from domainssl.datamodules.samples.volumes_scene import Grid, ellipsoid, grain, layered, smooth

__all__ = [
    "CTMR", "GRID", "TISSUES", "CtOrMr", "ctmr", "draw_ct", "draw_mr", "write_ct_or_mr",
    "write_ctmr",
]  # fmt: skip

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

CTMR = Plan("ctmr", {"train": 96, "val": 96}, (("scan", "source"), ("mask",)))
GRID = Grid((48, 48, 64), (3.2, 3.2, 3.0))
TISSUES = ("air", "fat", "muscle", "liver", "spleen", "kidneys", "spine")
_HU = np.array([-1000, -95, 40, 62, 52, 32, 260], np.float32)
_T1 = np.array([0, 1.0, 0.45, 0.55, 0.4, 0.42, 0.6], np.float32)
# centre and radii in mm
_ORGANS = (
    ("liver", (40, 12, 26), (40, 42, 46)),
    ("spleen", (-52, -18, 34), (20, 20, 26)),
    ("kidneys", (40, -38, -34), (14, 15, 26)),
    ("kidneys", (-40, -38, -34), (14, 15, 26)),
)
_GRAIN_MM = (8.0, 11.0)
_DICOM = ("train", 0)  # the exam that is written as a series


@dataclass(frozen=True, kw_only=True)
class CtOrMr:
    """A phantom.

    Attributes:
        scan: Hounsfield units of CT, arbitrary numbers of MR, float32 (X, Y, Z).
        source: `ct` or `mr`.
        labels: Position in `TISSUES`, uint8 (X, Y, Z).
        layers: The layers that are the class, unit variance, zero outside of tissue.
    """

    scan: Array
    source: str
    labels: Array
    layers: Array


def ctmr(split: str, number: int) -> CtOrMr:
    """Draw an exam of the sample, without writing any file; even ones are CT."""
    rng, body_rng = CTMR.generators(split, number)
    labels = _anatomy(body_rng)
    layers = layered(rng, GRID, int(CTMR.classes(split)[number]), rng.uniform(32, 48))
    layers *= (labels > 1) & (labels != TISSUES.index("spine"))
    if number % 2:
        scan = draw_mr(rng, GRID, labels, layers)
    else:  # with padding around the field
        outside = ellipsoid(GRID.places(), (0, 0, 0), (80, 80, 1e4)) > 1
        scan = np.where(outside, np.float32(-1024), draw_ct(rng, GRID, labels, layers))
    return CtOrMr(
        scan=scan,
        source=("ct", "mr")[number % 2],
        labels=labels,
        layers=layers,
    )


def write_ctmr(folder: Path, split: str, number: int) -> dict[str, str]:
    """Write the files of an exam and return their cells of the manifest."""
    exam, case = ctmr(split, number), CTMR.case(split, number)
    patient = str(CTMR.row(split, number, {})["patient"])
    dicom_of = patient if (split, number) == _DICOM else None
    return write_ct_or_mr(folder, case, number, exam, GRID, dicom_of=dicom_of)


def write_ct_or_mr(
    folder: Path, case: str, number: int, exam: CtOrMr, grid: Grid, *, dicom_of: str | None = None
) -> dict[str, str]:
    """Write the files of an exam and return their cells of the manifest.

    Args:
        folder: Of all exams.
        case: Id of the exam.
        number: Of the exam; orientation and slope follow it.
        exam: What is written.
        grid: Its voxels.
        dicom_of: Patient, where the scan is written as a DICOM series.
    """
    (folder / case).mkdir()
    affine = affine_of(grid.shape, grid.spacing_mm)
    ends = ORIENTATIONS[number // 2 % len(ORIENTATIONS)]
    mask = f"{case}/labels.nii.gz"
    write_nifti(folder / mask, exam.labels, affine, orientation=ends)
    stored = (np.round(exam.scan / 4) * 4).astype(np.int16)  # in steps: less to store
    scan = f"{case}/scan.nii.gz" if dicom_of is None else f"{case}/scan"
    if dicom_of is not None:
        write_dicom(
            folder / scan,
            (stored + 1024).astype(np.int16),
            affine,
            modality="CT",
            patient=dicom_of,
            rescale=(1.0, -1024.0),
            tags={"PixelPaddingValue": 0},
        )
    elif number % 4 == 1:  # MR with a slope of its own
        counts = np.round(exam.scan / 4).astype(np.int16)
        write_nifti(folder / scan, counts, affine, orientation=ends, scaling=(4.0, 0.0))
    else:
        write_nifti(folder / scan, stored, affine, orientation=ends)
    return {"scan": scan, "source": exam.source, "mask": mask}


def _anatomy(rng: Rng) -> Array:
    """Return the tissue of each voxel."""
    places = GRID.places()
    size = float(np.exp(rng.normal(0, 0.05)))
    body = ellipsoid(places, (*rng.normal(0, 3, 2), 0), (90 * size, 80 * size, 1e4))
    body *= np.exp(0.04 * smooth(rng, GRID, 30))
    labels = np.zeros(GRID.shape, np.uint8)
    labels[body < 1] = 1
    tissue = body < 0.9
    labels[tissue] = 2
    for name, centre, radii in _ORGANS:
        middle = np.add(centre, rng.normal(0, 5, 3))
        scale = size * np.exp(rng.normal(0, 0.08, 3))
        organ = ellipsoid(places, middle, np.multiply(radii, scale)) < 1
        labels[organ & tissue] = TISSUES.index(name)
    spine = np.hypot(places[0] - rng.normal(0, 2), places[1] + 56 * size) < 12 * size
    labels[spine & tissue] = TISSUES.index("spine")
    return labels


def draw_ct(rng: Rng, grid: Grid, labels: Array, layers: Array) -> Array:
    """Return Hounsfield units, float32 (X, Y, Z).

    Args:
        rng: Source of the draw.
        grid: Voxels.
        labels: Position in `TISSUES`, (X, Y, Z).
        layers: Unit variance, zero where there are none, (X, Y, Z).
    """
    level = rng.normal(0, 10) * (labels > 0)
    values = _HU[labels] + level + 50 * np.exp(rng.normal(0, 0.15)) * layers
    values += 45 * grain(rng, grid, _GRAIN_MM) * (layers != 0)
    values += 18 * np.exp(rng.normal(0, 0.2)) * rng.standard_normal(grid.shape, np.float32)
    return np.asarray(values.clip(-1024, 3000), np.float32)


def draw_mr(rng: Rng, grid: Grid, labels: Array, layers: Array) -> Array:
    """Return arbitrary numbers of a T1-weighted sequence, float32 (X, Y, Z); see `draw_ct`."""
    log = 0.3 * np.exp(rng.normal(0, 0.15)) * layers + 0.12 * smooth(rng, grid, 80)
    log += 0.27 * grain(rng, grid, _GRAIN_MM) * (layers != 0)
    signal = _T1[labels] * np.exp(log)
    noise = 0.04 * np.exp(rng.normal(0, 0.2)) * rng.standard_normal((2, *grid.shape), np.float32)
    gain = 900 * np.exp(rng.normal(0, 0.4))
    return np.asarray(gain * np.hypot(signal + noise[0], noise[1]), np.float32)
