"""Write maps of classes or numbers as NIfTI on the grid of the scan that they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.errors import DataError, require
from domainssl.files import PART
from domainssl.io.volume.facts import ScanFacts

__all__ = ["write_labels", "write_numbers"]

Array = np.ndarray[Any, Any]
_ORTHOGONAL = 1e-4
_NIFTI1 = 32767  # voxels along an axis


def write_labels(
    path: Path, labels: Array, scan: ScanFacts, names: Mapping[int, str] | None = None
) -> None:
    """Write a label map with the axes, sizes and affine of a scan as it is stored.

    Sform and qform say the same, so that all readers agree; a sheared grid, as of a tilted gantry,
    has no qform. The file takes its name when it is complete.

    Args:
        path: `.nii` or `.nii.gz`.
        labels: Whole numbers in RAS axis order, (X, Y, Z), of the scan's shape.
        scan: Facts of the scan.
        names: Name per value, kept in the header's comment extension.

    Raises:
        DataError: The shapes differ.
    """
    text = ", ".join(f"{value} {name}" for value, name in (names or {}).items())
    _write(path, labels, scan, intent="label", text=text)


def write_numbers(path: Path, numbers: Array, scan: ScanFacts, targets: Sequence[str]) -> None:
    """Write predicted numbers on the grid of a scan as it is stored; see `write_labels`.

    Args:
        path: `.nii` or `.nii.gz`.
        numbers: Float32 in RAS axis order, (K, X, Y, Z), NaN where nothing is known; of several
            targets the last axis of the file.
        scan: Facts of the scan.
        targets: Their names, kept in the header's comment extension.

    Raises:
        DataError: The shapes differ.
    """
    values = numbers[0] if len(numbers) == 1 else np.moveaxis(numbers, 0, -1)
    _write(path, values, scan, intent="estimate", text=", ".join(targets))


def _write(path: Path, values: Array, scan: ScanFacts, *, intent: str, text: str) -> None:
    if tuple(values.shape[:3]) != scan.shape:
        raise DataError(
            f"{path}: a map of {tuple(values.shape[:3])} voxels for {scan.path} of {scan.shape}."
        )
    nibabel: Any = require("nibabel", "medical")
    orientations = nibabel.orientations
    change = orientations.ornt_transform(
        orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(scan.orientation))
    )
    stored = orientations.apply_orientation(values, change)
    affine = scan.affine @ orientations.inv_ornt_aff(change, values.shape[:3])
    large = max(stored.shape) > _NIFTI1
    image = (nibabel.Nifti2Image if large else nibabel.Nifti1Image)(stored, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    image.set_sform(affine, 1)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    is_straight = np.allclose(directions.T @ directions, np.eye(3), atol=_ORTHOGONAL)
    image.set_qform(affine if is_straight else None, int(is_straight), strip_shears=True)
    if text:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", text.encode()))
    ending = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    hidden = path.with_name(f".{path.name}{PART}{os.getpid()}{ending}")
    try:
        nibabel.save(image, hidden)
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)
