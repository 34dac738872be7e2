"""Small scans that tests write byte by byte, so that headers can be wrong on purpose."""

from __future__ import annotations

import bz2
import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

CODES = {"uint8": 2, "int16": 4, "int32": 8, "float32": 16, "complex64": 32, "float64": 64,
         "int8": 256, "uint16": 512, "uint32": 768, "int64": 1024}  # fmt: skip


def ramp(shape: tuple[int, ...] = (6, 5, 4), dtype: str = "int16") -> np.ndarray:
    """A volume whose voxels all differ: i + 20 j + 400 k."""
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return sum(axis * step for axis, step in zip(grid, (1, 20, 400, 5000), strict=False)).astype(
        dtype
    )


def oblique(degrees: float = 20.0) -> np.ndarray:
    """An affine turned about z, voxels of 0.8 x 1.2 x 3 mm, first axis to the left."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[-c, -s, 0], [-s, c, 0], [0, 0, 1]]) * (0.8, 1.2, 3.0)
    affine[:3, 3] = (40.0, -50.0, 12.5)
    return affine


def nifti_bytes(
    values: np.ndarray,
    affine: np.ndarray | None = None,
    *,
    code: int = 1,
    pixdim: tuple[float, ...] | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
    units: int = 2,
    order: str = "<",
    dims: tuple[int, ...] | None = None,
    datatype: int | None = None,
    offset: float = 352.0,
    note: bytes = b"",
) -> bytes:
    """A NIfTI-1 file with an sform; `dims`, `datatype` and `offset` may claim anything."""
    affine = oblique() if affine is None else affine
    if pixdim is None:
        pixdim = tuple(np.linalg.norm(affine[:3, :3], axis=0))
    axes = dims or (values.ndim, *values.shape)
    kind = CODES.get(values.dtype.name, 0) if datatype is None else datatype
    head = struct.pack(order + "i10s18sihcb", 348, b"", note[:18], 0, 0, b"r", 0)
    head += struct.pack(order + "8h3f4h", *axes, *[1] * (8 - len(axes)), 0, 0, 0, 0, kind,
                        values.dtype.itemsize * 8, 0)  # fmt: skip
    sizes = (1.0, *pixdim, *[1.0] * (7 - len(pixdim)))
    head += struct.pack(order + "8ffffhbb4f2i", *sizes, offset, slope, intercept, 0, 0, units,
                        0, 0, 0, 0, 0, 0)  # fmt: skip
    head += struct.pack(order + "80s24s2h6f", note, b"", 0, code, *[0.0] * 6)
    head += struct.pack(order + "12f16s4s", *affine[:3].ravel(), b"", b"n+1\0")
    stored = values if values.dtype.names else values.astype(values.dtype.newbyteorder(order))
    return head + bytes(4) + np.asfortranarray(stored).tobytes(order="F")


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None, **more) -> Path:
    """Write it, compressed where the name says so; options as of `nifti_bytes`."""
    content = nifti_bytes(values, affine, **more)
    path.write_bytes(gzip.compress(content, 1) if path.name.endswith(".gz") else content)
    return path


def at(scan, affine: np.ndarray, index: tuple[int, int, int]) -> np.ndarray:
    """The values of a scan at the place of voxel `index` of the stored grid `affine`."""
    place = np.linalg.inv(scan.affine) @ affine @ np.array([*index, 1.0])
    nearest = np.rint(place[:3]).astype(int)
    np.testing.assert_allclose(place[:3], nearest, atol=2e-3)
    return scan.values[:, nearest[0], nearest[1], nearest[2]]


def write_nrrd(
    path: Path, values: np.ndarray, lines: list[str], *, encoding: str = "raw", endian: str = "<"
) -> Path:
    """An NRRD file; `lines` are the geometry, and whatever else a header may say."""
    kinds = {"int16": "short", "uint8": "uchar", "float32": "float", "uint16": "unsigned short"}
    head = [
        "NRRD0004",
        "# made by a test",
        f"type: {kinds[values.dtype.name]}",
        f"dimension: {values.ndim}",
        "sizes: " + " ".join(map(str, values.shape)),
        f"endian: {'little' if endian == '<' else 'big'}",
        f"encoding: {encoding}",
        *lines,
    ]
    stored = values.astype(values.dtype.newbyteorder(endian)).tobytes(order="F")
    if encoding == "gzip":
        stored = gzip.compress(stored, 1)
    if encoding == "bzip2":
        stored = bz2.compress(stored)
    if encoding == "ascii":
        stored = " ".join(str(v) for v in values.ravel(order="F")).encode()
    detached = next((n.partition(":")[2].strip() for n in head if n.startswith("data file")), None)
    if detached is None:
        path.write_bytes("\n".join([*head, "", ""]).encode() + stored)
    else:
        path.write_bytes("\n".join(head).encode() + b"\n")
        (path.parent / Path(detached).name).write_bytes(stored)
    return path


def lps_lines(affine: np.ndarray, space: str = "space: left-posterior-superior") -> list[str]:
    """Geometry of an NRRD file for an affine to RAS."""
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    vectors = [",".join(repr(float(v)) for v in lps[:3, n]) for n in range(4)]
    return [
        space,
        "space directions: " + " ".join(f"({v})" for v in vectors[:3]),
        f"space origin: ({vectors[3]})",
    ]


def write_metaimage(
    path: Path, values: np.ndarray, affine: np.ndarray | None = None, *, packed: bool = False,
    drop: tuple[str, ...] = (), **more: object,
) -> Path:  # fmt: skip
    """A MetaImage file, `.mha` or `.mhd` with a `.raw`; `more` adds or replaces fields."""
    lps = np.diag([-1.0, -1, 1, 1]) @ (oblique() if affine is None else affine)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    kinds = {"int16": "MET_SHORT", "uint8": "MET_UCHAR", "float32": "MET_FLOAT"}
    stored = values.tobytes(order="F")
    stored = zlib.compress(stored) if packed else stored
    is_local = path.suffix == ".mha"
    fields = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": packed,
        "TransformMatrix": " ".join(repr(float(v)) for v in (lps[:3, :3] / spacing).T.ravel()),
        "Offset": " ".join(repr(float(v)) for v in lps[:3, 3]),
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": " ".join(repr(float(v)) for v in spacing),
        "DimSize": " ".join(map(str, values.shape[-3:])),
        "ElementType": kinds[values.dtype.name],
        **more,
        "ElementDataFile": more.get("ElementDataFile", "LOCAL" if is_local else path.stem + ".raw"),
    }
    text = "".join(f"{key} = {value}\n" for key, value in fields.items() if key not in drop)
    path.write_bytes(text.encode() + (stored if is_local else b""))
    if not is_local:
        path.with_suffix(".raw").write_bytes(stored)
    return path


def write_mgh(path: Path, values: np.ndarray, affine: np.ndarray, *, good: int = 1) -> Path:
    """An MGH file with (i, j, k) or (i, j, k, frames) values, compressed if named `.mgz`."""
    code = {"uint8": 0, "int32": 1, "float32": 3, "int16": 4}[values.dtype.name]
    dims = (*values.shape, 1)[:4]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    centre = affine[:3, :3] @ (np.array(values.shape[:3]) / 2) + affine[:3, 3]
    head = struct.pack(">7ih", 1, *dims, code, 0, good)
    head += struct.pack(">3f", *spacing)
    head += struct.pack(">9f3f", *(affine[:3, :3] / spacing).T.ravel(), *centre)
    stored = values.astype(values.dtype.newbyteorder(">")).tobytes(order="F")
    content = head.ljust(284, b"\0") + stored + bytes(20)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".mgz" else content)
    return path
