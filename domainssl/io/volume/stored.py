"""Bytes of a volume, read no further than the header and the size of the file agree.

Headers are claims: one of a kilobyte may speak of terabytes. What is claimed is compared with what
the file can hold before memory is taken, and a file that ends early is an error, never zeros.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np

from domainssl.errors import DataError, parsing
from domainssl.files import open_regular

__all__ = ["VOLUME_LIMIT", "StoredFile", "check_size", "open_stored", "rescaled"]

Array = np.ndarray[Any, Any]
VOLUME_LIMIT = 2**33  # decoded bytes of one volume
_RATIO = 1032  # bytes that one deflated byte can unfold to
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
    """A regular file, decompressed where it starts like gzip whatever its name says.

    Attributes:
        path: Path as given.
        size: Bytes on disk.
        is_packed: Whether it is compressed.
    """

    def __init__(self, path: str, file: BinaryIO, *, plain: bool) -> None:
        self.path, self.size = path, os.fstat(file.fileno()).st_size
        self.is_packed = not plain and file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._file = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if self.is_packed else file

    def head(self, size: int) -> bytes:
        """Return up to `size` bytes from the start."""
        with parsing(f"{self.path}: the header", advice=_DAMAGED):
            self._file.seek(0)
            return self._file.read(size)

    def check(self, needed: int, what: str) -> None:
        """Compare a claim with what the file can hold.

        Args:
            needed: Bytes of content that the header speaks of.
            what: What they are, for the message.

        Raises:
            DataError: The file is shorter.
        """
        most = self.size * _RATIO if self.is_packed else self.size
        if needed > most:
            unit = "compressed bytes" if self.is_packed else "bytes"
            raise DataError(
                f"{self.path}: the header speaks of {what}, {needed} bytes, but the file has "
                f"{self.size} {unit}. {_DAMAGED}"
            )

    def read(self, offset: int, size: int) -> Array:
        """Return `size` bytes from `offset` of the content on, uint8.

        Raises:
            DataError: The content ends before, or does not decompress.
        """
        with parsing(f"{self.path}: the voxels", advice=_DAMAGED):
            self._file.seek(offset)
            content = np.empty(size, np.uint8)
            view, done = memoryview(cast(Any, content)), 0
            while done < size:
                got = self._file.readinto(view[done : done + _STEP])  # type: ignore[attr-defined]
                if not got:
                    raise EOFError(f"ends {size - done} of {size} bytes early")
                done += got
        return content

    def check_end(self) -> None:
        """Read on to the checksum of a compressed file.

        Raises:
            DataError: It does not fit, or the end is missing.
        """
        if self.is_packed:
            with parsing(f"{self.path}: the end of the file", advice=_DAMAGED):
                for _ in range(16):
                    if not self._file.read(_STEP):
                        return


@contextmanager
def open_stored(path: str, *, plain: bool = False) -> Iterator[StoredFile]:
    """Open a file whose content may be compressed.

    Args:
        path: A local file.
        plain: Take the bytes as they are.

    Raises:
        DataError: It cannot be opened, or is a pipe, a device or a folder.
    """
    with parsing(f"{path}:", advice="Check the path and its permissions."):
        file = open_regular(path)
    with file:
        yield StoredFile(path, file, plain=plain)


def rescaled(values: Array, slope: float, intercept: float) -> Array:
    """Return `values * slope + intercept`, computed in float64 slice by slice, as float32.

    Values beyond float32 become infinite, and with it not valid.
    """
    result = np.empty(values.shape, np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(values.shape[-1]):
            result[..., k] = values[..., k].astype(np.float64) * slope + intercept
    return result
