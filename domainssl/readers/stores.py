"""Files and archives, local or behind an fsspec URL: listing, range reads, zips and tars.

Nothing here is opened when an object is made: handles belong to the process that reads, live in
a bounded least-recently-used pool, and never travel through a pickle or a fork.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from domainssl.errors import DataError
from domainssl.readers.remote import Remote
from domainssl.readers.scratch import stored_member

__all__ = [
    "FolderStore",
    "HandlePool",
    "Member",
    "SharedFile",
    "Store",
    "ZipFileStore",
    "check_member",
    "fetch_ranges",
    "is_file",
    "is_folder",
    "is_url",
    "join",
    "list_folder",
    "open_file",
    "size_of",
    "stamp",
    "tar_index",
    "window",
]

Options = Mapping[str, Any]


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


# ---------------------------------------------------------------------------- paths and URLs


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` names an fsspec URL (`s3://…`, `https://…`, `memory://…`)."""
    return "://" in str(path)


def join(root: str | os.PathLike[str], *parts: str) -> str:
    """Join path parts, for folders and URLs alike."""
    return "/".join([str(root).rstrip("/"), *parts]) if is_url(root) else os.path.join(root, *parts)


def is_folder(path: str | os.PathLike[str], options: Options | None = None) -> bool:
    """Return whether a folder lies at `path`."""
    if not is_url(path):
        return os.path.isdir(path)
    return Remote(str(path), options).is_folder()


def is_file(path: str | os.PathLike[str], options: Options | None = None) -> bool:
    """Return whether a file lies at `path`."""
    if not is_url(path):
        return os.path.isfile(path)
    return Remote(str(path), options).is_file()


def size_of(path: str | os.PathLike[str], options: Options | None = None) -> int:
    """Return the size of a file in bytes."""
    if not is_url(path):
        return os.path.getsize(path)
    return Remote(str(path), options).size()


def stamp(path: str | os.PathLike[str]) -> tuple[str, int, int, int]:
    """Return what a handle is kept under: a local file that was replaced is another file."""
    if is_url(path):
        return str(path), 0, 0, 0
    try:
        facts = os.stat(path)
    except OSError:
        return str(path), 0, 0, 0
    return str(path), facts.st_ino, facts.st_mtime_ns, facts.st_size


def list_folder(path: str | os.PathLike[str], options: Options | None = None) -> list[str]:
    """Return the sorted names in a folder, [] when there is no such folder."""
    if not is_url(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    remote = Remote(str(path), options)
    return remote.names() if remote.is_folder() else []


def open_file(path: str | os.PathLike[str], options: Options | None = None) -> BinaryIO:
    """Open a file for reading; behind a URL, only the byte ranges that are read are fetched."""
    try:
        if not is_url(path):
            return open(path, "rb")
        return Remote(str(path), options).open()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error})") from error


def fetch_ranges(
    path: str, ranges: Sequence[tuple[int, int]], options: Options | None = None
) -> list[bytes]:
    """Read several (offset, size) ranges of one file; remote ones are fetched side by side."""
    if is_url(path):
        try:
            return Remote(path, options).parts(ranges)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file") from error
    parts = []
    with open_file(path) as file:
        for offset, size in ranges:
            try:
                file.seek(offset)
                parts.append(file.read(size))
            except OSError as error:
                raise DataError(f"{path}: cannot be read at offset {offset} ({error})") from error
            if len(parts[-1]) != size:
                raise DataError(
                    f"{path}: truncated, {len(parts[-1])} bytes at offset {offset} where "
                    f"{size} belong"
                )
    return parts


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


# ---------------------------------------------------------------------------- handles


class HandlePool:
    """Open things, at most `limit` at a time, belonging to the process that opened them.

    Evicted handles are dropped and close themselves once no thread reads from them.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, opener: Callable[[], Any]) -> Any:
        """Return the handle for `key`, opening it if this process has not done so yet."""
        if self._pid != os.getpid():  # forked: the parent's file offsets must not be shared
            self._reset()
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        handle = opener()
        with self._lock:
            self._open[key] = handle
            while len(self._open) > self.limit:
                self._open.popitem(last=False)
        return handle

    def clear(self) -> None:
        """Drop every handle."""
        self._reset()

    def __len__(self) -> int:
        return len(self._open) if self._pid == os.getpid() else 0

    def __reduce__(self) -> tuple[type[HandlePool], tuple[int]]:
        return HandlePool, (self.limit,)


class SharedFile:
    """An open file whose ranges several threads may read."""

    def __init__(self, path: str, options: Options | None = None) -> None:
        self._file = open_file(path, options)
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset` on."""
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class _Window(io.RawIOBase):
    """A read-only view on `size` bytes of a file."""

    def __init__(self, file: SharedFile, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        data = self._file.read(self._offset + self._at, size)
        self._at += len(data)
        return data


def window(file: SharedFile, offset: int, size: int) -> BinaryIO:
    """Return a file object that sees only `size` bytes from `offset` on."""
    return cast(BinaryIO, _Window(file, offset, size))


# ---------------------------------------------------------------------------- stores


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
