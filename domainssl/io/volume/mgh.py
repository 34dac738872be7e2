"""FreeSurfer's MGH and MGZ."""

from __future__ import annotations

import math

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
from domainssl.io.volume.stored import StoredFile, check_size, open_stored

__all__ = ["ENDINGS", "describe", "is_mgh", "read"]

ENDINGS = (".mgh", ".mgz", ".mgh.gz")
_FIRST_VOXEL = 284


def is_mgh(path: str) -> bool:
    """Whether a file is named and starts like MGH."""
    try:
        with open_stored(path) as file:
            return path.lower().endswith(ENDINGS) and file.head(4) == b"\0\0\0\1"
    except DataError:
        return False


def describe(path: str, reading: Reading) -> ScanFacts:
    """Return the facts of an MGH file from its header.

    Raises:
        DataError: It cannot be read, or states no orientation.
    """
    with open_stored(path) as file:
        return _header(path, file, reading).facts()


def read(path: str, reading: Reading) -> Scan:
    """Return one frame of an MGH file.

    Raises:
        DataError: It cannot be read, states no orientation, or holds several frames of which none
            is chosen.
    """
    with open_stored(path) as file:
        header = _header(path, file, reading)
        index = chosen_volume(path, header.volumes, reading)
        block = math.prod(header.sizes) * header.dtype.itemsize
        raw = file.read(_FIRST_VOXEL + index * block, block)
        file.check_end()
    return finish(header, [raw.view(header.dtype).reshape(header.sizes, order="F")], filler=None)


def _header(path: str, file: StoredFile, reading: Reading) -> Header:
    nibabel = require("nibabel", "medical")
    raw = file.head(_FIRST_VOXEL)
    what = f"{path}: the MGH header"
    with parsing(what, also=(nibabel.freesurfer.mghformat.MGHError,)):
        if raw[:4] != b"\0\0\0\1":
            raise ValueError(f"starts with {raw[:4]!r}, expected version 1")
        # the parser skips over the voxels to a footer, which a header alone does not have
        kind = nibabel.freesurfer.mghformat.MGHHeader
        known = kind(raw[:90].ljust(kind.template_dtype.itemsize, b"\0"), check=False)
        is_oriented = bool(int.from_bytes(raw[28:30], "big", signed=True))
        dims = [int(n) for n in known["dims"]]
        dtype = known.get_data_dtype().newbyteorder(">")
        spacing = np.frombuffer(raw, ">f4", 3, 30).astype(np.float64)
        directions = np.frombuffer(raw, ">f4", 9, 42).reshape(3, 3).astype(np.float64)
        centre = np.frombuffer(raw, ">f4", 3, 78).astype(np.float64)
    sizes = dims[0], dims[1], dims[2]
    total = check_size(path, sizes, dtype, dims[3])
    found = f"{' × '.join(map(str, dims))} voxels of {dtype.name}"
    file.check(_FIRST_VOXEL + total, found)
    affine = np.eye(4)
    if is_oriented:
        affine[:3, :3] = directions.T * spacing
        affine[:3, 3] = centre - affine[:3, :3] @ (np.array(sizes) / 2)
    elif reading.orientation != "assume_pixdim":
        raise DataError(
            f"{path}: goodRASFlag is 0, so voxel size and orientation are unknown. Correct the "
            "header, or set `orientation: assume_pixdim` to read it with voxels of 1 mm, the axes "
            "taken for right, anterior, superior." + in_words("orientation=assume_pixdim")
        )
    return Header(
        path=path,
        format="mgh",
        sizes=sizes,
        affine=affine,
        dtype=dtype,
        volumes=dims[3],
        is_oriented=is_oriented,
        warnings=() if is_oriented else (_unknown(path),),
    )


def _unknown(path: str) -> str:
    return f"{path}: goodRASFlag is 0: orientation assumed, voxels of 1 mm"
