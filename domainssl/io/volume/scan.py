"""Scans of any format: find them, describe them by their headers, read them in RAS axis order.

scan = read_scan("liver/ct.nii.gz")     # scan.values (C, X, Y, Z), scan.affine in RAS mm
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.io.volume import dicom, dicom_seg, metaimage, mgh, nifti, nrrd
from domainssl.io.volume.dicom_aside import Aside, aside_of
from domainssl.io.volume.facts import Reading, Scan, ScanFacts
from domainssl.io.volume.geometry import TOLERANCE, displacement
from domainssl.io.volume.known import series_folders
from domainssl.io.volume.lost import links_in

__all__ = [
    "ENDINGS",
    "FORMATS",
    "Format",
    "Reading",
    "Scan",
    "ScanFacts",
    "describe_scan",
    "is_scan",
    "iter_scans",
    "list_scans",
    "placed",
    "read_labels",
    "read_scan",
    "scans_and_aside",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of scan: how it is recognised, described and read.

    Attributes:
        name: What it is called.
        endings: Endings of its files' names.
        recognise: Whether a file, or a folder of DICOM files, holds it, by its first bytes.
        describe: Returns the facts from the header.
        read: Returns one volume.
    """

    name: str
    endings: tuple[str, ...]
    recognise: Callable[[str], bool]
    describe: Callable[[str, Reading], ScanFacts]
    read: Callable[[str, Reading], Scan]


FORMATS = (
    Format(
        name="nifti",
        endings=nifti.ENDINGS,
        recognise=nifti.is_nifti,
        describe=nifti.describe,
        read=nifti.read,
    ),
    Format(
        name="nrrd",
        endings=nrrd.ENDINGS,
        recognise=nrrd.is_nrrd,
        describe=nrrd.describe,
        read=nrrd.read,
    ),
    Format(
        name="metaimage",
        endings=metaimage.ENDINGS,
        recognise=metaimage.is_metaimage,
        describe=metaimage.describe,
        read=metaimage.read,
    ),
    Format(
        name="dicom-seg",
        endings=(),
        recognise=dicom_seg.is_segmentation,
        describe=dicom_seg.describe,
        read=dicom_seg.read,
    ),
    Format(
        name="dicom",
        endings=dicom.ENDINGS,
        recognise=dicom.is_series,
        describe=dicom.describe,
        read=dicom.read,
    ),
    Format(
        name="mgh",
        endings=mgh.ENDINGS,
        recognise=mgh.is_mgh,
        describe=mgh.describe,
        read=mgh.read,
    ),
)
ENDINGS = tuple(ending for form in FORMATS for ending in form.endings)
_ROUNDING = 1e-3  # by which scaled or stored labels may miss a whole number
_UNKNOWN = -1  # class of voxels that a map says nothing of; it counts for nothing
_KNOWN = "NIfTI (.nii, .nii.gz, .hdr/.img), NRRD, MetaImage (.mha, .mhd), MGH (.mgz) or DICOM"


def describe_scan(path: str | os.PathLike[str], reading: Reading | None = None) -> ScanFacts:
    """Return what is known of a scan without reading its values.

    Args:
        path: A file, or a folder with a DICOM series.
        reading: What the user says about files that leave it open.

    Raises:
        DataError: Nothing lies there, it is no scan, or its header cannot be used.
    """
    with np.errstate(all="ignore"):  # of damaged headers; results are checked
        return _format(str(path)).describe(str(path), reading or Reading())


def read_scan(path: str | os.PathLike[str], reading: Reading | None = None) -> Scan:
    """Return one volume in RAS axis order.

    Args:
        path: A file, or a folder with a DICOM series.
        reading: What the user says about files that leave it open.

    Raises:
        DataError: Nothing lies there, it is no scan, it cannot be read, or it holds several
            volumes of which none is chosen.
    """
    with np.errstate(all="ignore"):
        return _format(str(path)).read(str(path), reading or Reading())


def read_labels(path: str | os.PathLike[str], reading: Reading | None = None) -> Scan:
    """Return a label map in RAS axis order: one channel of integers, -1 where none is stated (NaN).

    Args:
        path: A file, or a folder with a DICOM series.
        reading: What the user says about files that leave it open.

    Raises:
        DataError: As `read_scan`; or there are several maps or values per voxel, or values are no
            whole numbers.
    """
    _check_one_map(str(path), reading or Reading())
    scan = read_scan(path, reading)
    values = scan.values
    if len(values) != 1:
        raise DataError(
            f"{path}: has {len(values)} values per voxel, expected one label. Merge them into one "
            "label map."
        )
    if values.dtype.kind == "f":
        whole = np.where(scan.valid, values, 0) if scan.valid is not None else values
        labels = np.rint(whole)
        found = whole[np.abs(whole - labels) > _ROUNDING]
        if found.size or np.abs(whole).max(initial=0) >= 2**24:
            example = found[0] if found.size else np.abs(whole).max()
            raise DataError(
                f"{path}: holds the value {example:.9g}, expected whole numbers below 2^24 as "
                "labels. Is it an image, or was it interpolated?"
            )
        values = labels.astype(np.int32)
    if scan.valid is not None:
        values = np.where(scan.valid, values.astype(np.int32), np.int32(_UNKNOWN))
    return replace(scan, values=values)


def _check_one_map(path: str, reading: Reading) -> None:
    """Refuse a file with a map per segment or layer, of which none is the label map."""
    if os.path.isdir(path) or reading.volume is not None:
        return
    volumes = describe_scan(path, reading).volumes
    if volumes > 1:
        raise DataError(
            f"{path}: holds {volumes} maps (segments or layers of their own), expected one label "
            "map. Merge them into one, for example with 3D Slicer's export as a label map."
        )


def placed(labels: Scan, shape: Sequence[int], affine: Array) -> Scan:
    """Put a label map that covers a part of a grid onto that grid, with 0 elsewhere.

    A DICOM segmentation stores only planes that hold something.

    Args:
        labels: The label map.
        shape: Voxels of the grid (X, Y, Z).
        affine: Voxel to RAS mm of the grid, (4, 4).

    Returns:
        The map on the grid; unchanged where its voxels are none of the grid's.
    """
    shift = np.rint((np.linalg.inv(affine) @ labels.affine)[:3, 3])
    moved = np.array(affine, np.float64)
    moved[:3, 3] += moved[:3, :3] @ shift
    sizes = labels.values.shape[1:]
    if displacement(labels.affine, moved, sizes)[1] > TOLERANCE:
        return labels
    starts = [int(n) for n in shift]
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    if min(starts) < 0 or any(end > size for end, size in zip(ends, shape, strict=True)):
        return labels
    values = np.zeros((len(labels.values), *shape), labels.values.dtype)
    box = tuple(slice(*ends_) for ends_ in zip(starts, ends, strict=True))
    values[(slice(None), *box)] = labels.values
    valid = None
    if labels.valid is not None:
        valid = np.ones(tuple(shape), bool)
        valid[box] = labels.valid
    return replace(labels, values=values, valid=valid, affine=np.array(affine, np.float64))


def is_scan(path: str | os.PathLike[str]) -> bool:
    """Whether a file, or a folder of DICOM files, holds a scan, by its name and first bytes."""
    path = str(path)
    if os.path.isdir(path) or not _candidates(path) or path.lower().endswith(dicom.ENDINGS):
        return dicom.is_series(path) and dicom.holds_image(path)
    return any(form.recognise(path) for form in _candidates(path))


def list_scans(folder: str | os.PathLike[str]) -> list[str]:
    """Return the scans below a folder, sorted by path; a folder with DICOM images is one.

    Hidden files (the `._` companions of macOS among them), pipes and links to nothing are passed
    over; links to folders are not followed. `scans_and_aside` tells of the links.

    Args:
        folder: A local folder.
    """
    found, folders, _ = _below(str(folder))
    return sorted([*found, *series_folders(str(folder), folders)])


def scans_and_aside(folder: str | os.PathLike[str]) -> tuple[list[str], Aside]:
    """Return what `list_scans` returns, and what else is there: no images, and links.

    Args:
        folder: A local folder.
    """
    found, folders, links = _below(str(folder))
    aside = replace(
        aside_of(folders),
        lost=tuple(path for path in links if not os.path.isdir(path)),
        linked=tuple(path for path in links if os.path.isdir(path)),
    )
    return sorted([*found, *series_folders(str(folder), folders)]), aside


def _below(folder: str) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Return the scans by name, the files that may be DICOM by folder, and odd links.

    Those lead nowhere, or to folders.
    """
    found, folders, links = [], {}, []
    for base, names in _walk(folder):
        found += names
        if files := dicom.files_in(base):
            folders[base] = files
        links += [os.path.join(base, name) for name in links_in(base)]
    return found, folders, links


def iter_scans(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield what `list_scans` returns, as it is found: folder by folder, sorted within each."""
    for base, names in _walk(str(folder)):
        yield from names
        if dicom.holds_image(base):
            yield base


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder with the files in it that are scans by their names."""
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [os.path.join(base, name) for name in sorted(names) if not name.startswith(".")]
        yield base, [path for path in paths if _by_name(path) and os.path.isfile(path)]


def _by_name(path: str) -> bool:
    """Whether the name is that of a file with a scan; the files of a pair count once."""
    name = path.lower()
    if name.endswith((".img", ".img.gz", *dicom.ENDINGS)):
        return False
    if name.endswith((".hdr", ".hdr.gz")):
        return nifti.is_nifti(path)
    return bool(_candidates(path))


def _candidates(path: str) -> list[Format]:
    return [form for form in FORMATS if form.endings and path.lower().endswith(form.endings)]


def _format(path: str) -> Format:
    """Return the format of a file or folder: by its name, where its first bytes agree.

    Raises:
        DataError: Nothing lies there, or it is no scan.
    """
    if not os.path.exists(path):
        is_link = os.path.islink(path)
        raise DataError(
            f"{path}: {'a link to a file that is not there' if is_link else 'nothing lies there'}."
            " Check the path."
        )
    named = [] if os.path.isdir(path) else _candidates(path)
    is_own = bool(named) and named[0].name != "dicom"
    for form in (*named * is_own, *(f for f in FORMATS if not is_own or f not in named)):
        if form.recognise(path):
            return form
    if named:  # its own reader says best what is wrong
        return named[0]
    if os.path.isdir(path):
        inside = list_scans(path)
        hint = f"; of the scans in it, give one, such as {inside[0]}" if inside else ""
        raise DataError(f"{path}: a folder without DICOM files, expected a scan{hint}.")
    raise DataError(f"{path}: no scan, expected {_KNOWN}.")
