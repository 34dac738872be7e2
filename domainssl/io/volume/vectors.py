"""Grids of vectors as 4D NIfTI: one volume per feature, with the affine of the grid of patches."""

from __future__ import annotations

import gzip
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from domainssl.errors import require, unwritable
from domainssl.files import PART
from domainssl.io.raster.geozarr import VectorLayout, VectorStore

__all__ = ["NiftiWriter"]

Array = np.ndarray[Any, Any]
_NUMBERS = 2**26  # most numbers that are held at once
_NIFTI1 = 32767  # entries along an axis


class NiftiWriter:
    """Writes a complete store as `.nii.gz`, some features at a time."""

    ending = ".nii.gz"

    def __call__(self, store: VectorStore, layout: VectorLayout, target: Path) -> None:
        """Write `target`, and with int8 the scales as `<name>_scale.nii.gz`.

        Missing vectors are NaN, in int8 -128; NIfTI has no half precision, so that float16 is
        written as float32.

        Raises:
            StorageError: It cannot be written.
        """
        group = store.group
        if layout.dtype == "int8":
            stem = target.name.removesuffix(".gz").removesuffix(".nii")
            beside = target.with_name(f"{stem}_scale.nii.gz")
            _write(group["scale"], layout, beside)
        _write(group["embedding"], layout, target)


def _write(stored: Any, layout: VectorLayout, target: Path) -> None:
    nibabel: Any = require("nibabel", "medical")
    dtype = np.dtype(np.float32 if stored.dtype == np.float16 else stored.dtype)
    count = stored.shape[0] if stored.ndim == 4 else 1
    shape = (*layout.shape, count) if stored.ndim == 4 else layout.shape
    large = max(shape) > _NIFTI1
    header = (nibabel.Nifti2Header if large else nibabel.Nifti1Header)()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_xyzt_units("mm")
    affine = np.array(layout.affine)
    header.set_sform(affine, 1)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    is_straight = np.allclose(directions.T @ directions, np.eye(3), atol=1e-4)
    header.set_qform(affine if is_straight else None, int(is_straight), strip_shears=True)
    header["magic"] = b"n+2\0\r\n\x1a\n" if large else b"n+1"
    header["vox_offset"] = header.single_vox_offset
    hidden = target.with_name(f".{target.name}{PART}{uuid.uuid4().hex}")
    step = max(1, _NUMBERS // int(np.prod(layout.shape)))
    try:
        with (
            hidden.open("wb") as raw,
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as packed,
        ):
            file = cast(BinaryIO, packed)
            file.write(header.binaryblock + bytes(4))
            for first in range(0, count, step):
                part = stored[first : first + step] if stored.ndim == 4 else stored[...][None]
                values = np.asarray(part).astype(dtype)
                for volume in values:  # the first axis runs fastest
                    file.write(volume.tobytes(order="F"))
        os.replace(hidden, target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        with suppress(OSError):
            hidden.unlink()
