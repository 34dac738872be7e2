"""NIfTI-1 and NIfTI-2, single files and pairs, plain or compressed.

Geometry: the coded sform, else the coded qform; a file with neither states no orientation.
Headers are parsed by nibabel; bytes are read here, bounded by the size of the file.
"""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from domainssl.errors import DataError, parsing, require
from domainssl.io.volume.facts import (
    Header,
    Reading,
    Scan,
    ScanFacts,
    chosen_volume,
    finish,
    in_words,
)
from domainssl.io.volume.geometry import displacement
from domainssl.io.volume.nifti_extensions import first_voxel
from domainssl.io.volume.stored import StoredFile, as_float32, check_size, open_stored, rescaled

__all__ = ["ENDINGS", "describe", "is_nifti", "read"]

Array = np.ndarray[Any, Any]
ENDINGS = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
_HEADER = {348: (b"n+1\0", b"ni1\0"), 540: (b"n+2\0", b"ni2\0")}
_FIRST_VOXEL = {348: 352, 540: 544}
_TO_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_UNITS = {1: "metres", 3: "micrometres"}
_PIXDIM = 0.01  # relative difference of voxel sizes that is said
_ROUNDING = 1e-4  # of a quaternion's length
_SMALL = 1e-7  # below: the first part of a quaternion is rounding
_NAMED = 1024  # bytes of content looked at to tell what a file is


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the voxels lie and how they are scaled.

    Attributes:
        header: Facts of the file.
        data: File with the voxels.
        offset: Its byte with the first voxel.
        end: The byte after the last one.
        parts: Numbers stored together in a voxel: 3 of RGB, 4 of RGBA, else 1.
        slope: Factor; None where values count as stored.
        intercept: Added after the factor.
    """

    header: Header
    data: str
    offset: int
    end: int
    parts: int
    slope: float | None
    intercept: float


def is_nifti(path: str) -> bool:
    """Whether a file starts like NIfTI; of a pair, either file."""
    try:
        with open_stored(_pair(path)[0]) as file:
            return _kind(file.head(_NAMED)) is not None
    except DataError:
        return False


def describe(path: str, reading: Reading) -> ScanFacts:
    """Return the facts of a NIfTI file from its header.

    Raises:
        DataError: It cannot be read, or states no orientation.
    """
    with open_stored(_pair(path)[0]) as file:
        return _layout(path, file, reading).header.facts()


def read(path: str, reading: Reading) -> Scan:
    """Return one volume of a NIfTI file.

    Raises:
        DataError: It cannot be read, states no orientation, or holds several volumes of which
            none is chosen.
    """
    with open_stored(_pair(path)[0]) as file:
        layout = _layout(path, file, reading)
        if layout.data == _pair(path)[0]:
            return _voxels(path, file, layout, reading)
    with open_stored(layout.data) as data:
        return _voxels(path, data, layout, reading)


def _pair(path: str) -> tuple[str, str | None]:
    """Return the files of header and voxels; None for the second where the first tells."""
    for header, image in ((".hdr", ".img"), (".hdr.gz", ".img.gz")):
        for ending in (header, image):
            if path.lower().endswith(ending):
                stem = path[: -len(ending)]
                return stem + _same_case(path, header), stem + _same_case(path, image)
    return path, None


def _same_case(path: str, ending: str) -> str:
    return ending.upper() if path[-len(ending) :].isupper() else ending


def _kind(head: bytes) -> int | None:
    """Return the size of the header, None where it is no NIfTI."""
    for size, magic in _HEADER.items():
        named = head[344:348] if size == 348 else head[4:8]
        if named in magic and size in {int.from_bytes(head[:4], o) for o in ("little", "big")}:
            return size
    return None


def _header(path: str, file: StoredFile) -> tuple[Any, int]:
    """Return nibabel's header and its size."""
    head = file.head(540)
    size = _kind(head)
    if size is None:
        lengths = {int.from_bytes(head[:4], order) for order in ("little", "big")}
        hint = (
            "It looks like ANALYZE 7.5, which states no orientation: convert it to NIfTI with "
            "the orientation that you know."
            if 348 in lengths and len(head) >= 348
            else f"It starts with {head[:8]!r}. Check the name, or get it again from its source."
        )
        raise DataError(f"{path}: no NIfTI file (empty or without its magic number). {hint}")
    nibabel = require("nibabel", "medical")
    kind = {
        (348, True): nibabel.Nifti1Header,
        (348, False): nibabel.Nifti1Pair.header_class,
        (540, True): nibabel.Nifti2Header,
        (540, False): nibabel.Nifti2Pair.header_class,
    }[size, b"+" in (head[344:348] if size == 348 else head[4:8])]
    with _parsing(f"{path}: the header"):
        if len(head) < size:
            raise EOFError(f"{len(head)} of {size} bytes")
        return kind.from_fileobj(io.BytesIO(head[:size]), check=False), size


def _parsing(what: str) -> Any:
    spatial = require("nibabel", "medical").spatialimages
    return parsing(what, also=(spatial.HeaderDataError, spatial.ImageDataError))


def _layout(path: str, file: StoredFile, reading: Reading) -> _Layout:
    header, size = _header(path, file)
    with _parsing(f"{path}: the header"):
        dims = [int(n) for n in header["dim"]]
        dtype = header.get_data_dtype()
        offset = float(header["vox_offset"])
    sizes, volumes, vectors = _axes(path, dims)
    parts = len(dtype.names or "1")
    if dtype.kind == "c":
        raise DataError(
            f"{path}: holds complex numbers ({dtype.name}), expected real ones. Save magnitude or "
            "phase as a file of its own."
        )
    if dtype.kind not in "iuf" and not dtype.names:
        raise DataError(
            f"{path}: the data type {dtype} (code {int(header['datatype'])}) cannot be read, "
            "expected whole numbers, floating point or RGB. Convert the file."
        )
    total = check_size(path, sizes, dtype, volumes * vectors)
    is_single = b"+" in bytes(header["magic"].item())
    data = file.path if is_single else _image(path)
    first = _stated_offset(path, offset, _FIRST_VOXEL[size] if is_single else 0)
    if is_single:
        first = first_voxel(path, file, size, first, total)
    what = f"{' × '.join(map(str, dims[1 : 1 + dims[0]]))} voxels of {_name(dtype)}"
    if is_single:
        more = file.check(first + total, what)
    else:
        with open_stored(data) as voxels:
            more = voxels.check(first + total, what)
    affine, is_oriented, warnings = _affine(path, header, sizes, reading)
    warnings += more
    bits = int(header["bitpix"])
    if bits not in (0, 8 * dtype.itemsize):
        warnings.append(
            f"{path}: bitpix is {bits}, but the data type {_name(dtype)} has "
            f"{8 * dtype.itemsize} bits, which are read"
        )
    slope, intercept = _scaling(path, header)
    if math.isinf(float(header["scl_slope"])):
        warnings.append(f"{path}: scl_slope is infinite, so that values count as stored")
    return _Layout(
        header=Header(
            path=path,
            format="nifti",
            sizes=sizes,
            affine=affine,
            dtype=np.dtype(np.uint8) if dtype.names else dtype,
            channels=vectors * parts,
            volumes=volumes,
            is_oriented=is_oriented,
            warnings=tuple(warnings),
        ),
        data=data,
        offset=first,
        end=first + total,
        parts=parts,
        slope=None if dtype.names else slope,
        intercept=intercept,
    )


def _name(dtype: np.dtype[Any]) -> str:
    return "RGB" + "A" * (len(dtype.names) == 4) if dtype.names else dtype.name


def _axes(path: str, dims: list[int]) -> tuple[tuple[int, int, int], int, int]:
    """Return voxels per spatial axis, volumes (fourth axis) and vector components (fifth)."""
    count, lengths = dims[0], dims[1 : 1 + max(0, dims[0])]
    if not 2 <= count <= 7 or min(lengths) < 1:
        raise DataError(
            f"{path}: the header gives {count} axes of {lengths}, expected two to seven of at "
            "least one. It is damaged or no image; get it again from its source."
        )
    x, y, z, volumes, vectors, *more = [*lengths, *[1] * (7 - count)]
    if math.prod(more) > 1:
        raise DataError(
            f"{path}: has the axes {' × '.join(map(str, lengths))}; a sixth or seventh axis is "
            "not read. Save it as one file per volume."
        )
    return (x, y, z), volumes, vectors


def _image(path: str) -> str:
    found = _pair(path)[1]
    if found is None or not os.path.isfile(found):
        raise DataError(
            f"{path}: the header of a pair whose voxels lie in "
            f"{os.path.basename(found) if found else 'an .img file'}, which is not there. Put both "
            "files side by side, or save a single .nii file."
        )
    return found


def _stated_offset(path: str, offset: float, least: int) -> int:
    """Return vox_offset as it can be; 0 where it is not stated."""
    if offset == 0:
        return 0
    if not math.isfinite(offset) or offset != int(offset) or offset < least:
        raise DataError(
            f"{path}: vox_offset is {offset:g}, expected a whole number from {least} on. The "
            "header is damaged; get the file again from its source."
        )
    return int(offset)


def _scaling(path: str, header: Any) -> tuple[float | None, float]:
    """Return slope and intercept, None for the slope where values count as stored."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return None, 0.0
    if not math.isfinite(intercept):
        raise DataError(
            f"{path}: scl_slope is {slope:g} and scl_inter {intercept:g}, expected a finite "
            "number. Correct the header: 0 if nothing is added."
        )
    return (None, 0.0) if (slope, intercept) == (1.0, 0.0) else (slope, intercept)


def _affine(
    path: str, header: Any, sizes: tuple[int, int, int], reading: Reading
) -> tuple[Array, bool, list[str]]:
    """Return voxel to RAS mm, whether the header states it, and what is odd."""
    warnings = []
    with _parsing(f"{path}: sform and qform"):
        sform = header.get_sform(coded=True)[0]
        unit = int(header["xyzt_units"]) & 7
        pixdim = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
        if int(header["dim"][0]) < 3:
            pixdim[2] = pixdim[2] or 1.0
    qform, qform_code = None, int(header["qform_code"])
    if qform_code > 0 and sform is None:
        qform, odd = _qform(path, header)
        warnings += odd
    if unit not in _TO_MM:
        warnings.append(f"{path}: xyzt_units has the unknown code {unit}, taken for mm")
    scale = np.diag([_TO_MM.get(unit, 1.0)] * 3 + [1.0])
    if unit in _UNITS:
        warnings.append(f"{path}: lengths in {_UNITS[unit]} (xyzt_units), converted to mm")
    affine = sform if sform is not None else qform
    if affine is None:
        if reading.orientation != "assume_pixdim":
            raise DataError(
                f"{path}: neither sform nor qform is coded (both codes are 0), so the orientation "
                "is unknown. Correct the header, or set `orientation: assume_pixdim` to read it by "
                f"its voxel sizes {_sizes(pixdim)}, the axes taken for right, anterior, superior."
                + in_words("orientation=assume_pixdim")
            )
        if not np.isfinite(pixdim).all() or not pixdim.all():
            raise DataError(f"{path}: pixdim gives voxels of {_sizes(pixdim)}, expected sizes > 0.")
        warnings.append(
            f"{path}: neither sform nor qform is coded: orientation assumed, voxels of "
            f"{_sizes(pixdim)} mm by pixdim"
        )
        return scale @ np.diag([*pixdim, 1.0]), False, warnings
    affine = np.asarray(affine, np.float64)
    if sform is not None:
        warnings += _contradictions(path, header, affine, pixdim, sizes, qform_code)
    return scale @ affine, True, warnings


def _qform(path: str, header: Any) -> tuple[Array, list[str]]:
    """Return the qform, (4, 4), and what is odd about its fields.

    As in the C library of NIfTI, a pixdim[0] that is not below 0 means no flip, and a quaternion
    that rounding made longer than 1 is scaled back. Sizes below 0 count without their sign, as
    nibabel and SPM read them.
    """
    warnings = []
    stated = np.asarray(header["pixdim"][:4], np.float64)
    if stated[0] not in (1.0, -1.0):
        warnings.append(f"{path}: pixdim[0] is {stated[0]:g}, expected 1 or -1; taken for 1 in the "
                        "qform")  # fmt: skip
        stated[0] = -1.0 if stated[0] < 0 else 1.0
    if (stated[1:] < 0).any():
        warnings.append(f"{path}: voxel sizes of pixdim are below 0; their signs do not count")
    vector = np.array([header[f"quatern_{axis}"] for axis in "bcd"], np.float64)
    length = float(np.linalg.norm(vector))
    if not length <= 1 + _ROUNDING:
        raise DataError(
            f"{path}: the quaternion of the qform has the length {length:g}, expected at most 1. "
            "The header is damaged; get the file again from its source."
        )
    rest = 1.0 - length**2
    real = np.sqrt(rest) if rest >= _SMALL else 0.0
    turn = require("nibabel", "medical").quaternions.quat2mat([real, *vector])
    qform = np.eye(4)
    qform[:3, :3] = turn * (np.abs(stated[1:]) * (1, 1, stated[0]))
    qform[:3, 3] = [header[f"qoffset_{axis}"] for axis in "xyz"]
    return qform, warnings


def _sizes(sizes: Array) -> str:
    return " × ".join(f"{size:.6g}" for size in sizes)


def _contradictions(
    path: str, header: Any, sform: Array, pixdim: Array, sizes: tuple[int, int, int], code: int
) -> list[str]:
    """Say where pixdim and a coded qform disagree with the sform, which counts."""
    warnings = []
    spacing = np.linalg.norm(sform[:3, :3], axis=0)
    axes = [axis for axis in range(3) if sizes[axis] > 1] or [0, 1, 2]
    if not np.allclose(pixdim[axes], spacing[axes], rtol=_PIXDIM, atol=0):
        warnings.append(
            f"{path}: voxels of {_sizes(spacing)} by the sform, which counts, but "
            f"{_sizes(pixdim)} by pixdim"
        )
    if code > 0 and np.isfinite(sform).all() and abs(np.linalg.det(sform[:3, :3])) > 0:
        try:
            qform, odd = _qform(path, header)
            warnings += odd
            with _parsing(f"{path}: the qform"):
                distance, voxels = displacement(sform, qform, sizes)
        except DataError as error:
            return [*warnings, f"{error} The sform counts."]
        if voxels > 0.1:
            warnings.append(
                f"{path}: sform and qform are both coded and differ by up to {distance:.4g} mm "
                f"({voxels:.3g} voxels); the sform counts"
            )
    return warnings


def _voxels(path: str, file: StoredFile, layout: _Layout, reading: Reading) -> Scan:
    """Read one volume: a block per component of the fifth axis."""
    header, parts = layout.header, layout.parts
    index = chosen_volume(path, header.volumes, reading)
    block = math.prod(header.sizes) * header.dtype.itemsize * parts
    channels: list[Array] = []
    for vector in range(header.channels // parts):
        raw = file.read(layout.offset + (vector * header.volumes + index) * block, block)
        voxels = raw.view(header.dtype).reshape(parts, *header.sizes, order="F")
        channels += [_scaled(part, layout) for part in voxels]
    more = file.check_end(layout.end)
    return finish(replace(header, warnings=(*header.warnings, *more)), channels, filler=None)


def _scaled(values: Array, layout: _Layout) -> Array:
    if layout.slope is not None:
        return rescaled(values, layout.slope, layout.intercept)
    return as_float32(values)
