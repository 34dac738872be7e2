"""Paths and URLs alike: joining, listing, opening, reading ranges."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from domainssl.errors import DataError, UnreadableError
from domainssl.files import open_regular
from domainssl.io.storage.remote import Remote

__all__ = [
    "Options",
    "fetch_ranges",
    "is_file",
    "is_folder",
    "is_settled",
    "is_url",
    "join",
    "list_folder",
    "open_file",
    "size_of",
    "stamp",
]

Options = Mapping[str, Any]


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


def is_settled(facts: os.stat_result, now_ns: int) -> bool:
    """Return whether a change from now on would show in the times of a file.

    File systems count in ticks of some milliseconds, a few in seconds: a file that has just been
    written may be written again within the same tick.
    """
    last = max(facts.st_mtime_ns, facts.st_ctime_ns)
    tick = 2_000_000_000 if facts.st_mtime_ns % 1_000_000_000 == 0 else 100_000_000
    return bool(now_ns - last > tick)


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
            return open_regular(path)
        return Remote(str(path), options).open()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
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
                raise UnreadableError(
                    f"{path}: truncated, {len(parts[-1])} bytes at offset {offset} where "
                    f"{size} belong"
                )
    return parts
