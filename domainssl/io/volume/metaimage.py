"""MetaImage: .mha with the voxels inside, .mhd with the voxels beside it. World axes are LPS."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from domainssl.errors import DataError, nearest, parsing
from domainssl.io.volume.facts import (
    Header,
    Reading,
    Scan,
    ScanFacts,
    chosen_volume,
    finish,
    in_words,
)
from domainssl.io.volume.geometry import LPS_TO_RAS
from domainssl.io.volume.stored import (
    Packing,
    as_float32,
    check_size,
    companion,
    open_stored,
)

__all__ = ["ENDINGS", "describe", "is_metaimage", "read"]

Array = np.ndarray[Any, Any]
ENDINGS = (".mha", ".mhd")
_HEADER_LIMIT = 2**16
_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
    "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_TO_MM = {"mm": 1.0, "um": 1e-3, "cm": 10.0, "?": 1.0}
_MODALITIES: dict[str, Literal["CT", "MR"]] = {"MET_MOD_CT": "CT", "MET_MOD_MR": "MR"}


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the numbers lie."""

    header: Header
    data: str
    start: int
    skip: int
    packing: Packing


def is_metaimage(path: str) -> bool:
    """Whether a file starts like a MetaImage header."""
    try:
        with open_stored(path, packing=None) as file:
            head = file.head(_HEADER_LIMIT)
    except DataError:
        return False
    first = head.lstrip().split(b"=")[0].strip()
    return first in (b"ObjectType", b"NDims", b"Comment") and b"DimSize" in head


def describe(path: str, reading: Reading) -> ScanFacts:
    """Return the facts of a MetaImage file from its header.

    Raises:
        DataError: It cannot be read.
    """
    return _layout(path, reading).header.facts()


def read(path: str, reading: Reading) -> Scan:
    """Return one volume of a MetaImage file.

    Raises:
        DataError: It cannot be read, or holds several volumes of which none is chosen.
    """
    layout = _layout(path, reading)
    header = layout.header
    index = chosen_volume(path, header.volumes, reading)
    block = math.prod(header.sizes) * header.channels * header.dtype.itemsize
    with open_stored(layout.data, start=layout.start, packing=layout.packing) as file:
        skip = file.size - block * header.volumes if layout.skip < 0 else layout.skip
        raw = file.read(skip + index * block, block)
        file.check_end()
    voxels = raw.view(header.dtype).reshape(header.channels, *header.sizes, order="F")
    return finish(header, [as_float32(channel) for channel in voxels], filler=None)


def _fields(path: str) -> tuple[dict[str, str], int]:
    """Return the header by key in lower case, and the byte after it."""
    with open_stored(path, packing=None) as file:
        head = file.head(_HEADER_LIMIT)
    fields: dict[str, str] = {}
    at = 0
    while at < len(head):
        end = head.find(b"\n", at)
        end = len(head) if end < 0 else end
        line = head[at:end].decode("latin-1").strip()
        at = end + 1
        name, sign, value = line.partition("=")
        if line and not sign:
            break
        fields[name.strip().lower()] = value.strip()
        if name.strip().lower() == "elementdatafile":
            return fields, at
    raise DataError(
        f"{path}: no MetaImage header: it does not end with ElementDataFile. The file is cut off "
        "or of another kind."
    )


def _layout(path: str, reading: Reading) -> _Layout:
    fields, end = _fields(path)
    advice = "Expected NDims, DimSize, ElementType and numbers in them. It is damaged."
    with parsing(f"{path}: the MetaImage header", advice=advice):
        dims = [int(n) for n in fields["dimsize"].split()]
        channels = int(fields.get("elementnumberofchannels", 1))
        skip = int(fields.get("headersize", 0))
        if len(dims) != int(fields["ndims"]):
            raise ValueError(f"DimSize has {len(dims)} numbers, NDims is {fields['ndims']}")
        is_big = _flag(fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb")))
        is_packed = _flag(fields.get("compresseddata"))
        is_binary = _flag(fields.get("binarydata", "True"))
        slope = float(fields.get("elementtointensityfunctionslope", 1))
        intercept = float(fields.get("elementtointensityfunctionoffset", 0))
    kind = fields.get("elementtype", "").removesuffix("_ARRAY")
    if kind not in _TYPES:
        raise DataError(f"{path}: ElementType {kind!r} is not read.{nearest(kind, _TYPES)}")
    if not is_binary:
        raise DataError(f"{path}: BinaryData is False: numbers as text are not read. Save it anew.")
    if (slope, intercept) != (1.0, 0.0):
        raise DataError(
            f"{path}: ElementToIntensityFunction has slope {slope:g} and offset {intercept:g}, "
            "which tools apply or ignore. Save the file with the values that are meant."
        )
    if not 3 <= len(dims) <= 4:
        raise DataError(f"{path}: has {len(dims)} axes, expected three, or four with volumes.")
    i, j, k, volumes = [*dims, 1][:4]
    dtype = np.dtype((">" if is_big else "<") + _TYPES[kind])
    total = check_size(path, (i, j, k), dtype, volumes * channels)
    check_size(path, (i, j, k, channels), dtype)
    data, start = _data(path, fields["elementdatafile"], end)
    affine, is_stated, warnings = _affine(path, fields, len(dims), reading)
    layout = _Layout(
        header=Header(
            path=path,
            format="metaimage",
            sizes=(i, j, k),
            affine=affine,
            dtype=dtype,
            channels=channels,
            volumes=volumes,
            is_oriented=is_stated,
            modality=_MODALITIES.get(fields.get("modality", "")),
            warnings=tuple(warnings),
        ),
        data=data,
        start=start,
        skip=skip,
        packing="zlib" if is_packed else None,
    )
    what = f"{' × '.join(map(str, dims))} voxels of {dtype.name}"
    with open_stored(data, start=start, packing=layout.packing) as file:
        more = file.check(max(0, skip) + total, what)
    more = more if skip >= 0 else []  # the voxels end with the file
    return replace(layout, header=replace(layout.header, warnings=(*warnings, *more)))


def _flag(value: str | None) -> bool:
    if value is None or value.lower() in ("false", "0", "f"):
        return False
    if value.lower() in ("true", "1", "t"):
        return True
    raise ValueError(f"{value!r} is neither True nor False")


def _data(path: str, named: str, end: int) -> tuple[str, int]:
    if named.upper() == "LOCAL":
        return path, end
    if named.upper().startswith("LIST") or "%" in named:
        raise DataError(
            f"{path}: its voxels lie in several files ({named.split()[0]} ...), which is not read. "
            "Save it as one .mha file."
        )
    return companion(path, named), 0


def _affine(
    path: str, fields: dict[str, str], count: int, reading: Reading
) -> tuple[Array, bool, list[str]]:
    """Return voxel to RAS mm, whether the header states the orientation, and what is odd."""
    warnings = []

    def numbers(*names: str) -> Array | None:
        found = next((fields[name] for name in names if name in fields), None)
        if found is None:
            return None
        with parsing(f"{path}: {names[0]}"):
            return np.array([float(n) for n in found.split()])

    spacing = numbers("elementspacing", "elementsize")
    matrix = numbers("transformmatrix", "rotation", "orientation")
    origin = numbers("offset", "position", "origin")
    if spacing is None or len(spacing) != count or not (spacing[:3] > 0).all():
        raise DataError(
            f"{path}: ElementSpacing is {fields.get('elementspacing')!r}, expected {count} sizes "
            "above 0. Add them to the header."
        )
    unit = fields.get("distanceunits", "mm").lower()
    if unit not in _TO_MM:
        warnings.append(f"{path}: DistanceUnits {unit!r} are taken for mm")
    elif _TO_MM[unit] != 1.0:
        warnings.append(f"{path}: lengths in {unit} (DistanceUnits), converted to mm")
    scale = _TO_MM.get(unit, 1.0)
    affine = np.eye(4)
    if matrix is None and reading.orientation != "assume_pixdim":
        sizes = " × ".join(f"{size:.6g}" for size in spacing[:3])
        raise DataError(
            f"{path}: has no TransformMatrix, so the orientation is unknown. Add it, or set "
            f"`orientation: assume_pixdim` to read it by its voxel sizes {sizes}, the axes taken "
            "for right, anterior, superior." + in_words("orientation=assume_pixdim")
        )
    if matrix is None:
        warnings.append(f"{path}: no TransformMatrix: orientation assumed")
        affine[:3, :3] = np.diag(spacing[:3]) * scale
        return affine, False, warnings
    if len(matrix) != count**2 or (origin is not None and len(origin) != count):
        raise DataError(
            f"{path}: TransformMatrix has {len(matrix)} and Offset "
            f"{0 if origin is None else len(origin)} numbers, expected {count**2} and {count}."
        )
    # one row per array axis: the transpose holds the directions as columns
    affine[:3, :3] = matrix.reshape(count, count)[:3, :3].T * spacing[:3] * scale
    if origin is None:
        warnings.append(f"{path}: no Offset: taken for 0, 0, 0")
    else:
        affine[:3, 3] = origin[:3] * scale
    return LPS_TO_RAS @ affine, True, warnings
