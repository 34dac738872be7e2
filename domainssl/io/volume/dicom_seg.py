"""DICOM segmentations as label maps: the number of a segment where it lies, 0 elsewhere.

A segmentation stores planes that hold something; the grid spans them, and may be smaller than that
of the images: `placed` puts it there.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.io.volume.dicom import contents, dicom_files
from domainssl.io.volume.dicom_file import DicomFile, Plane, look
from domainssl.io.volume.dicom_pixels import decode
from domainssl.io.volume.dicom_stack import names_of
from domainssl.io.volume.facts import Header, Reading, Scan, ScanFacts, finish
from domainssl.io.volume.geometry import LPS_TO_RAS
from domainssl.io.volume.stored import check_size

__all__ = ["describe", "is_segmentation", "read"]

Array = np.ndarray[Any, Any]
_MOST = 4  # files of a folder that are looked at before it is taken for one of images
_ROUNDING = 1e-3
_OFF = 0.1  # of the distance between planes


def is_segmentation(path: str) -> bool:
    """Whether a file is a DICOM segmentation, or a folder whose DICOM files all are."""
    found = dicom_files(path, most=_MOST + 1)
    try:
        return 0 < len(found) <= _MOST and all(look(p).what == "segmentation" for p in found)
    except DataError:
        return False


def describe(path: str, reading: Reading) -> ScanFacts:
    """Return the facts of a DICOM segmentation.

    Raises:
        DataError: There are several, or its planes form no grid.
    """
    del reading  # nothing of it is left open
    return _grid(path, _only(path))[0].facts()


def read(path: str, reading: Reading) -> Scan:
    """Return the label map of a DICOM segmentation.

    Raises:
        DataError: There are several, its planes form no grid, segments overlap, or it holds
            fractions.
    """
    del reading
    file = _only(path)
    header, places = _grid(path, file)
    planes = decode(file, range(len(file.planes)))
    labels = np.zeros(header.sizes, header.dtype)
    overlapping = 0
    for plane, at, pixels in zip(file.planes, places, planes, strict=True):
        target = labels[:, :, at]
        if file.kind == "LABELMAP":
            found = pixels.T
        else:
            found = np.where(pixels.T != 0, plane.segment or 0, 0)
        overlapping += int(((target != 0) & (found != 0)).sum())
        labels[:, :, at] = np.where(found != 0, found, target)
    if overlapping:
        raise DataError(
            f"{path}: {overlapping} voxels belong to several segments, expected one label per "
            "voxel. Export segments that do not overlap, or each to a file of its own."
        )
    return finish(header, [labels], filler=0)


def _only(path: str) -> DicomFile:
    found = [file for file in contents(path)[0] if file.what == "segmentation"]
    if len(found) > 1:
        names = ", ".join(os.path.basename(file.path) for file in found)
        raise DataError(f"{path}: holds {len(found)} segmentations: {names}. Give one of them.")
    [file] = found
    if file.kind == "FRACTIONAL":
        raise DataError(
            f"{path}: a segmentation of fractions, expected labels. Threshold it and export it as "
            "BINARY."
        )
    if file.kind not in ("BINARY", "LABELMAP"):
        raise DataError(f"{path}: SegmentationType is {file.kind!r}, expected BINARY or LABELMAP.")
    unnamed = [p for p in file.planes if p.segment is None]
    if unnamed and file.kind == "BINARY":
        raise DataError(
            f"{path}: planes that do not say which segment they show (ReferencedSegmentNumber): "
            f"{names_of(unnamed)}. Export the segmentation again."
        )
    missing = [p for p in file.planes if None in (p.position, p.orientation, p.spacing)]
    if missing:
        raise DataError(f"{path}: planes without position or pixel size: {names_of(missing)}.")
    return file


def _grid(path: str, file: DicomFile) -> tuple[Header, list[int]]:
    """Return the facts of the grid that spans the planes, and the place of each plane in it."""
    first = file.planes[0]
    assert first.orientation is not None and first.spacing is not None
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(row, column)
    positions = np.array([plane.position for plane in file.planes], np.float64)
    depths = positions @ normal
    start = positions[int(depths.argmin())]
    step = _step(path, first, depths)
    at = (depths - depths.min()) / step
    places = np.rint(at).astype(int)
    off = positions - start - (depths - depths.min())[:, None] * normal
    if np.abs(at - places).max() > _OFF or np.abs(off).max() > _OFF * min(first.spacing):
        raise DataError(
            f"{path}: its planes lie on no grid of {step:.6g} mm. Export it again, or convert it "
            "to NIfTI."
        )
    if any(not np.allclose(p.orientation or 0, first.orientation, atol=_ROUNDING)
           for p in file.planes):  # fmt: skip
        raise DataError(f"{path}: its planes have several orientations. Export it again.")
    greatest = max((plane.segment or 0 for plane in file.planes), default=0)
    is_map = file.kind == "LABELMAP"
    dtype = np.dtype(np.uint8 if greatest < 256 and not is_map else np.int32)
    sizes = (first.columns, first.rows, int(places.max()) + 1)
    check_size(path, sizes, dtype)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * first.spacing[1], column * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = normal * step, start
    header = Header(
        path=path,
        format="dicom-seg",
        sizes=sizes,
        affine=LPS_TO_RAS @ affine,
        dtype=dtype,
        left_out=(),
    )
    return header, [int(place) for place in places]


def _step(path: str, first: Plane, depths: Array) -> float:
    """Return the distance between planes: the least that occurs, or that of the header."""
    gaps = np.diff(np.unique(depths.round(3)))
    least = float(gaps.min()) if gaps.size else None
    stated = first.step
    if least is None:
        return stated or 1.0
    is_multiple = stated and abs(least / stated - round(least / stated)) < _OFF
    step = stated if stated and is_multiple and least > stated * 0.9 else least
    if step <= 0 or depths.max() - depths.min() > 4096 * step:
        raise DataError(f"{path}: its planes lie {step:.6g} mm apart, which is no grid.")
    return step
