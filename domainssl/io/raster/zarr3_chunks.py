"""Where the chunks of an array lie: objects of their own, or parts of shards.

Of format 3 the usual forms are known here: numbers in one byte order, at most one compressor, at
most a checksum, plain or in shards. Chunks of such arrays in local stores are read without an event
loop; all other arrays are read by zarr-python (`zarr3.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from domainssl.errors import require
from domainssl.io.storage.archives import FolderStore, Store
from domainssl.io.storage.bounded import CHUNK_LIMIT, packed_limit

__all__ = ["ChunkFormat", "ChunkReader", "chunk_format"]

_COMPRESSORS = ("blosc", "gzip", "zstd")
_NOTHING = 2**64 - 1  # offset and length of a chunk that a shard does not hold
_CHECKSUM = 4
_INDEX_LIMIT = 2**24  # chunks in one shard


@dataclass(frozen=True, kw_only=True)
class ChunkFormat:
    """How the chunks of an array are stored.

    Attributes:
        separator: Between the numbers of a key.
        prefix: What keys of chunks begin with, behind the name of the array.
        byte_order: `<` or `>`.
        compressor: Codec with its `id`; None where numbers are stored as they are.
        has_checksum: A CRC32C follows the bytes of a chunk.
        per_shard: Chunks in a shard along every axis; None where every chunk is an object.
        is_index_last: A shard ends with its index, rather than to begin with it.
    """

    separator: str
    prefix: str = ""
    byte_order: str = "="
    compressor: Mapping[str, Any] | None = None
    has_checksum: bool = False
    per_shard: tuple[int, ...] | None = None
    is_index_last: bool = True


def chunk_format(metadata: Mapping[str, Any]) -> ChunkFormat | None:
    """Return how chunks are stored, None where it is none of the usual ways.

    Args:
        metadata: What `zarr.json` of the array says, checked by zarr-python.
    """
    grid, keys = metadata["chunk_grid"], metadata["chunk_key_encoding"]
    if grid["name"] != "regular" or keys["name"] not in ("default", "v2"):
        return None
    is_default = keys["name"] == "default"
    separator = (keys.get("configuration") or {}).get("separator", "/" if is_default else ".")
    codecs, per_shard, is_index_last = list(metadata["codecs"]), None, True
    if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        shard = codecs[0]["configuration"]
        if [codec["name"] for codec in shard["index_codecs"]] != ["bytes", "crc32c"]:
            return None
        if (shard["index_codecs"][0].get("configuration") or {}).get("endian") != "little":
            return None
        outer, inner = grid["configuration"]["chunk_shape"], shard["chunk_shape"]
        per_shard = tuple(a // b for a, b in zip(outer, inner, strict=True))
        is_index_last = shard.get("index_location", "end") == "end"
        codecs = list(shard["codecs"])
    if not codecs or codecs[0]["name"] != "bytes":
        return None
    endian = (codecs.pop(0).get("configuration") or {}).get("endian", "little")
    has_checksum = bool(codecs) and codecs[-1]["name"] == "crc32c"
    packed = codecs[: len(codecs) - has_checksum]
    if len(packed) > 1 or any(codec["name"] not in _COMPRESSORS for codec in packed):
        return None
    return ChunkFormat(
        prefix="c" if is_default else "",
        separator=separator,
        byte_order=">" if endian == "big" else "<",
        compressor={"id": packed[0]["name"]} if packed else None,
        has_checksum=has_checksum,
        per_shard=per_shard,
        is_index_last=is_index_last,
    )


@dataclass(kw_only=True)
class ChunkReader:
    """Gives out the stored bytes of the chunks of one array, during one read.

    Attributes:
        store: Where they lie.
        name: Name of the array.
        format: How its chunks are stored.
        most: Bytes that the stored form of a chunk may have.
    """

    store: Store
    name: str
    format: ChunkFormat
    most: int
    _shards: dict[str, _Shard | None] = field(default_factory=dict)
    _open: ExitStack = field(default_factory=ExitStack)

    @contextmanager
    def during(self) -> Iterator[ChunkReader]:
        """Keep shards open as long as the context."""
        with self._open:
            yield self

    def key(self, number: Sequence[int]) -> str:
        """Return the key of the object that holds a chunk."""
        if self.format.per_shard is not None:
            number = [n // p for n, p in zip(number, self.format.per_shard, strict=True)]
        parts = [self.format.prefix] if self.format.prefix else []
        last = self.format.separator.join([*parts, *map(str, number)])
        return f"{self.name}/{last or '0'}"

    def get(self, number: Sequence[int]) -> bytes | memoryview | None:
        """Return the stored bytes of a chunk without their checksum, None where there is none.

        Raises:
            DataError: The store fails.
            ValueError: A checksum is wrong, or a shard says what cannot be.
        """
        raw: bytes | memoryview | None
        if self.format.per_shard is None:
            raw = getattr(self.store, "borrow", self.store.get)(self.key(number), self.most)
        else:
            shard, inner = self._in_shard(number)
            raw = None if shard is None else shard.get(inner, self.most)
        if raw is None or not self.format.has_checksum:
            return raw
        return _checked(memoryview(raw))

    def has(self, number: Sequence[int]) -> bool:
        """Tell whether a chunk of an array in shards is stored.

        Raises:
            DataError: The store fails.
            ValueError: A shard says what cannot be.
        """
        shard, inner = self._in_shard(number)
        return shard is not None and shard.holds(inner)

    def _in_shard(self, number: Sequence[int]) -> tuple[_Shard | None, tuple[int, ...]]:
        """Return the shard of a chunk, None where there is none, and its place there."""
        key, per_shard = self.key(number), self.format.per_shard or ()
        if key not in self._shards:
            self._shards[key] = self._open_shard(key)
        return self._shards[key], tuple(n % p for n, p in zip(number, per_shard, strict=True))

    def _open_shard(self, key: str) -> _Shard | None:
        per_shard = self.format.per_shard or ()
        if isinstance(self.store, FolderStore):
            file = self.store.open(key)
            if file is None:
                return None
            return _Shard(self._open.enter_context(file), per_shard, self.format.is_index_last)
        raw = self.store.get(key, packed_limit(CHUNK_LIMIT))
        return None if raw is None else _Shard(raw, per_shard, self.format.is_index_last)


class _Shard:
    """Chunks in one object, found by its index."""

    def __init__(
        self, content: BinaryIO | bytes, per_shard: tuple[int, ...], is_index_last: bool
    ) -> None:
        self._content = content
        self._size = content.seek(0, 2) if not isinstance(content, bytes) else len(content)
        count = int(np.prod(per_shard))
        length = 16 * count + _CHECKSUM
        if not 0 < count <= _INDEX_LIMIT or length > self._size:
            raise ValueError(f"a shard of {self._size} bytes has no index of {count} chunks")
        raw = _checked(memoryview(self._part(self._size - length if is_index_last else 0, length)))
        self._index = np.frombuffer(raw, "<u8").reshape(*per_shard, 2)

    def _part(self, offset: int, size: int) -> bytes | memoryview:
        if isinstance(self._content, bytes):
            return memoryview(self._content)[offset : offset + size]
        self._content.seek(offset)
        return self._content.read(size)

    def holds(self, inner: tuple[int, ...]) -> bool:
        """Tell whether a chunk is stored."""
        return bool((self._index[inner] != _NOTHING).any())

    def get(self, inner: tuple[int, ...], limit: int) -> bytes | memoryview | None:
        """Return the bytes of a chunk, None where the shard does not hold it."""
        if not self.holds(inner):
            return None
        offset, size = (int(number) for number in self._index[inner])
        if size > limit or offset + size > self._size:
            raise ValueError(
                f"a shard of {self._size} bytes says that a chunk of {size} bytes lies at {offset}"
            )
        return self._part(offset, size)


def _checked(raw: memoryview) -> memoryview:
    """Return bytes without the CRC32C that follows them."""
    body = raw[:-_CHECKSUM]
    stated = int.from_bytes(raw[-_CHECKSUM:], "little")
    found = require("google_crc32c", "geo").value(bytes(body))
    if len(raw) < _CHECKSUM or found != stated:
        raise ValueError(f"the checksum is {found:#010x}, expected {stated:#010x}")
    return body
