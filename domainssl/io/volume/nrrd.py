"""NRRD, attached (.nrrd) and detached (.nhdr). Parsed by pynrrd; the affine is ours.

`space directions` has one vector per array axis, which pynrrd returns as rows; they are the columns
of the affine. World axes other than RAS are negated by name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from domainssl.errors import DataError, nearest, parsing, require
from domainssl.io.volume.facts import (
    SPACES,
    Header,
    Reading,
    Scan,
    ScanFacts,
    chosen_volume,
    finish,
    in_words,
)
from domainssl.io.volume.stored import (
    Packing,
    as_float32,
    check_size,
    companion,
    open_stored,
)

__all__ = ["ENDINGS", "describe", "is_nrrd", "read"]

Array = np.ndarray[Any, Any]
ENDINGS = (".nrrd", ".nhdr")
_HEADER_LIMIT = 2**22
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_PACKINGS: dict[str, Packing] = {
    "raw": None, "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2",
}  # fmt: skip
_TEXT = ("ascii", "text", "txt")
_TEXT_LIMIT = 2**28
_WORLDS = {
    "left-posterior-superior": "LPS", "lps": "LPS",
    "right-anterior-superior": "RAS", "ras": "RAS",
    "left-anterior-superior": "LAS", "las": "LAS",
}  # fmt: skip
_SIGNS = {"RAS": (1, 1, 1), "LPS": (-1, -1, 1), "LAS": (-1, 1, 1)}
_TO_MM = {"mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "cm": 10.0, "m": 1000.0, "meter": 1e3,
          "um": 1e-3, "µm": 1e-3, "microns": 1e-3, "micrometer": 1e-3, "nm": 1e-6}  # fmt: skip
_CHANNELS = ("vector", "color", "normal", "point", "gradient", "matrix", "quaternion")


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the numbers lie, and which array axis is none of space."""

    header: Header
    data: str
    start: int
    skip: int
    packing: Packing
    is_text: bool
    sizes: tuple[int, ...]
    other: int | None


def is_nrrd(path: str) -> bool:
    """Whether a file starts like NRRD."""
    try:
        with open_stored(path, packing=None) as file:
            return file.head(7) == b"NRRD000"
    except DataError:
        return False


def describe(path: str, reading: Reading) -> ScanFacts:
    """Return the facts of an NRRD file from its header.

    Raises:
        DataError: It cannot be read, or states no orientation.
    """
    return _layout(path, reading).header.facts()


def read(path: str, reading: Reading) -> Scan:
    """Return one volume of an NRRD file.

    Raises:
        DataError: It cannot be read, states no orientation, or holds several volumes of which
            none is chosen.
    """
    layout = _layout(path, reading)
    header = layout.header
    index = chosen_volume(path, header.volumes, reading)
    values = (_text if layout.is_text else _binary)(layout).reshape(layout.sizes, order="F")
    if layout.other is None:
        return finish(header, [as_float32(values)], filler=None)
    parts = np.moveaxis(values, layout.other, 0)
    chosen = parts if header.channels > 1 else parts[index : index + 1]
    return finish(header, [as_float32(part) for part in chosen], filler=None)


def _binary(layout: _Layout) -> Array:
    dtype = layout.header.dtype
    size = math.prod(layout.sizes) * dtype.itemsize
    with open_stored(layout.data, start=layout.start, packing=layout.packing) as file:
        skip = file.size - size if layout.skip < 0 else layout.skip
        raw = file.read(skip, size)
        file.check_end()
    return raw.view(dtype)


def _text(layout: _Layout) -> Array:
    count = math.prod(layout.sizes)
    with open_stored(layout.data, start=layout.start, packing=None) as file:
        content = file.head(_TEXT_LIMIT + 1)
    with parsing(f"{layout.header.path}: the numbers"):
        found = np.array(content.split(), layout.header.dtype)
        if len(found) != count:
            raise ValueError(f"{len(found)} instead of {count}")
    return found


def _layout(path: str, reading: Reading) -> _Layout:
    with open_stored(path, packing=None) as file:
        head = file.head(_HEADER_LIMIT)
    end = re.search(rb"\n\r?\n", head)
    if end is None and len(head) == _HEADER_LIMIT:
        raise DataError(f"{path}: no end of the NRRD header in its first 4 MB. It is damaged.")
    text = head if end is None else head[: end.start()]
    library = require("nrrd", "medical")
    with parsing(f"{path}: the NRRD header", also=(library.NRRDError,)):
        fields = {
            name.lower(): value for name, value in library.read_header(text.split(b"\n")).items()
        }
        sizes = tuple(int(n) for n in fields["sizes"])
        encoding = str(fields["encoding"]).lower()
        dtype = _dtype(fields, is_text=encoding in _TEXT)
        skip = int(fields.get("byte skip", fields.get("byteskip", 0)))
        lines = int(fields.get("line skip", fields.get("lineskip", 0)))
        if len(sizes) != int(fields["dimension"]):
            raise ValueError(f"{len(sizes)} sizes for {fields['dimension']} dimensions")
    if encoding not in (*_PACKINGS, *_TEXT):
        raise DataError(f"{path}: the encoding {encoding!r} is not read, expected raw or gzip.")
    data, start = path, 0 if end is None else end.end()
    named = str(fields.get("data file", fields.get("datafile", "")))
    if named:
        data, start = _detached(path, named), 0
    elif end is None:
        raise DataError(f"{path}: ends after the header, without voxels. It is cut off.")
    start = _after_lines(data, start, lines)
    header, other = _header(path, fields, sizes, dtype, reading)
    layout = _Layout(
        header=header,
        data=data,
        start=start,
        skip=skip,
        packing=_PACKINGS.get(encoding),
        is_text=encoding in _TEXT,
        sizes=sizes,
        other=other,
    )
    more = _check(layout)
    return replace(layout, header=replace(header, warnings=(*header.warnings, *more)))


def _check(layout: _Layout) -> list[str]:
    """Compare the sizes with the file that holds the numbers; return what is odd."""
    path, dtype, sizes = layout.header.path, layout.header.dtype, layout.sizes
    total = check_size(path, sizes, dtype)
    what = f"{' × '.join(map(str, sizes))} voxels of {dtype.name}"
    with open_stored(layout.data, start=layout.start, packing=layout.packing) as file:
        if layout.is_text:
            file.check(2 * math.prod(sizes) - 1, what)
            if file.size > _TEXT_LIMIT:
                raise DataError(f"{path}: {file.size} bytes of text, save it as raw or gzip.")
            return []
        more = file.check(max(0, layout.skip) + total, what)
        return more if layout.skip >= 0 else []


def _dtype(fields: dict[str, Any], *, is_text: bool) -> np.dtype[Any]:
    named = str(fields["type"]).lower()
    for code, names in _TYPES.items():
        if named in names:
            endian = str(fields.get("endian", "")).lower()
            if code[1] != "1" and not is_text and endian not in ("little", "big"):
                raise ValueError(f"endian is {endian!r}, expected little or big")
            order = ">" if endian == "big" and not is_text else "<"
            return np.dtype(order + code)
    raise ValueError(f"type {named!r} is no number{nearest(named, sum(_TYPES.values(), ()))}")


def _detached(path: str, named: str) -> str:
    is_list = re.fullmatch(r"LIST( +\d+)?", named, re.IGNORECASE)
    if is_list or re.search(r"%\d*d.*\s\d", named):
        raise DataError(
            f"{path}: its voxels lie in several files ({named.split()[0]} ...), which is not read. "
            "Save it as one .nrrd file."
        )
    return companion(path, named)


def _after_lines(path: str, start: int, lines: int) -> int:
    """Return where the data begin after as many lines."""
    if lines <= 0:
        return start
    with open_stored(path, start=start, packing=None) as file:
        head = file.head(_HEADER_LIMIT)
    at = 0
    for _ in range(lines):
        at = head.find(b"\n", at) + 1
        if not at:
            raise DataError(f"{path}: fewer than the {lines} lines that are to be skipped.")
    return start + at


def _header(
    path: str, fields: dict[str, Any], sizes: tuple[int, ...], dtype: np.dtype[Any],
    reading: Reading,
) -> tuple[Header, int | None]:  # fmt: skip
    """Return the facts, and the array axis that is none of space."""
    directions = fields.get("space directions")
    if directions is not None:
        rows = np.full((len(directions), 3), np.nan)
        for row, found in zip(rows, directions, strict=True):
            if found is not None and np.shape(found) == (3,):
                row[:] = found
        spatial = [axis for axis, row in enumerate(rows) if np.isfinite(row).all()]
        if len(rows) != len(sizes):
            spatial = []
    else:
        kinds = [str(kind).lower() for kind in fields.get("kinds", ())]
        spatial = [axis for axis, kind in enumerate(kinds) if kind in ("domain", "space")]
        spatial = spatial if len(spatial) == 3 else list(range(min(3, len(sizes))))
    others = [axis for axis in range(len(sizes)) if axis not in spatial]
    if len(spatial) != 3 or len(others) > 1:
        raise DataError(
            f"{path}: the axes {' × '.join(map(str, sizes))} are not, by space directions and "
            "kinds, three of space and at most one other. Save one volume per file."
        )
    other = others[0] if others else None
    affine, is_oriented, warnings = _affine(path, fields, spatial, reading)
    count = 1 if other is None else sizes[other]
    is_vector = other is not None and _is_vector(fields, other)
    i, j, k = (sizes[axis] for axis in spatial)
    return Header(
        path=path,
        format="nrrd",
        sizes=(i, j, k),
        affine=affine,
        dtype=dtype,
        channels=count if is_vector else 1,
        volumes=1 if is_vector else count,
        is_oriented=is_oriented,
        warnings=tuple(warnings),
    ), other


def _is_vector(fields: dict[str, Any], axis: int) -> bool:
    kinds = [str(kind).lower() for kind in fields.get("kinds", ())]
    return len(kinds) > axis and any(name in kinds[axis] for name in _CHANNELS)


def _affine(
    path: str, fields: dict[str, Any], spatial: list[int], reading: Reading
) -> tuple[Array, bool, list[str]]:
    """Return voxel to RAS mm, whether the header states the orientation, and what is odd."""
    warnings: list[str] = []
    directions = fields.get("space directions")
    if directions is None:
        spacings = np.abs(np.asarray(fields.get("spacings", ()), np.float64))
        sizes = spacings[spatial] if len(spacings) > max(spatial) else np.array([np.nan])
        if not np.isfinite(sizes).all() or not sizes.all():
            raise DataError(
                f"{path}: has neither space directions nor spacings, so that voxel size and "
                "orientation are unknown. Add them to the header."
            )
        found = " × ".join(f"{size:.6g}" for size in sizes)
        if reading.orientation != "assume_pixdim":
            raise DataError(
                f"{path}: has spacings ({found}) but no space directions, so the orientation is "
                "unknown. Add them, or set `orientation: assume_pixdim` to read it by its voxel "
                "sizes, the axes taken for right, anterior, superior."
                + in_words("orientation=assume_pixdim")
            )
        warnings.append(f"{path}: no space directions: orientation assumed, voxels of {found} mm")
        return np.diag([*sizes, 1.0]), False, warnings
    affine = np.eye(4)
    affine[:3, :3] = np.array([directions[axis] for axis in spatial], np.float64).T
    origin = fields.get("space origin")
    if origin is None or np.shape(origin) != (3,) or not np.isfinite(origin).all():
        warnings.append(f"{path}: no space origin: taken for 0, 0, 0")
    else:
        affine[:3, 3] = origin
    world = _world(path, fields, reading, warnings)
    scale = _scale(path, fields, warnings)
    return np.diag([*(scale * sign for sign in _SIGNS[world]), 1.0]) @ affine, True, warnings


def _world(path: str, fields: dict[str, Any], reading: Reading, warnings: list[str]) -> str:
    space = fields.get("space")
    known = _WORLDS.get(str(space).lower())
    if known:
        return known
    found = f"names the space {space!r}" if space else "names no `space`"
    if reading.space is None:
        raise DataError(
            f"{path}: {found}, so that left and right are unknown. Set `space: LPS` (what ITK and "
            f"3D Slicer mean), or another of {', '.join(SPACES)}." + in_words("space=LPS")
        )
    warnings.append(f"{path}: {found}, read as {reading.space}")
    return reading.space


def _scale(path: str, fields: dict[str, Any], warnings: list[str]) -> float:
    units = {str(unit).lower() for unit in fields.get("space units", ())} - {""}
    if not units or units == {"mm"}:
        return 1.0
    if len(units) > 1 or not units <= set(_TO_MM):
        warnings.append(f"{path}: space units {', '.join(sorted(units))} are taken for mm")
        return 1.0
    [unit] = units
    if _TO_MM[unit] != 1.0:
        warnings.append(f"{path}: lengths in {unit} (space units), converted to mm")
    return _TO_MM[unit]
