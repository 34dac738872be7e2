"""Bytes by key: folders, zips and uncompressed tars, local or behind an fsspec URL."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from domainssl.errors import DataError
from domainssl.io.storage.handles import HandlePool
from domainssl.io.storage.paths import Options, is_url, join, open_file, stamp
from domainssl.io.storage.remote import Remote
from domainssl.io.storage.scratch import stored_member

__all__ = ["FolderStore", "Member", "Store", "ZipFileStore", "check_member", "tar_index"]


class Member(NamedTuple):
    """Where one file lies inside an uncompressed tar."""

    key: str
    offset: int
    size: int


class Store(Protocol):
    """Bytes by key: what a zarr hierarchy is read from."""

    def get(self, key: str) -> bytes | None:
        """Return the bytes of `key`, or None when there is no such key."""

    def names(self) -> Sequence[str]:
        """Return every key."""


def check_member(name: str, archive: str) -> str:
    """Return an archive member's name if it stays inside the archive.

    Raises:
        DataError: The name is absolute, has a drive, or climbs out with `..`.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or (parts and parts[0].endswith(":")):
        raise DataError(
            f"{archive}: refuses member {name!r}, which points outside the archive. "
            "Such a file is damaged or hostile; get it again from its publisher."
        )
    return name


class ZipFileStore:
    """The members of a zip, read without unpacking it.

    Args:
        source: Path or URL of the zip, its bytes, or an open file.
        name: How errors call it.
        options: fsspec options for a URL.
    """

    def __init__(self, source: Any, name: str, options: Options | None = None) -> None:
        if isinstance(source, (bytes, bytearray, memoryview)):
            file: BinaryIO = io.BytesIO(source)
        elif isinstance(source, (str, os.PathLike)):
            file = open_file(source, options)
        else:
            file = source
        self.name = name
        try:
            self._zip = zipfile.ZipFile(file)
        except DataError:  # the store did not answer; the zip may be whole
            file.close()
            raise
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            file.close()
            raise DataError(
                f"{name}: not a complete zip ({error}). The file is truncated or was still being "
                "written; download it again."
            ) from error
        self._file = file
        self._members = {check_member(info.filename, name): info for info in self._zip.infolist()}

    def get(self, key: str) -> bytes | None:
        """Return a member's bytes with its checksum verified, None when there is none."""
        info = self._members.get(key)
        if info is None:
            return None
        try:
            return self._zip.read(info)
        except DataError:
            raise
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"{self.name}: member {key!r} is damaged ({error})") from error

    def borrow(self, key: str) -> bytes | memoryview | None:
        """Return the same as `get`, in memory that the thread's next `borrow` may overwrite."""
        info = self._members.get(key)
        large = stored_member(info, self._file) if info is not None else None
        return self.get(key) if large is None else large

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def names(self) -> Sequence[str]:
        """Return the names of all members."""
        return list(self._members)


class FolderStore:
    """The files below a folder or URL."""

    def __init__(self, root: str | os.PathLike[str], options: Options | None = None) -> None:
        self.name = str(root)
        self._options = options

    def get(self, key: str) -> bytes | None:
        """Return a file's bytes, None when there is no such file."""
        path = join(self.name, check_member(key, self.name))
        try:
            if is_url(path):
                return Remote(path, self._options).content()
            return Path(path).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error

    def names(self) -> Sequence[str]:
        """Return the relative paths of all files."""
        if not is_url(self.name):
            root = Path(self.name)
            return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        return Remote(self.name, self._options).find()


_TAR_INDEX = HandlePool(limit=4096)


def tar_index(path: str, options: Options | None = None) -> tuple[Member, ...]:
    """Return the files of an uncompressed tar in order, found by a scan of its headers.

    Only the 512-byte headers are read. The result is kept for the life of the process.

    Raises:
        DataError: The tar is truncated, compressed, or holds unsafe names.
    """
    return cast(tuple[Member, ...], _TAR_INDEX.get(stamp(path), lambda: _scan_tar(path, options)))


def _scan_tar(path: str, options: Options | None) -> tuple[Member, ...]:
    members = []
    with open_file(path, options) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if info.isfile():
                        name = check_member(info.name, path)
                        members.append(Member(name, info.offset_data, info.size))
                    elif not info.isdir():
                        raise DataError(f"{path}: member {info.name!r} is neither file nor folder")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(
                f"{path}: not a complete tar, {len(members)} members found ({error}). "
                "The file is truncated or was still being written; download it again."
            ) from error
    return tuple(members)
