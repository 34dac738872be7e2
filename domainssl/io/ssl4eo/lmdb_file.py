"""Values of an LMDB by key, read by ranges of the file that are checked first.

The library maps the file and follows the numbers that stand in its pages: a damaged or forged one
ends the process. Here the same tree is walked with `read`, and what points out of the file is an
error.

Source: LMDB 0.9, `mdb.c` (pages, nodes and the meta pages), data version 1.
"""

from __future__ import annotations

import os
import struct
import threading

from domainssl.errors import DataError
from domainssl.files import open_regular

__all__ = ["LmdbFile"]

_MAGIC = 0xBEEFC0DE.to_bytes(4, "little")
_HEAD = 152  # bytes of a meta page that say something
_PAGE = 16  # bytes of the head of a page
_NODE = 8  # bytes of the head of a node
_BRANCH, _LEAF = 1, 2  # kinds of pages
_BIG, _OTHER = 1, 6  # flags of nodes: the value has pages of its own; tables and duplicates
_DEEPEST = 32
_PAGE_SIZES = (512, 65_536)


class LmdbFile:
    """The main table of an LMDB.

    Args:
        path: The file, `data.mdb`.

    Raises:
        DataError: It is none, or shorter than its newest header says.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file, self._lock = open_regular(path), threading.Lock()
        self._length = os.fstat(self._file.fileno()).st_size
        first = self._file.read(_HEAD)
        self._page = int.from_bytes(first[40:44], "little")
        low, high = _PAGE_SIZES
        if first[16:20] != _MAGIC or not low <= self._page <= high or len(first) < _HEAD:
            raise DataError(
                f"{path}: is no LMDB: it does not begin with the header of one. Give the folder "
                "with data.mdb, or the file itself; get it again if it is not whole."
            )
        self._file.seek(self._page)
        heads = [h for h in (first, self._file.read(_HEAD)) if h[16:20] == _MAGIC]
        heads = [head for head in heads if len(head) == _HEAD]
        newest = max(heads, key=lambda head: int.from_bytes(head[144:152], "little"))
        self.entries, self._root, last = struct.unpack("<QQQ", newest[120:144])
        pages = last + 1
        if pages * self._page > self._length:
            raise DataError(
                f"{path}: {self._length} bytes, but its header speaks of {pages} pages of "
                f"{self._page}, {pages * self._page} bytes. The file is not whole; get it again."
            )

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, None where there is none.

        Raises:
            DataError: A page or a value lies outside of the file.
        """
        number = self._root
        if not self.entries:
            return None
        for _ in range(_DEEPEST):
            page = self._read(number * self._page, self._page)
            kind, lower = struct.unpack_from("<HH", page, 10)
            count = (lower - _PAGE) // 2
            if not 0 < count <= (self._page - _PAGE) // 2 or kind & 3 not in (_BRANCH, _LEAF):
                raise self._damaged(f"page {number} is none of a table")
            places = struct.unpack_from(f"<{count}H", page, _PAGE)
            if kind & _LEAF:
                return self._value(page, places, key)
            low, high = 0, count  # the first key of a branch stands for all smaller ones
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (
                    (middle, high) if self._key(page, places[middle]) <= key else (low, middle)
                )
            at = self._node(page, places[low])
            number = int.from_bytes(page[at : at + 6], "little")
        raise self._damaged(f"its tree is deeper than {_DEEPEST} pages")

    def _value(self, page: bytes, places: tuple[int, ...], key: bytes) -> bytes | None:
        low, high = 0, len(places)
        while low < high:
            middle = (low + high) // 2
            low, high = (
                (middle + 1, high) if self._key(page, places[middle]) < key else (low, middle)
            )
        if low == len(places) or self._key(page, places[low]) != key:
            return None
        at = self._node(page, places[low])
        size, flags, used = struct.unpack_from("<IHH", page, at)
        begin = at + _NODE + used
        if flags & _OTHER:
            raise self._damaged(f"the value of {key!r} is a table")
        if not flags & _BIG:
            if begin + size > self._page:
                raise self._damaged(f"the value of {key!r} ends outside of its page")
            return page[begin : begin + size]
        if begin + 8 > self._page:
            raise self._damaged(f"the value of {key!r} lies nowhere")
        number = int.from_bytes(page[begin : begin + 8], "little")
        return self._read(number * self._page + _PAGE, size)

    def _node(self, page: bytes, place: int) -> int:
        if not _PAGE <= place <= self._page - _NODE:
            raise self._damaged("a node lies outside of its page")
        return place

    def _key(self, page: bytes, place: int) -> bytes:
        at = self._node(page, place)
        size = int.from_bytes(page[at + 6 : at + 8], "little")
        return page[at + _NODE : at + _NODE + size]

    def _read(self, offset: int, size: int) -> bytes:
        if offset + size > self._length:
            raise self._damaged(f"{size} bytes at {offset} lie outside of its {self._length}")
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self.path}: the LMDB is damaged: {reason}. Get the file again.")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
