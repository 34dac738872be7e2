"""Write phantoms as scanners and converters do: NIfTI in several orientations, and DICOM series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.errors import require

__all__ = ["affine_of", "write_dicom", "write_nifti"]

Array = np.ndarray[Any, Any]

_UID_ROOT = "1.2.826.0.1.3680043.8.498."  # pydicom's, for made-up data
_IMAGE_CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4"}
_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"


def affine_of(shape: Sequence[int], spacing_mm: Sequence[float]) -> Array:
    """Return voxel to RAS millimetres of an array in RAS order, with the origin at its centre."""
    spacing = np.asarray(spacing_mm, float)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.asarray(shape[:3]) - 1) / 2 * spacing
    return affine


def write_nifti(
    path: Path,
    values: Array,
    affine: Array,
    *,
    orientation: str = "RAS",
    scaling: tuple[float, float] | None = None,
) -> None:
    """Write a volume.

    Args:
        path: File, `.nii` or `.nii.gz`; the same bytes every time.
        values: What is stored, in RAS order, (X, Y, Z); with `scaling`, integers.
        affine: Voxel to RAS millimetres of `values`.
        orientation: Where the axes of the stored array point, such as `LPS`.
        scaling: Slope and intercept that turn stored numbers into values.
    """
    nibabel: Any = require("nibabel", "medical")
    image = nibabel.Nifti1Image(values, affine)
    ends = nibabel.orientations.axcodes2ornt(tuple(orientation))
    change = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), ends)
    image = image.as_reoriented(change)
    image.header.set_xyzt_units("mm")
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    if scaling is not None:
        image.header.set_slope_inter(*scaling)
    nibabel.save(image, path)


def write_dicom(
    folder: Path,
    values: Array,
    affine: Array,
    *,
    modality: str,
    patient: str,
    rescale: tuple[float, float] = (1.0, 0.0),
    tags: Mapping[str, Any] | None = None,
) -> None:
    """Write a series, one axial slice per file, not in order of their position.

    Args:
        folder: Folder to fill.
        values: Stored numbers in RAS order, int16 (X, Y, Z).
        affine: Voxel to RAS millimetres of `values`, axes along the patient's.
        modality: `CT` or `MR`.
        patient: Made-up name and number of the patient.
        rescale: Slope and intercept that turn stored numbers into values.
        tags: Further elements of every slice, by keyword.
    """
    pydicom: Any = require("pydicom", "medical")
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.ascontiguousarray(values.transpose(2, 1, 0)[:, ::-1, ::-1].astype("<i2"))
    spacing = np.diag(affine)[:3]
    last = affine @ [
        values.shape[0] - 1,
        values.shape[1] - 1,
        0,
        1,
    ]  # the first pixel: right, front
    uids = {
        name: pydicom.uid.generate_uid(_UID_ROOT, [patient, name])
        for name in ("study", "series", "frame")
    }
    order = np.random.default_rng(len(stored)).permutation(len(stored))
    for file, number in enumerate(order):
        item = pydicom.Dataset()
        item.file_meta = pydicom.dataset.FileMetaDataset()
        item.file_meta.TransferSyntaxUID = _LITTLE_ENDIAN
        item.SOPClassUID = _IMAGE_CLASSES[modality]
        item.SOPInstanceUID = pydicom.uid.generate_uid(_UID_ROOT, [patient, f"slice {number}"])
        item.file_meta.MediaStorageSOPClassUID = item.SOPClassUID
        item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID
        item.Modality, item.PatientName, item.PatientID = modality, patient, patient
        item.StudyInstanceUID, item.SeriesInstanceUID = uids["study"], uids["series"]
        item.FrameOfReferenceUID, item.PatientPosition = uids["frame"], "HFS"
        item.SeriesNumber, item.InstanceNumber = 1, int(number) + 1
        item.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        height = affine[2, 3] + number * spacing[2]
        item.ImagePositionPatient = [f"{-last[0]:.4f}", f"{-last[1]:.4f}", f"{height:.4f}"]
        item.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        item.SliceThickness = float(spacing[2])
        item.Rows, item.Columns = stored.shape[1:]
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 15
        item.PixelRepresentation = 1
        item.RescaleSlope, item.RescaleIntercept = rescale
        for keyword, value in (tags or {}).items():
            setattr(item, keyword, value)
        item.PixelData = stored[number].tobytes()
        item.save_as(folder / f"IM{file:04d}", enforce_file_format=True)
