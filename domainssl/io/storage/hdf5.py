"""HDF5 files whose data lie in the file itself.

A dataset can be a link into another file, take its values from any file of the disk (external
storage) or be put together from others (virtual). All three are refused, and so are filters other
than those that h5py brings, and compressed chunks that would unfold to more than a chunk: HDF5
itself gives filters whatever memory they ask for.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

from domainssl.arguments import plain
from domainssl.errors import DataError, UnreadableError, parsing, require
from domainssl.files import answer_of_server, open_regular

__all__ = ["attributes", "dataset", "open_hdf5", "texts"]

_LIMIT = 2**30  # decoded bytes of one dataset
_RATIO = 1032  # bytes that one compressed byte can unfold to, deflated; LZF less
_DEFLATE, _SHUFFLE, _CHECKSUM, _LZF = 1, 2, 3, 32000  # numbers of filters
_UNCHECKED = 2**28  # decoded bytes that no bomb within it can do harm with
_START = 512  # bytes that tell a page of a web server
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
        with open_regular(path) as file:
            start = file.read(_START)
        if not start:
            raise UnreadableError(
                f"{path}: an empty file; the copy was lost on its way. Copy it again."
            )
        if (page := answer_of_server(start)) and not h5py.is_hdf5(path):
            raise UnreadableError(f"{path}: no HDF5.{page}")
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
    filters = _filters(path, name, found)
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
    if not {_DEFLATE, _LZF}.isdisjoint(filters) and stored * _RATIO > _UNCHECKED:
        _check_chunks(path, name, found, chunk, filters)
    return found


def _filters(path: Path, name: str, found: Any) -> list[int]:
    """Return the numbers of the filters of a dataset, in the order in which they were applied.

    Raises:
        DataError: One of them is not read, or two compress: each unfolds what the other unfolded.
    """
    made = found.id.get_create_plist()
    filters = [int(made.get_filter(i)[0]) for i in range(made.get_nfilters())]
    compressing = [number for number in filters if number in (_DEFLATE, _LZF)]
    others = set(filters) - {_DEFLATE, _SHUFFLE, _CHECKSUM, _LZF}
    if others or len(compressing) > 1 or len(filters) > 4:
        raise DataError(
            f"{path}: {name!r} is stored with the filters {filters} of HDF5; expected one of gzip "
            f"({_DEFLATE}) and lzf ({_LZF}), with shuffle ({_SHUFFLE}) and fletcher32 "
            f"({_CHECKSUM}). Write it again, with gzip or without compression."
        )
    return filters


def texts(path: Path, file: Any, name: str) -> list[str]:
    """Return a dataset of texts, one axis.

    Raises:
        DataError: As of `dataset`, or they are too long: texts may share what is stored.
    """
    found = dataset(path, file, name, dims=1, kinds="OSU", limit=_UNCHECKED)
    h5py = require("h5py", "geo")
    if found.dtype.kind == "O" and h5py.check_string_dtype(found.dtype) is None:
        raise DataError(f"{path}: {name!r} holds {found.dtype.metadata}, expected texts.")
    is_small = found.dtype.kind != "O" or len(found) * file.id.get_filesize() <= _UNCHECKED
    read: list[str] = []
    total = 0
    for text in found[...] if is_small else (found[i] for i in range(len(found))):
        total += len(text)
        if total > _UNCHECKED:
            raise DataError(
                f"{path}: {name!r} has more than {_UNCHECKED / 1e9:.2g} GB of text: the file is "
                "damaged or hostile."
            )
        read.append(text.decode(errors="replace") if isinstance(text, bytes) else str(text))
    return read


def attributes(found: Any) -> dict[str, Any]:
    """Return the attributes of a dataset or group as plain data.

    The text `None`, which stands for a missing value, becomes None, and JSON text what it says;
    values that are neither numbers nor texts are left out.
    """
    known: dict[str, Any] = {}
    for name in found.attrs:
        stated = found.attrs.get_id(name)
        if math.prod(stated.shape or ()) > _MOST_VALUES:
            continue
        if stated.shape and stated.dtype.kind == "O":  # each may be as long as the file
            continue
        kept = found.attrs[name]
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


def _check_chunks(path: Path, name: str, found: Any, size: int, filters: list[int]) -> None:
    """Measure what chunks unfold to: HDF5 itself would go on to the end of the stream.

    Args:
        path: The file.
        name: Of the dataset.
        found: The dataset.
        size: Bytes of a chunk.
        filters: Their numbers, one of which compresses.

    Raises:
        DataError: A chunk unfolds to more than its size.
    """
    limit = size + 4  # of the checksum that a filter before may have added
    at = next(i for i, number in enumerate(filters) if number in (_DEFLATE, _LZF))
    is_longer = _inflates if filters[at] == _DEFLATE else _unfolds
    packed: list[Any] = []
    found.id.chunk_iter(packed.append)
    for chunk in packed:
        if chunk.filter_mask & (1 << at):  # stored as it is
            continue
        if chunk.size > size + size // 8 + 1024:  # what does not shrink is stored as it is
            is_larger = True
        else:
            _, raw = found.id.read_direct_chunk(chunk.chunk_offset)
            is_larger = is_longer(raw[:-4] if _CHECKSUM in filters[at:] else raw, limit)
        if is_larger:
            raise DataError(
                f"{path}: a chunk of {name!r} unfolds to more than its {size} bytes: the file is "
                "damaged or hostile; get it again from its publisher."
            )


def _inflates(raw: bytes, limit: int) -> bool:
    """Tell whether a deflated chunk is longer than a limit."""
    decoder = zlib.decompressobj()
    decoder.decompress(raw, limit)
    return bool(not decoder.eof and decoder.decompress(decoder.unconsumed_tail, 1))


def _unfolds(raw: bytes, limit: int) -> bool:
    """Tell whether a chunk of LZF is longer than a limit, from the lengths that it states."""
    at = length = 0
    while at < len(raw) and length <= limit:
        head = raw[at]
        if head < 32:  # so many bytes as they are, and one
            length += head + 1
            at += head + 2
            continue
        more = raw[at + 1] if head >> 5 == 7 and at + 1 < len(raw) else 0
        length += (head >> 5) + more + 2
        at += 3 if head >> 5 == 7 else 2
    return length > limit
