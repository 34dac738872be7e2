"""One DICOM file: what it is, where its planes lie, and by what stored numbers become values.

Names, ids, dates, accession numbers and UIDs are neither kept nor shown: a series is told from
another by a digest, and words of the DICOM library, which may hold values, are not quoted.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from domainssl.errors import DataError, parsing, require
from domainssl.io.storage.paths import is_settled, stamp
from domainssl.io.volume.dicom_groups import Grouped
from domainssl.io.volume.dicom_words import word_of
from domainssl.io.volume.stored import VOLUME_LIMIT, open_stored

__all__ = [
    "DAMAGED",
    "DicomFile",
    "Plane",
    "Table",
    "dicom",
    "is_dicom",
    "look",
    "reading_dicom",
]

Array = np.ndarray[Any, Any]
Numbers = tuple[float, ...]
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_CLASSES = "1.2.840.10008.5.1.4.1.1."
# beginnings of the SOP class, without the part above, of what is no image
_OTHERS = {
    "481.3": "RTSTRUCT",
    "481.": "radiotherapy object",
    "88.": "structured report",
    "11.": "presentation state",
    "66.": "registration or segmentation of surfaces",
    "9.": "waveform",
    "104.": "encapsulated document",
}
# CT, MR, secondary capture and PET, single and multi-frame
_IMAGES = ("2", "2.1", "2.2", "4", "4.1", "4.3", "4.4", "7", "128", "128.1", "130")
_DEFLATED = {  # pydicom inflates them whole, whatever comes out
    b"1.2.840.10008.1.2.1.99\0": "Deflated Explicit VR Little Endian (1.2.840.10008.1.2.1.99)",
    b"1.2.840.10008.1.2.1.99 ": "Deflated Explicit VR Little Endian (1.2.840.10008.1.2.1.99)",
    b"1.2.840.10008.1.2.8.": "Deflated Image Frame Compression (1.2.840.10008.1.2.8.1)",
}
_HEAD = 1024
_QUIET = r"pydicom(\..*)?"
_PHASES = ("EchoTime", "TemporalPositionIdentifier", "TriggerTime", "DiffusionBValue",
           "AcquisitionNumber", "InversionTime", "FlipAngle", "RepetitionTime",
           "ImageType")  # fmt: skip
_TEXTS = ("SeriesDescription", "ProtocolName")  # may hold names: compared, shown nowhere
_TAGS = (
    "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "Modality",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "ModalityLUTSequence",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "SegmentationType", *_PHASES, *_TEXTS, "ContrastBolusAgent",
)  # fmt: skip
_seen: dict[str, tuple[tuple[str, int, int, int], DicomFile]] = {}  # by path
_MOST_SEEN = 50_000  # files of one plane that a process remembers: about 2 kB each
DAMAGED = "The file is cut off or damaged; export it again."


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One plane of a file.

    Attributes:
        path: The file.
        frame: Number of the frame in it.
        position: Centre of the first pixel in LPS mm; None if it has none.
        orientation: Directions of a row and of a column, six numbers; None if it has none.
        spacing: Distance between rows, and between columns, in mm; None if it has none.
        rows: Rows of pixels.
        columns: Columns of pixels.
        slope: Factor of the stored numbers.
        intercept: What is added then.
        step: Distance to the next plane in mm as the file states it, if it does.
        is_localizer: Whether it is marked as a localizer.
        phases: What may tell planes at one place apart, by attribute.
        segment: Number of the segment that a plane of a segmentation shows.
        is_scaled: Whether slope and intercept are stated.
        scale_type: What the scaled numbers are, such as HU; empty where not stated.
    """

    path: str
    frame: int
    position: Numbers | None
    orientation: Numbers | None
    spacing: Numbers | None
    rows: int
    columns: int
    slope: float
    intercept: float
    step: float | None
    is_localizer: bool
    phases: tuple[tuple[str, str], ...]
    segment: int | None = None
    is_scaled: bool = True
    scale_type: str = ""

    @property
    def name(self) -> str:
        """Name of the file, with the frame where it has several."""
        name = os.path.basename(self.path)
        return f"{name} (frame {self.frame + 1})" if self.frame else name


@dataclass(frozen=True)
class Table:
    """A table of values for stored numbers from `first` on."""

    first: int
    values: Array


@dataclass(frozen=True, kw_only=True)
class DicomFile:
    """A DICOM file.

    Attributes:
        path: The file.
        series: Digest that tells its series from others.
        number: Number of the series, 0 if it has none.
        modality: Modality as stated, such as CT.
        what: `image`, `segmentation`, or why it is neither.
        planes: Its planes.
        syntax: UID of its transfer syntax.
        is_signed: Whether stored numbers are signed.
        bits: Bits allocated per number.
        padding: Least and greatest stored number that stands for no value.
        table: Table of values, instead of slope and intercept.
        kind: Type of a segmentation: BINARY, FRACTIONAL or LABELMAP.
        study: Digest that tells its study from others.
        word: Contrast of its series, such as `t1c`; empty where unknown.
        texts: What its series is called; never shown.
    """

    path: str
    series: str
    number: int
    modality: str
    what: str
    planes: tuple[Plane, ...] = ()
    syntax: str = ""
    is_signed: bool = False
    bits: int = 16
    padding: tuple[int, int] | None = None
    table: Table | None = None
    kind: str = ""
    study: str = field(default="", repr=False)
    word: str = ""
    texts: tuple[str, ...] = field(default=(), repr=False)


def dicom() -> Any:
    """Return pydicom, which must not warn: its warnings show values."""
    pydicom = require("pydicom", "medical")
    if not any(getattr(entry[3], "pattern", None) == _QUIET for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_QUIET)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return pydicom


def reading_dicom(what: str) -> AbstractContextManager[None]:
    """Turn what pydicom raises into an error without its words."""
    errors = dicom().errors
    also = (errors.InvalidDicomError, errors.BytesLengthException)
    return parsing(what, advice=DAMAGED, also=also, quoted=False)


def is_dicom(path: str) -> bool:
    """Whether a file starts like DICOM, with the preamble or with its first group."""
    if _remembered(path) is not None:
        return True
    try:
        with open_stored(path, packing=None) as file:
            return _starts_like_dicom(file.head(_HEAD))
    except DataError:
        return False


def _starts_like_dicom(head: bytes) -> bool:
    if head[128:132] == b"DICM":
        return True
    return head[:2] in (b"\x08\0", b"\x02\0") and head[2:4] in (
        b"\0\0",
        b"\x05\0",
        b"\x08\0",
        b"\x16\0",
    )


def _remembered(path: str) -> DicomFile | None:
    """Return what an earlier look found, as long as the file is the same."""
    known = _seen.get(path)
    return known[1] if known is not None and known[0] == stamp(path) else None


def look(path: str) -> DicomFile:
    """Return what a DICOM file is, without its pixels.

    Each series of a flat folder looks at all files there, so that a process remembers them.

    Raises:
        DataError: It is damaged.
    """
    found = _remembered(path)
    if found is not None:
        return found
    state = stamp(path)
    with open_stored(path, packing=None) as file:
        head, size = file.head(_HEAD), file.size
    found = _looked_at(path, head, size)
    if _starts_like_dicom(head) and len(found.planes) <= 1:
        if is_settled(os.stat(path), time.time_ns()):
            _seen[path] = state, found
        while len(_seen) > _MOST_SEEN:
            _seen.pop(next(iter(_seen)), None)
    return found


def _looked_at(path: str, head: bytes, size: int) -> DicomFile:
    pydicom = dicom()
    deflated = next((name for syntax, name in _DEFLATED.items() if syntax in head), None)
    if deflated is not None:
        raise DataError(
            f"{path}: its transfer syntax {deflated} is not read. Export it as explicit VR little "
            "endian, for instance with dcmtk's `dcmconv +te`."
        )
    with reading_dicom(f"{path}: the DICOM header"):
        found = pydicom.dcmread(
            path, stop_before_pixels=True, force=head[128:132] != b"DICM", specific_tags=list(_TAGS)
        )
        sop = str(found.get("SOPClassUID") or found.file_meta.get("MediaStorageSOPClassUID") or "")
        if sop == "1.2.840.10008.1.3.10":
            return _other(path, found, "DICOMDIR")
        if not sop and not found.get("Rows"):
            raise EOFError("no class of object")
        what = _what(sop, found)
        if what not in ("image", "segmentation"):
            return _other(path, found, what)
        return _image(path, found, what, size)


def _what(sop: str, found: Any) -> str:
    if sop in SEGMENTATIONS:
        return "segmentation"
    rest = sop.removeprefix(_CLASSES)
    for start, name in _OTHERS.items():
        if rest != sop and rest.startswith(start):
            return name
    if found.get("Rows") and found.get("Columns"):
        return "image"
    if rest in _IMAGES:
        raise EOFError("an image without rows and columns")
    return "no image"


def _series(path: str, found: Any) -> str:
    uid = str(found.get("SeriesInstanceUID") or "").strip()
    study = str(found.get("StudyInstanceUID") or "").strip()
    name = f"{study}/{uid}" if uid else f"folder {os.path.dirname(path)}"
    return hashlib.sha256(f"{name}/{found.get('Modality') or ''}".encode()).hexdigest()


def _other(path: str, found: Any, what: str) -> DicomFile:
    modality = str(found.get("Modality") or "")
    return DicomFile(path=path, series=_series(path, found), number=0, modality=modality, what=what)


def _image(path: str, found: Any, what: str, size: int) -> DicomFile:
    syntax = _syntax(found)
    rows, columns = int(found.Rows), int(found.Columns)
    bits, samples = int(found.get("BitsAllocated") or 16), int(found.get("SamplesPerPixel") or 1)
    if bits not in (1, 8, 16, 32, 64):
        raise ValueError("an impossible number of bits")
    count = int(found.get("NumberOfFrames") or 1)
    needed = -(-rows * columns * samples * count * bits // 8)
    if needed > VOLUME_LIMIT or rows * columns > 2**28 or count < 1:
        raise DataError(
            f"{path}: the header gives {count} frames of {rows} × {columns} pixels, expected at "
            f"most {VOLUME_LIMIT / 1e9:.2g} GB. {DAMAGED}"
        )
    if not syntax.is_encapsulated and needed > size:
        raise DataError(
            f"{path}: the header speaks of {needed} bytes of pixels, but the file has {size}. "
            f"{DAMAGED}"
        )
    colour = str(found.get("PhotometricInterpretation") or "MONOCHROME2")
    if samples != 1 or not colour.startswith("MONOCHROME"):
        what = "colour image"
    if "MOSAIC" in [str(part).upper() for part in found.get("ImageType") or ()]:
        raise DataError(
            f"{path}: a mosaic, which holds all slices of a volume in one image. Convert the "
            "series to NIfTI, for example with dcm2niix."
        )
    is_signed = bool(int(found.get("PixelRepresentation") or 0))
    _check_bits(path, found, bits)
    planes, table = _planes(path, found, count), _table(found, syntax)
    texts = [str(found.get(name) or "") for name in _TEXTS]
    modality, agent = str(found.get("Modality") or ""), str(found.get("ContrastBolusAgent") or "")
    study = str(found.get("StudyInstanceUID") or "").strip()
    return DicomFile(
        path=path,
        series=_series(path, found),
        number=int(found.get("SeriesNumber") or 0),
        modality=modality,
        what=what,
        planes=tuple(planes),
        syntax=str(syntax),
        is_signed=is_signed,
        bits=bits,
        padding=_padding(found, is_signed, bits),
        table=table,
        kind=str(found.get("SegmentationType") or ""),
        study=hashlib.sha256(study.encode()).hexdigest() if study else "",
        word=word_of(modality, texts, agent),
        texts=tuple(texts),
    )


def _check_bits(path: str, found: Any, bits: int) -> None:
    """Refuse numbers that do not end at the lowest bit: they would be read as multiples."""
    stored = int(found.get("BitsStored") or bits)
    high = int(found.get("HighBit") or stored - 1)
    if stored <= high < bits:
        raise DataError(
            f"{path}: its numbers have {stored} bits (BitsStored) up to bit {high} (HighBit), "
            f"expected HighBit {stored - 1}. Convert it, for example with `gdcmconv --raw`; or "
            "correct HighBit, if the numbers end at bit 0."
        )


def _syntax(found: Any) -> Any:
    """Return the transfer syntax, that of the bytes where the file has no meta group."""
    stated = found.file_meta.get("TransferSyntaxUID")
    if stated:
        return stated
    is_implicit, is_little = found.original_encoding
    uid = require("pydicom.uid", "medical")
    plain = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
    return uid.ImplicitVRLittleEndian if is_implicit else plain


def _planes(path: str, found: Any, count: int) -> list[Plane]:
    groups = found.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        planes = [_plane(path, found, 0, found.get)]
        # several frames without a place each: the place of the first says nothing of the others
        return planes if count == 1 else [
            _plane(path, found, n, lambda name: None) for n in range(count)
        ]  # fmt: skip
    if len(groups) != count:
        raise ValueError("frames and their groups differ in number")
    shared = (found.get("SharedFunctionalGroupsSequence") or [None])[0]
    return [_plane(path, found, n, Grouped(group, shared, found)) for n, group in enumerate(groups)]


def _plane(path: str, found: Any, frame: int, get: Callable[[str], Any]) -> Plane:
    slope, intercept = get("RescaleSlope"), get("RescaleIntercept")
    kind = get("ImageType") or found.get("ImageType") or ()
    kind = [kind] if isinstance(kind, str) else list(kind)
    stated = get("SpacingBetweenSlices") or get("SliceThickness")
    segment = get("ReferencedSegmentNumber")
    phases = [(name, get(name)) for name in _PHASES]
    return Plane(
        path=path,
        frame=frame,
        position=_numbers(get("ImagePositionPatient"), 3),
        orientation=_numbers(get("ImageOrientationPatient"), 6),
        spacing=_numbers(get("PixelSpacing"), 2),
        rows=int(found.Rows),
        columns=int(found.Columns),
        slope=1.0 if slope is None else _finite(slope),
        intercept=0.0 if intercept is None else _finite(intercept),
        step=abs(_finite(stated)) if stated else None,
        is_localizer="LOCALIZER" in [str(part).upper() for part in kind],
        phases=tuple((name, _text(value)) for name, value in phases if value is not None),
        segment=None if segment is None else int(segment),
        is_scaled=slope is not None and intercept is not None,
        scale_type=_word(get("RescaleType")),
    )


def _word(value: Any) -> str:
    """Return a code such as HU; a text that may hold more is told by its kind alone."""
    text = str(value or "").strip().upper()
    return text if re.fullmatch(r"[A-Z0-9_]{0,16}", text) else "A TEXT"


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float) else "\\".join(map(str, value))


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _numbers(value: Any, count: int) -> Numbers | None:
    if value is None or value == "" or len(value) == 0:
        return None
    numbers = tuple(_finite(number) for number in value)
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers instead of {count}")
    return numbers


def _padding(found: Any, is_signed: bool, bits: int) -> tuple[int, int] | None:
    """Return the range of stored numbers that stand for no value.

    The tag may be written with the wrong sign, in which the bits are right; as in pixels, bits
    above BitsStored are no part of the number.
    """
    first, last = found.get("PixelPaddingValue"), found.get("PixelPaddingRangeLimit")
    if first is None:
        return None
    bits = min(bits, int(found.get("BitsStored") or bits))
    ends = []
    for end in (first, first if last is None else last):
        number = int.from_bytes(end[:2], "little") if isinstance(end, bytes) else int(end)
        number %= 2**bits
        ends.append(number - 2**bits if is_signed and number >= 2 ** (bits - 1) else number)
    return min(ends), max(ends)


def _table(found: Any, syntax: Any) -> Table | None:
    """Return the modality table, which takes the place of slope and intercept."""
    items = found.get("ModalityLUTSequence")
    if not items:
        return None
    count, first, bits = (int(n) for n in items[0].LUTDescriptor)
    count = count or 2**16
    data = items[0]["LUTData"].value
    if isinstance(data, bytes):
        order = "<" if syntax.is_little_endian else ">"
        is_narrow = bits <= 8 and len(data) < 2 * count
        values = np.frombuffer(data, "u1" if is_narrow else order + "u2")[:count]
    else:
        values = np.atleast_1d(np.array(data, np.int64))[:count]
    if len(values) != count or bits > 16:
        raise ValueError("the table is shorter than it says")
    if int(found.get("PixelRepresentation") or 0) and first >= 2**15:
        first -= 2**16
    return Table(first, values.astype(np.int32))
