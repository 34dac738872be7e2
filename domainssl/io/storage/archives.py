"""Bytes by key: folders, zips and uncompressed tars, local or behind an fsspec URL."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar, cast

from domainssl.errors import DataError, UnreadableError, parsing
from domainssl.files import answer_of_server, open_regular
from domainssl.io.storage.bounded import METADATA_LIMIT
from domainssl.io.storage.handles import HandlePool
from domainssl.io.storage.paths import Options, is_url, join, open_file, size_of, stamp
from domainssl.io.storage.remote import Remote
from domainssl.io.storage.scratch import stored_member

__all__ = ["FolderStore", "Member", "Store", "ZipFileStore", "check_member", "tar_index"]

_Content = TypeVar("_Content")


class Member(NamedTuple):
    """Where one file lies inside an uncompressed tar."""

    key: str
    offset: int
    size: int


class Store(Protocol):
    """Bytes by key: what a zarr hierarchy is read from."""

    def get(self, key: str, limit: int = METADATA_LIMIT) -> bytes | None:
        """Return the bytes of `key`, at most `limit`, or None when there is no such key."""

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


_TRUNCATED = " The file is truncated or was still being written; download it again."
_START = 512  # bytes


def _page(file: BinaryIO) -> str:
    """Return a sentence where a file is a page of a web server, else nothing."""
    try:
        file.seek(0)
        return answer_of_server(file.read(_START))
    except (OSError, ValueError):
        return ""


def _too_large(what: str, size: int, limit: int) -> DataError:
    return DataError(
        f"{what}: {size / 1e6:.1f} MB, where at most {limit / 1e6:.1f} MB belong by its metadata. "
        "The file is damaged or hostile; get it again from its publisher."
    )


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
        except (zipfile.BadZipFile, OSError, ValueError, EOFError, struct.error, MemoryError,
                NotImplementedError) as error:  # fmt: skip
            page = _page(file)
            file.close()
            raise UnreadableError(
                f"{name}: not a complete zip ({error}).{page or _TRUNCATED}"
            ) from error
        self._file = file
        self._members = {check_member(info.filename, name): info for info in self._zip.infolist()}

    def get(self, key: str, limit: int = METADATA_LIMIT) -> bytes | None:
        """Return a member's bytes with its checksum verified, None when there is none.

        Raises:
            DataError: It is damaged, or unfolds to more than `limit` bytes.
        """
        info = self._member(key, limit)
        if info is None:
            return None
        with parsing(f"{self.name}: member {key!r} is damaged; it", also=(zipfile.BadZipFile,)):
            return self._zip.read(info)

    def borrow(self, key: str, limit: int = METADATA_LIMIT) -> bytes | memoryview | None:
        """Return the same as `get`, in memory that the thread's next `borrow` may overwrite."""
        info = self._member(key, limit)
        large = stored_member(info, self._file) if info is not None else None
        return self.get(key, limit) if large is None else large

    def _member(self, key: str, limit: int) -> zipfile.ZipInfo | None:
        info = self._members.get(key)
        if info is None:
            return None
        if info.file_size > limit:
            raise _too_large(f"{self.name}: member {key!r}", info.file_size, limit)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{self.name}: member {key!r} is compressed with method {info.compress_type} of "
                "zip, which may unfold to any size; expected stored (0) or deflated (8) members."
            )
        return info

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

    def get(self, key: str, limit: int = METADATA_LIMIT) -> bytes | None:
        """Return a file's bytes, None when there is no such file.

        Raises:
            DataError: It cannot be read, or is larger than `limit`.
        """

        def content(path: str) -> bytes:
            if is_url(path):
                found = Remote(path, self._options).content(limit)
            else:
                with open_regular(path) as file:
                    found = file.read(limit + 1)
            if len(found) > limit:
                raise _too_large(path, len(found), limit)
            return found

        return self._found(key, content)

    def part(self, key: str, offset: int, size: int) -> bytes | None:
        """Return `size` bytes of a file from `offset` on, None when there is no such file.

        A negative offset counts from the end.

        Raises:
            DataError: It cannot be read.
        """

        def content(path: str) -> bytes:
            start = offset + size_of(path, self._options) if offset < 0 else offset
            if is_url(path):
                return Remote(path, self._options).part(start, size)
            with open_regular(path) as file:
                file.seek(start)
                return file.read(size)

        return self._found(key, content)

    def open(self, key: str) -> BinaryIO | None:
        """Open a local file, None where there is no such file.

        Raises:
            DataError: It cannot be read.
        """
        return self._found(key, open_regular)

    def _found(self, key: str, read: Callable[[str], _Content]) -> _Content | None:
        """Return what `read` makes of a file, None where there is no such file.

        Raises:
            DataError: It cannot be read.
        """
        path = join(self.name, check_member(key, self.name))
        try:
            return read(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error

    def folders(self, key: str) -> list[str]:
        """Return the names of the local folders in a folder, sorted; links are not followed.

        Raises:
            DataError: It cannot be listed.
        """
        path = join(self.name, check_member(key, self.name)) if key else self.name
        try:
            with os.scandir(path) as entries:
                return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
        except OSError as error:
            raise DataError(f"{path}: cannot be listed ({error})") from error

    def names(self) -> Sequence[str]:
        """Return the relative paths of all files."""
        if not is_url(self.name):
            root = Path(self.name)
            return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        return Remote(self.name, self._options).find()


_TAR_INDEX = HandlePool(limit=4096)


_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def tar_index(path: str, options: Options | None = None) -> tuple[Member, ...]:
    """Return the files of an uncompressed tar in order, found by a scan of its headers.

    Only the 512-byte headers are read. The result is kept for the life of the process.

    Raises:
        DataError: The tar is truncated, compressed, or holds unsafe names.
    """
    return cast(tuple[Member, ...], _TAR_INDEX.get(stamp(path), lambda: _scan_tar(path, options)))


def _refuse_compressed(start: bytes, path: str) -> None:
    """Refuse a tar that begins as a compressed file, of which parts cannot be read alone.

    Raises:
        DataError: It does.
    """
    kind = next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), None)
    if kind is not None:
        raise UnreadableError(
            f"{path}: compressed by {kind}, so its members cannot be read where they lie. Unpack "
            f"it once into a plain tar, such as with `{kind} -d`."
        )


def _scan_tar(path: str, options: Options | None) -> tuple[Member, ...]:
    members = []
    with open_file(path, options) as file:
        _refuse_compressed(file.read(6), path)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if info.isfile() and info.sparse is None:
                        name = check_member(info.name, path)
                        members.append(Member(name, info.offset_data, info.size))
                    elif not info.isdir():
                        raise DataError(f"{path}: member {info.name!r} is neither file nor folder")
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise UnreadableError(
                f"{path}: not a complete tar, {len(members)} members found ({error})."
                f"{_page(file) or _TRUNCATED}"
            ) from error
    return tuple(members)
