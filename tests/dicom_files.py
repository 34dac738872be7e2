"""Small DICOM files that tests write themselves; every one carries names that must not be shown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
PET = "1.2.840.10008.5.1.4.1.1.128"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
LABELMAP = "1.2.840.10008.5.1.4.1.1.66.7"
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
REPORT = "1.2.840.10008.5.1.4.1.1.88.11"
AXIAL = (1, 0, 0, 0, 1, 0)
ROOT = "1.2.826.0.1.3680043.8.498"
# in every file, and in no output
PRIVATE = ("Invented", "INVENTED-0001", "20200102", "ACC-77", "Dr^House", ROOT)


def private(file: FileDataset, series: str) -> None:
    """Give a file the attributes that are never shown."""
    file.PatientName, file.PatientID, file.StudyDate = (
        "Invented^Person",
        "INVENTED-0001",
        "20200102",
    )
    file.AccessionNumber, file.ReferringPhysicianName = "ACC-77", "Dr^House"
    file.SeriesDescription = "chest of Invented"
    file.StudyInstanceUID = f"{ROOT}.9"
    file.SeriesInstanceUID = f"{ROOT}.{series}" if series else ""


def blank(path: Path, sop: str, series: str = "1", *, implicit: bool = False) -> FileDataset:
    """A file without pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop
    meta.MediaStorageSOPInstanceUID = f"{ROOT}.{sum(path.name.encode()) + 1}"
    meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = sop, meta.MediaStorageSOPInstanceUID
    private(file, series)
    return file


def _pixels(file: Any, stored: np.ndarray, bits: int, signed: bool) -> None:
    file.Rows, file.Columns = stored.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, bits, bits - 1
    file.PixelRepresentation = int(signed)
    file.PixelData = np.ascontiguousarray(stored).astype("<i2" if signed else "<u2").tobytes()


def write_slice(
    path: Path,
    stored: np.ndarray,
    position: Iterable[float] | None = (0, 0, 0),
    *,
    orientation: Iterable[float] = AXIAL,
    spacing: tuple[float, float] = (2.0, 1.5),
    sop: str = CT,
    modality: str = "CT",
    series: str = "1",
    number: int = 3,
    slope: float | None = 1,
    intercept: float = -1024,
    signed: bool = True,
    bits: int = 16,
    implicit: bool = False,
    save: bool = True,
    **more: Any,
) -> FileDataset:
    """One image of rows x columns stored numbers; `more` sets attributes by keyword."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = blank(path, sop, series, implicit=implicit)
    file.Modality, file.SeriesNumber = modality, number
    file.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    if position is not None:
        file.ImagePositionPatient = [f"{value:.10g}" for value in position]
        file.ImageOrientationPatient = [f"{value:.10g}" for value in orientation]
        file.PixelSpacing = [f"{value:.10g}" for value in spacing]
    if slope is not None:
        file.RescaleSlope, file.RescaleIntercept = f"{slope:.10g}", f"{intercept:.10g}"
    _pixels(file, stored, bits, signed)
    for key, value in more.items():
        setattr(file, key, value)
    if save:
        file.save_as(path, enforce_file_format=True)
    return file


def plane(k: int, rows: int = 5, columns: int = 4) -> np.ndarray:
    """Stored numbers of plane k: all differ."""
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return 24 + 100 * k + 10 * r + c


def write_series(folder: Path, count: int = 6, step: float = 2.5, **more: Any) -> np.ndarray:
    """Axial slices whose names and numbers say nothing about their order.

    Returns:
        Values with slope 1 and intercept -1024, (columns, rows, slices).
    """
    for k in range(count):
        name = f"IM{(k * 5 + 2) % 13:04d}"
        write_slice(folder / name, plane(k), (-3, -4, -100 + step * k), InstanceNumber=(k * 5) % 7,
                    **more)  # fmt: skip
    return np.stack([plane(k).T - 1024 for k in range(count)], axis=-1)


def affine_of(step: Iterable[float] = (0, 0, 2.5), start: Iterable[float] = (-3, -4, -100)) -> Any:
    """RAS affine of `write_series`, axes (column, row, slice)."""
    lps = np.eye(4)
    lps[0, 0], lps[1, 1] = 1.5, 2.0
    lps[:3, 2], lps[:3, 3] = list(step), list(start)
    return np.diag([-1.0, -1, 1, 1]) @ lps


def item(**values: Any) -> Sequence:
    """A sequence of one item."""
    found = Dataset()
    for key, value in values.items():
        setattr(found, key, value)
    return Sequence([found])


def _frames(positions: Iterable[Iterable[float]], more: list[dict[str, Any]]) -> Sequence:
    frames = []
    for position, extra in zip(positions, more, strict=True):
        frame = Dataset()
        frame.PlanePositionSequence = item(ImagePositionPatient=[f"{v:.10g}" for v in position])
        for key, value in extra.items():
            setattr(frame, key, value)
        frames.append(frame)
    return Sequence(frames)


def write_enhanced(
    path: Path, order: list[int], slopes: list[float] | None = None, **more: Any
) -> np.ndarray:
    """One file with a frame per entry of `order`, which is the place of the frame in the stack."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = blank(path, ENHANCED_CT)
    file.Modality, file.SeriesNumber, file.NumberOfFrames = "CT", 4, len(order)
    slopes = slopes or [1.0] * len(order)
    file.SharedFunctionalGroupsSequence = item(
        PlaneOrientationSequence=item(ImageOrientationPatient=list(AXIAL)),
        PixelMeasuresSequence=item(PixelSpacing=[2.0, 1.5], SliceThickness=5.0),
        CTImageFrameTypeSequence=item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]),
    )
    groups = [
        {"PixelValueTransformationSequence": item(RescaleSlope=slope, RescaleIntercept=-1024)}
        for slope in slopes
    ]
    places = [(-3, -4, -100 + 2.5 * k) for k in order]
    file.PerFrameFunctionalGroupsSequence = _frames(places, groups)
    _pixels(file, np.stack([plane(k) for k in order]), 16, True)
    for key, value in more.items():
        setattr(file, key, value)
    file.save_as(path, enforce_file_format=True)
    values = np.zeros((4, 5, len(order)))
    for k, slope in zip(order, slopes, strict=True):
        values[:, :, k] = plane(k).T * slope - 1024
    return values


def write_seg(
    path: Path, masks: list[np.ndarray], places: list[int], segments: list[int],
    kind: str = "BINARY", step: float = 2.5,
) -> None:  # fmt: skip
    """A segmentation: masks (rows, columns) at places of the stack, each of one segment."""
    file = blank(path, LABELMAP if kind == "LABELMAP" else SEG)
    file.Modality, file.SeriesNumber, file.SegmentationType = "SEG", 5, kind
    file.NumberOfFrames = len(masks)
    file.SharedFunctionalGroupsSequence = item(
        PlaneOrientationSequence=item(ImageOrientationPatient=list(AXIAL)),
        PixelMeasuresSequence=item(PixelSpacing=[2.0, 1.5], SpacingBetweenSlices=step,
                                   SliceThickness=step),
    )  # fmt: skip
    groups = [
        {"SegmentIdentificationSequence": item(ReferencedSegmentNumber=segment)}
        for segment in segments
    ]
    positions = [(-3, -4, -100 + step * k) for k in places]
    file.PerFrameFunctionalGroupsSequence = _frames(positions, groups)
    stack = np.stack(masks)
    file.Rows, file.Columns = stack.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = 1 if kind == "BINARY" else 8
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = (
        bits,
        bits,
        bits - 1,
        0,
    )
    content = (
        np.packbits(stack.ravel().astype(np.uint8), bitorder="little").tobytes()
        if bits == 1
        else stack.astype(np.uint8).tobytes()
    )
    file.PixelData = content + b"\0" * (len(content) % 2)
    file.save_as(path, enforce_file_format=True)
