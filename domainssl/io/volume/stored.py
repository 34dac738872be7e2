"""Bytes of a volume, read no further than the header and the size of the file agree.

Headers are claims: one of a kilobyte may speak of terabytes. What is claimed is compared with what
the file can hold before memory is taken, and a file that ends early is an error, never zeros.
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, cast

import numpy as np

from domainssl.errors import DataError, parsing
from domainssl.files import open_regular

__all__ = [
    "VOLUME_LIMIT",
    "StoredFile",
    "as_float32",
    "check_size",
    "companion",
    "open_stored",
    "rescaled",
]

Array = np.ndarray[Any, Any]
VOLUME_LIMIT = 2**33  # decoded bytes of one volume
Packing = Literal["gzip", "zlib", "bzip2", "by content"] | None
# bytes that one byte on disk can unfold to
_RATIO = {"gzip": 1032, "zlib": 1032, "bzip2": 2**20, None: 1, "by content": 1}
_STEP = 2**24
_DAMAGED = "The file is cut off or damaged; get it again from its source."


def check_size(path: str, sizes: Sequence[int], dtype: np.dtype[Any], count: int = 1) -> int:
    """Return the bytes of `count` blocks of voxels, of which one must fit into memory.

    Raises:
        DataError: A size is not positive, or the block is larger than any scan.
    """
    if min(sizes) < 1 or count < 1:
        found = " × ".join(map(str, sizes))
        raise DataError(f"{path}: the header gives {found} voxels, expected at least one per axis.")
    block = math.prod(map(int, sizes)) * dtype.itemsize
    if block > VOLUME_LIMIT:
        found = " × ".join(map(str, sizes))
        raise DataError(
            f"{path}: the header gives {found} voxels of {dtype.name}, {block / 1e9:.4g} GB, "
            f"expected at most {VOLUME_LIMIT / 1e9:.2g} GB: the header is damaged, or the volume "
            "has to be cut into parts."
        )
    return block * int(count)


class StoredFile:
    """A regular file, or a part of it to the end, decompressed on the way.

    Attributes:
        path: Path as given.
        size: Bytes on disk, from the start of the part on.
        packing: How it is compressed.
    """

    def __init__(self, path: str, file: BinaryIO, *, start: int, packing: Packing) -> None:
        self.path, self.size = path, os.fstat(file.fileno()).st_size - start
        file.seek(start)
        if packing == "by content":
            packing = "gzip" if file.read(2) == b"\x1f\x8b" else None
            file.seek(start)
        self.packing: Packing = packing
        self._file, self._at, self._start = _unpacked(file, packing), 0, start

    def head(self, size: int) -> bytes:
        """Return up to `size` bytes from the start of a file of which nothing was read yet."""
        with parsing(f"{self.path}: the header", advice=_DAMAGED):
            content = b""
            while len(content) < size and (more := self._file.read(size - len(content))):
                content += more
            if self.packing:
                self._file = cast(BinaryIO, _Rejoined(content, self._file))
            else:
                self._file.seek(self._start)
            return content

    def check(self, needed: int, what: str) -> list[str]:
        """Compare a claim with what the file can hold.

        Args:
            needed: Bytes of content that the header speaks of.
            what: What they are, for the message.

        Returns:
            What is odd: a file that is longer, where that can be told without unpacking it.

        Raises:
            DataError: The file is shorter.
        """
        if needed > self.size * _RATIO[self.packing]:
            unit = "compressed bytes" if self.packing else "bytes"
            raise DataError(
                f"{self.path}: the header speaks of {what}, {needed} bytes, but the file has "
                f"{max(0, self.size)} {unit}. {_DAMAGED}"
            )
        return [] if self.packing else self._longer(self.size - needed)

    def _longer(self, count: int) -> list[str]:
        """Say that a file goes on where the header says that it ends."""
        if count <= 0:
            return []
        return [
            f"{self.path}: {count} bytes follow after the voxels that the header speaks of, and "
            "are not read: check its sizes and number of volumes"
        ]

    def read(self, offset: int, size: int) -> Array:
        """Return `size` bytes from `offset` of the content on, uint8; offsets only grow.

        Raises:
            DataError: The content ends before, or does not decompress.
        """
        with parsing(f"{self.path}: the voxels", advice=_DAMAGED):
            if self.packing is None:
                self._file.seek(self._start + offset)
                self._at = offset
            while self._at < offset:
                skipped = len(self._file.read(min(_STEP, offset - self._at)))
                self._at += skipped
                if not skipped:
                    raise EOFError(f"ends {offset - self._at} bytes before the voxels")
            content = np.empty(size, np.uint8)
            view, done = memoryview(cast(Any, content)), 0
            while done < size:
                got = self._file.readinto(view[done : done + _STEP])  # type: ignore[attr-defined]
                if not got:
                    raise EOFError(f"ends {size - done} of {size} bytes early")
                done += got
            self._at += size
        return content

    def check_end(self, end: int | None = None) -> list[str]:
        """Read on to the checksum of a compressed file.

        Args:
            end: Bytes of content that the header speaks of; None asks for none.

        Returns:
            What is odd: a file that is longer.

        Raises:
            DataError: It does not fit, the end is missing, or there is less than that.
        """
        if not self.packing:
            return []
        with parsing(f"{self.path}: the end of the file", advice=_DAMAGED):
            for _ in range(16):
                found = len(self._file.read(_STEP))
                self._at += found
                if not found:
                    if end is not None and self._at < end:
                        raise EOFError(f"ends {end - self._at} of {end} bytes early")
                    return [] if end is None else self._longer(self._at - end)
        return []


def _unpacked(file: BinaryIO, packing: Packing) -> BinaryIO:
    if packing == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if packing == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(file))
    return cast(BinaryIO, _Zlib(file)) if packing == "zlib" else file


class _Zlib(io.RawIOBase):
    """The content of a zlib stream, unfolded no further than asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decoder = file, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decoder.eof:
            packed = self._decoder.unconsumed_tail or self._file.read(2**16)
            if not packed:
                raise EOFError("the zlib stream is cut off")
            found = self._decoder.decompress(packed, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)
        return 0


class _Rejoined(io.RawIOBase):
    """The start of a stream that was read ahead, then the rest of it."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._head:
            found, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
            buffer[: len(found)] = found
            return len(found)
        return int(self._rest.readinto(buffer))  # type: ignore[attr-defined]


@contextmanager
def open_stored(
    path: str, *, start: int = 0, packing: Packing = "by content"
) -> Iterator[StoredFile]:
    """Open a file whose content may be compressed.

    Args:
        path: A local file.
        start: Its byte with which the content begins.
        packing: How the content is compressed; `by content` tells gzip by its first bytes.

    Raises:
        DataError: It cannot be opened, or is a pipe, a device or a folder.
    """
    with parsing(f"{path}:", advice="Check the path and its permissions."):
        file = open_regular(path)
    with file:
        yield StoredFile(path, file, start=start, packing=packing)


def companion(path: str, name: str) -> str:
    """Return the path of a file that a header names for its voxels.

    Args:
        path: The file with the header.
        name: Path relative to it.

    Raises:
        DataError: It leads out of the header's folder, or is not there.
    """
    parts = name.replace("\\", "/").split("/")
    if not name or os.path.isabs(name) or ".." in parts or ":" in parts[0]:
        raise DataError(
            f"{path}: says that its voxels lie in {name!r}, outside its own folder, which is not "
            "followed. Put the file beside the header and write its bare name."
        )
    found = os.path.join(os.path.dirname(path), *parts)
    if not os.path.isfile(found):
        raise DataError(
            f"{path}: says that its voxels lie in {name!r}, which is not there. Put the file "
            "beside the header."
        )
    return found


def rescaled(values: Array, slope: float, intercept: float) -> Array:
    """Return `values * slope + intercept`, computed in float64 slice by slice, as float32.

    Values beyond float32 become infinite, and with it not valid.
    """
    result = np.empty(values.shape, np.float32, order="F")
    exact = np.empty(values.shape[:-1], np.float64, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(values.shape[-1]):
            np.multiply(values[..., k], slope, out=exact)
            np.add(exact, intercept, out=result[..., k], casting="same_kind")
    return result


def as_float32(values: Array) -> Array:
    """Return floating point numbers as float32, whole numbers as they are."""
    if values.dtype.kind != "f" or values.dtype.itemsize == 4:
        return values
    with np.errstate(over="ignore"):
        return values.astype(np.float32)
