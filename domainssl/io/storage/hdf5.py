"""HDF5 files whose data lie in the file itself.

A dataset can be a link into another file, take its values from any file of the disk (external
storage) or be put together from others (virtual). All three are refused, and so is a deflated
chunk that would unfold to more than a chunk.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

from domainssl.arguments import plain
from domainssl.errors import DataError, parsing, require
from domainssl.files import open_regular

__all__ = ["attributes", "dataset", "open_hdf5"]

_LIMIT = 2**30  # decoded bytes of one dataset
_RATIO = 1032  # bytes that one deflated byte can unfold to
_UNCHECKED = 2**28  # decoded bytes that no bomb within it can do harm with
_MOST_VALUES = 10_000  # of one attribute


def open_hdf5(path: Path, extra: str = "geo") -> Any:
    """Open a local HDF5 file for reading, without a lock: folders may be read-only or on NFS.

    Args:
        path: The file.
        extra: The extra that brings h5py, for messages.

    Raises:
        DataError: It is no regular file or no HDF5.
    """
    h5py = require("h5py", extra)
    with parsing(f"{path}: the HDF5"):
        open_regular(path).close()
        return h5py.File(path, "r", locking=False)


def dataset(
    path: Path,
    file: Any,
    name: str,
    *,
    dims: int | tuple[int, ...],
    kinds: str,
    limit: int = _LIMIT,
) -> Any:
    """Return a dataset of the file, checked before any of it is read.

    Args:
        path: The file, for messages.
        file: The open file.
        name: Name of the dataset.
        dims: How many axes it has, or may have.
        kinds: NumPy kinds that its type may have: `iuf` numbers, `OSU` texts.
        limit: Most bytes that it may have.

    Raises:
        DataError: It is missing, lies elsewhere, is of another type, or is too large.
    """
    h5py = require("h5py", "geo")
    if name not in file:
        raise DataError(f"{path}: no dataset {name!r}; found {', '.join(sorted(file))}.")
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise DataError(
            f"{path}: {name!r} is a link to another place, which is not followed. Copy the data "
            "into the file."
        )
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise DataError(f"{path}: {name!r} is a {type(found).__name__}, expected a dataset.")
    if found.external or found.is_virtual:
        raise DataError(
            f"{path}: {name!r} takes its values from other files, which is refused. Copy them "
            "into the file."
        )
    axes = (dims,) if isinstance(dims, int) else dims
    if found.shape is None or len(found.shape) not in axes or found.dtype.kind not in kinds:
        wanted = "numbers" if "f" in kinds else "whole numbers" if "i" in kinds else "texts"
        raise DataError(
            f"{path}: {name!r} has the type {found.dtype} and shape {found.shape}, expected "
            f"{' or '.join(map(str, axes))} axes of {wanted}."
        )
    size = math.prod(found.shape) * found.dtype.itemsize
    chunk = math.prod(found.chunks or ()) * found.dtype.itemsize
    stored = found.id.get_storage_size()
    most = limit if stored * _RATIO >= size else min(limit, _UNCHECKED)  # else never written
    if max(size, chunk) > most:
        raise DataError(
            f"{path}: {name!r} has {max(size, chunk) / 1e9:.4g} GB by its shape {found.shape} and "
            f"chunks {found.chunks}, and {stored} bytes in the file; expected at most "
            f"{most / 1e9:.2g} GB: the file is damaged."
        )
    if found.compression == "gzip" and stored * _RATIO > _UNCHECKED:
        _check_chunks(path, name, found, chunk)
    return found


def attributes(found: Any) -> dict[str, Any]:
    """Return the attributes of a dataset or group as plain data.

    The text `None`, which stands for a missing value, becomes None, and JSON text what it says;
    values that are neither numbers nor texts are left out.
    """
    known: dict[str, Any] = {}
    for name, kept in found.attrs.items():
        value = kept.decode(errors="replace") if isinstance(kept, bytes) else kept
        if getattr(value, "size", 0) > _MOST_VALUES:
            continue
        if isinstance(value, str):
            known[name] = _meaning(value)
        elif type(value).__name__ == "Empty":
            known[name] = None
        elif value.__class__ in (bool, int, float) or _is_plain_array(value):
            known[name] = plain(value)
    return known


def _is_plain_array(value: Any) -> bool:
    return hasattr(value, "dtype") and value.dtype.kind in "biufU"


def _meaning(text: str) -> Any:
    if text == "None":
        return None
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _check_chunks(path: Path, name: str, found: Any, size: int) -> None:
    """Unfold the chunks up to their size: HDF5 itself would go on to the end of the stream."""
    limit = size + 4  # of the checksum that a filter before may have added
    for index in range(found.id.get_num_chunks()):
        _, raw = found.id.read_direct_chunk(found.id.get_chunk_info(index).chunk_offset)
        decoder = zlib.decompressobj(-15 if raw[:1] != b"\x78" else 15)
        decoder.decompress(raw, limit)
        if not decoder.eof and decoder.decompress(decoder.unconsumed_tail, 1):
            raise DataError(
                f"{path}: a chunk of {name!r} unfolds to more than its {size} bytes: the file is "
                "damaged or hostile; get it again from its publisher."
            )
