"""Open files: a bounded least-recently-used pool per process, and ranges that threads share.

Nothing here is opened when an object is made: handles belong to the process that reads, and never
travel through a pickle or a fork.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, cast

from domainssl.io.storage.paths import Options, is_settled, open_file, stamp

__all__ = ["HandlePool", "SharedFile", "names_in", "window"]


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

    def drop(self, key: Any) -> None:
        """Drop one handle, if this process has it."""
        if self._pid == os.getpid():
            with self._lock:
                self._open.pop(key, None)

    def clear(self) -> None:
        """Drop every handle."""
        self._reset()

    def __len__(self) -> int:
        return len(self._open) if self._pid == os.getpid() else 0

    def __reduce__(self) -> tuple[type[HandlePool], tuple[int]]:
        return HandlePool, (self.limit,)


_LISTINGS = HandlePool(limit=8)


def names_in(folder: str) -> Mapping[str, str]:
    """Return the names in a local folder by their lower-case form, listed once until it changes.

    A folder of many files would otherwise be listed again for every one of them.
    """

    def listing() -> dict[str, str]:
        return {name.lower(): name for name in sorted(os.listdir(folder))}

    if not is_settled(os.stat(folder), time.time_ns()):
        return listing()
    return cast(Mapping[str, str], _LISTINGS.get(stamp(folder), listing))


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
