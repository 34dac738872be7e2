"""Zarr format 3 through zarr-python, which sees our stores and codecs that cannot unfold.

Keys that leave the store are refused, whoever names them; a store that fails is an error and no
missing chunk; gzip, Zstandard and Blosc chunks are at most what their metadata say.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from functools import cache
from typing import Any, TypeGuard

from domainssl.errors import DataError, parsing, require
from domainssl.io.storage.archives import FolderStore, Store, check_member
from domainssl.io.storage.bounded import (
    CHUNK_LIMIT,
    METADATA_LIMIT,
    TEXT_LIMIT,
    packed_limit,
    unpack,
)
from domainssl.io.storage.paths import is_url

__all__ = ["open_v3", "own_metadata", "v3_members"]

_log = logging.getLogger(__name__)

_BOUNDED = {"gzip": "GzipCodec", "zstd": "ZstdCodec", "blosc": "BloscCodec"}
_TRUSTED = ("bytes", "transpose", "crc32c", "sharding_indexed", "vlen-utf8", "vlen-bytes")


def _load(store: Store, key: str, wanted: Any) -> bytes | None:
    """Return a value, or the byte range of it that zarr asks for."""
    from zarr.abc.store import OffsetByteRequest, RangeByteRequest

    is_range = isinstance(wanted, RangeByteRequest)
    if isinstance(store, FolderStore):
        if is_range:
            return store.part(key, wanted.start, wanted.end - wanted.start)
        if hasattr(wanted, "suffix"):
            return store.part(key, -wanted.suffix, wanted.suffix)
    is_metadata = key.rsplit("/", 1)[-1].startswith((".z", "zarr.json"))
    limit = METADATA_LIMIT if is_metadata else packed_limit(CHUNK_LIMIT)
    found = store.get(check_member(key, str(getattr(store, "name", ""))), limit)
    if found is None or wanted is None:
        return found
    if is_range:
        return found[wanted.start : wanted.end]
    return (
        found[wanted.offset :] if isinstance(wanted, OffsetByteRequest) else found[-wanted.suffix :]
    )


def _is_local(store: Store) -> TypeGuard[FolderStore]:
    return isinstance(store, FolderStore) and not is_url(store.name)


def _told_already(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Pass over bad members that zarr-python asked for beside the one whose error it raised.

    Nobody awaits their tasks, so asyncio would print a traceback for each when it is collected.
    """
    if "future" in context and isinstance(context.get("exception"), Exception):
        _log.debug("beside the error that was raised: %r", context["exception"])
    else:
        loop.default_exception_handler(context)


async def _fetch(store: Store, key: str, wanted: Any) -> bytes | None:
    """Load a value; small local files at once, because another thread costs more than reading."""
    loop = asyncio.get_running_loop()
    if loop.get_exception_handler() is None:
        loop.set_exception_handler(_told_already)
    if _is_local(store) and wanted is None and key.rsplit("/", 1)[-1] == "zarr.json":
        return _load(store, key, None)
    return await asyncio.to_thread(_load, store, key, wanted)


@cache
def _store_class() -> type[Any]:
    """Build the adapter on first use: zarr is an optional library."""
    require("zarr", "geo")
    from zarr.abc.store import Store as ZarrStore

    class ReadOnlyStore(ZarrStore):
        """One of our stores, as zarr-python asks for it."""

        supports_writes = supports_deletes = False
        supports_listing = True

        def __init__(self, store: Store) -> None:
            super().__init__(read_only=True)
            self.store = store

        def __eq__(self, other: object) -> bool:
            return isinstance(other, ReadOnlyStore) and other.store is self.store

        async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
            from zarr.core.buffer import default_buffer_prototype

            found = await _fetch(self.store, key, byte_range)
            make = (prototype or default_buffer_prototype()).buffer.from_bytes
            return None if found is None else make(found)

        async def get_partial_values(self, prototype: Any, key_ranges: Iterable[Any]) -> list[Any]:
            asked = [self.get(key, prototype, wanted) for key, wanted in key_ranges]
            return list(await asyncio.gather(*asked))

        async def exists(self, key: str) -> bool:
            return await self.get(key) is not None

        async def set(self, key: str, value: Any) -> None:
            raise NotImplementedError("read only")

        async def delete(self, key: str) -> None:
            raise NotImplementedError("read only")

        async def list(self) -> AsyncIterator[str]:
            for key in await asyncio.to_thread(self.store.names):
                yield key

        async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
            async for key in self.list():
                if key.startswith(prefix):
                    yield key

        async def list_dir(self, prefix: str) -> AsyncIterator[str]:
            if _is_local(self.store):
                for name in self.store.folders(prefix.rstrip("/")):
                    yield name
                return
            inner = f"{prefix.rstrip('/')}/" if prefix else ""
            found: dict[str, None] = {}
            async for key in self.list_prefix(inner):
                found[key[len(inner) :].partition("/")[0]] = None
            for name in found:
                yield name

    return ReadOnlyStore


def _limit_of(spec: Any) -> int:
    """Return how many bytes a decoded chunk has by its metadata."""
    dtype = spec.dtype.to_native_dtype() if hasattr(spec.dtype, "to_native_dtype") else spec.dtype
    if dtype.kind in "OT":  # texts
        return TEXT_LIMIT
    # codecs between ours and the numbers add a checksum, or the index of a shard
    return packed_limit(math.prod(spec.shape) * int(dtype.itemsize))


@cache
def _codecs() -> dict[str, str]:
    """Register codecs that stop at the limit, and return their names by codec."""
    from zarr import codecs
    from zarr.core.buffer.cpu import as_numpy_array_wrapper
    from zarr.registry import fully_qualified_name, register_codec

    def bounded(name: str, base: type[Any]) -> type[Any]:
        class Bounded(base):
            def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
                def decode(raw: Any) -> Any:
                    return unpack({"id": name}, raw, min(CHUNK_LIMIT, _limit_of(chunk_spec)))

                return as_numpy_array_wrapper(decode, chunk_bytes, chunk_spec.prototype)

            async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
                return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

        Bounded.__qualname__ = Bounded.__name__ = f"Bounded{base.__name__}"
        return Bounded

    names = {}
    for name, base in _BOUNDED.items():
        made = bounded(name, getattr(codecs, base))
        register_codec(name, made)
        names[f"codecs.{name}"] = fully_qualified_name(made)
    return names


def open_v3(store: Store, name: str) -> Any:
    """Open a group of format 3.

    Raises:
        DataError: The metadata cannot be understood, or name something outside the store.
    """
    zarr = require("zarr", "geo")
    raw = store.get("zarr.json") or b""
    with parsing(f"{name}: the metadata in zarr.json"):
        facts = json.loads(raw)
        inline = (facts.get("consolidated_metadata") or {}).get("metadata") or {}
        for key in inline:
            check_member(str(key), name)
    if facts.get("node_type") == "array":
        raise DataError(
            f"{name}: an array at the root, expected a group with named arrays. Give the folder "
            "above it, or write it into a group."
        )
    stated = {f"{key}/zarr.json": facts for key, facts in inline.items()}
    is_stale = _is_local(store) and bool(own_metadata(store, stated))
    with parsing(f"{name}: the metadata of format 3"), zarr.config.set(_codecs()):
        return zarr.open_group(
            _store_class()(store), mode="r", zarr_format=3,
            use_consolidated=False if is_stale else None,
        )  # fmt: skip


def own_metadata(store: FolderStore, consolidated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of members whose copy at the root of a local store is stale.

    That is so where arrays grew or were written anew and nobody consolidated again: read by the
    copy, dates are left out, and numbers are decoded by a type or scale they do not have.

    Args:
        store: The store.
        consolidated: What the copy says, by key of the member's own file.
    """
    found: dict[str, Any] = {}
    for key, stated in consolidated.items():
        raw = store.get(check_member(str(key), store.name))
        if raw is None:
            continue
        with parsing(f"{store.name}: metadata {key!r}"):
            own = json.loads(raw)
        if _comparable(own) != _comparable(stated):
            found[key] = own
    if found:
        _log.warning(
            "%s: the consolidated metadata differ from those of %s (%d such in all), which count. "
            "Consolidate them again (zarr.consolidate_metadata).",
            store.name, next(iter(found)), len(found),
        )  # fmt: skip
    return found


def _comparable(metadata: Any) -> str:
    """Return metadata as text; NaN equals NaN in it."""
    if isinstance(metadata, Mapping):
        metadata = {k: v for k, v in metadata.items() if k != "consolidated_metadata"}
    return json.dumps(metadata, sort_keys=True)


def v3_members(group: Any, name: str) -> dict[str, Any]:
    """Return everything in a group, opened once: opening an array anew asks for its metadata.

    Raises:
        DataError: The metadata of a member cannot be understood, or a codec is not known.
    """
    zarr = require("zarr", "geo")
    with parsing(f"{name}: the metadata of format 3"), zarr.config.set(_codecs()):
        found = dict(group.members(max_depth=None))
        for key, item in found.items():
            check_member(key, name)
            if hasattr(item, "shape"):
                _check_codecs(item.metadata.to_dict().get("codecs", ()), f"{name}: array {key!r}")
    return found


def _check_codecs(codecs: Iterable[Mapping[str, Any]], where: str) -> None:
    for codec in codecs:
        known = (*_TRUSTED, *_BOUNDED)
        if codec["name"] not in known:
            raise DataError(
                f"{where}: codec {codec['name']!r} is not read; known are {', '.join(known)}."
            )
        inner = codec.get("configuration") or {}
        _check_codecs([*inner.get("codecs", ()), *inner.get("index_codecs", ())], where)
