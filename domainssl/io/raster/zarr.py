"""Zarr hierarchies read by whole chunks, decoded here or, in the rarer forms of format 3, by zarr.

`Cube.read` asks the codec to write each chunk straight into the array that is returned wherever
the chunk's place in it is contiguous.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np

from domainssl.errors import DataError, UnreadableError, nearest, parsing, require
from domainssl.io.raster.arrays import ArrayInfo, codec_name, decoded, fill_of, sizes_of
from domainssl.io.raster.zarr3 import open_v3, own_metadata, v3_members
from domainssl.io.raster.zarr3_chunks import ChunkFormat, ChunkReader, chunk_format
from domainssl.io.storage.archives import FolderStore, Store, ZipFileStore, check_member
from domainssl.io.storage.bounded import (
    CHUNK_LIMIT,
    TEXT_LIMIT,
    check_blosc,
    packed_limit,
)
from domainssl.io.storage.handles import HandlePool
from domainssl.io.storage.paths import Options, is_file, is_folder, is_url, join, open_file, stamp

__all__ = ["ArrayInfo", "Cube", "open_cube"]

Selection = Sequence[slice | Sequence[int]]


class Cube:
    """One zarr group.

    Args:
        store: Where its bytes are.
        name: How errors call it, usually the path.
        options: fsspec options for a URL.
    """

    def __init__(self, store: Store, name: str, options: Options | None = None) -> None:
        self.store, self.name, self.options = store, name, dict(options or {})
        self.grids: dict[Any, Any] = {}  # of the arrays looked at, by what they are read from

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        raw = self.store.get(".zmetadata")
        if raw is not None:
            found = self._json(".zmetadata", raw).get("metadata")
            if not isinstance(found, dict):
                raise DataError(f"{self.name}: '.zmetadata' has no mapping 'metadata'")
            if isinstance(self.store, FolderStore) and not self._is_remote:
                found = {**found, **own_metadata(self.store, found)}
        else:
            found = {key: self._json(key, raw) for key, raw in self._separate_metadata()}
        for key, facts in found.items():
            check_member(key, self.name)
            if not isinstance(facts, dict):
                raise DataError(
                    f"{self.name}: metadata {key!r} is a {type(facts).__name__}, expected a mapping"
                )
        return found

    def _separate_metadata(self) -> Iterator[tuple[str, bytes]]:
        """Yield the metadata files of format 2; nothing is listed below an array."""
        if not isinstance(self.store, FolderStore) or self._is_remote:
            for key in self.store.names():
                if key.rsplit("/", 1)[-1] in _METADATA:
                    yield key, self.store.get(key) or b""
            return
        folders = [""]
        while folders:
            folder = folders.pop()
            found = [(f"{folder}{name}", self.store.get(f"{folder}{name}")) for name in _METADATA]
            yield from ((key, raw) for key, raw in found if raw is not None)
            if found[0][1] is None:
                folders += [f"{folder}{name}/" for name in self.store.folders(folder)]

    def _json(self, key: str, raw: bytes) -> dict[str, Any]:
        with parsing(f"{self.name}: metadata {key!r} is not JSON; it"):
            found = json.loads(raw)
        if not isinstance(found, dict):
            raise DataError(
                f"{self.name}: metadata {key!r} is a {type(found).__name__}, expected a mapping"
            )
        return found

    @cached_property
    def format(self) -> int:
        """The zarr format, 2 or 3."""
        if self.store.get("zarr.json") is not None:
            return 3
        if not any(key.endswith((".zarray", ".zgroup")) for key in self._metadata):
            raise UnreadableError(
                f"{self.name}: no zarr hierarchy (neither .zgroup nor zarr.json)"
                f"{self._further_down()}"
            )
        return 2

    def _further_down(self) -> str:
        """Return where the hierarchy of a zip begins, if in one of its folders."""
        if not isinstance(self.store, ZipFileStore):
            return ""
        marks = [n for n in self.store.names() if n.rsplit("/", 1)[-1] in (".zgroup", "zarr.json")]
        if not marks:
            return ""
        inner = min(marks, key=lambda name: name.count("/")).rpartition("/")[0]
        return (
            f" in its root, but in its folder {inner!r}. Zip what the folder holds and not the "
            f"folder itself: unzip it, then (cd {inner} && zip -0 -r ../again.zarr.zip .)"
        )

    @cached_property
    def arrays(self) -> dict[str, ArrayInfo]:
        """The arrays by name."""
        if self.format == 3:
            with parsing(f"{self.name}: the metadata of its arrays"):
                return _v3_arrays(self._v3_members)
        names = [k[: -len("/.zarray")] for k in self._metadata if k.endswith("/.zarray")]
        return {name: self._info(name) for name in sorted(names)}

    @cached_property
    def attrs(self) -> dict[str, Any]:
        """The attributes of the group."""
        if self.format == 3:
            return dict(self._v3.attrs)
        return dict(self._metadata.get(".zattrs", {}))

    def group_attrs(self, path: str) -> Mapping[str, Any]:
        """Return the attributes of a group inside the store, {} where there is no such group."""
        if not path:
            return self.attrs
        if self.format == 3:
            found = self._v3_members.get(path)
            return {} if found is None or hasattr(found, "shape") else dict(found.attrs)
        return dict(self._metadata.get(f"{path}/.zattrs", {}))

    def _info(self, name: str) -> ArrayInfo:
        meta = self._metadata[f"{name}/.zarray"]
        attrs = self._metadata.get(f"{name}/.zattrs", {})
        with parsing(f"{self.name}: metadata of array {name!r} cannot be understood; they"):
            filters, compressor = meta.get("filters") or (), meta["compressor"]
            codecs = [dict(codec) for codec in (*filters, *([compressor] if compressor else []))]
            if any(codec["id"] == "pickle" for codec in codecs):  # may run code
                raise DataError(f"{self.name}: array {name!r} is pickled, which is refused")
            stored = meta["dtype"]
            dtype = np.dtype([tuple(d) for d in stored] if isinstance(stored, list) else stored)
            if dtype.hasobject and not filters:
                raise ValueError("objects without a filter that encodes them")
            shape, chunks = sizes_of(meta["shape"], 0), sizes_of(meta["chunks"], 1)
            dims = attrs.get("_ARRAY_DIMENSIONS", [])
            order, separator = meta.get("order", "C"), meta.get("dimension_separator", ".")
            if len(shape) != len(chunks) or order not in ("C", "F") or separator not in (".", "/"):
                raise ValueError(f"shape {shape}, chunks {chunks}, {order=}, {separator=}")
            if not isinstance(dims, list) or not all(isinstance(dim, str) for dim in dims):
                raise ValueError(f"_ARRAY_DIMENSIONS {dims!r} are no list of names")
            return ArrayInfo(
                name=name,
                shape=shape,
                chunks=chunks,
                dtype=dtype,
                dims=tuple(dims),
                attrs=attrs,
                codec=codec_name(compressor),
                fill=fill_of(meta.get("fill_value"), dtype),
                order=order,
                separator=separator,
                compressor=compressor,
                filters=tuple(filters),
            )

    def info(self, name: str) -> ArrayInfo:
        """Return the facts about one array.

        Raises:
            DataError: There is no such array.
        """
        if name not in self.arrays:
            have = ", ".join(self.arrays) or "none"
            raise DataError(
                f"{self.name}: no array {name!r}; there are: {have}." + nearest(name, self.arrays)
            )
        return self.arrays[name]

    def read(
        self,
        name: str,
        selection: Selection | None = None,
        out: np.ndarray[Any, Any] | None = None,
    ) -> np.ndarray[Any, Any]:
        """Read an array or a part of it.

        Args:
            name: Name of the array.
            selection: Per axis a slice of step 1 or a list of indices (at most one list, in any
                order); missing axes are read in full.
            out: Where to write, of the selection's shape and the array's dtype.

        Raises:
            DataError: An index is out of range, or a chunk does not decode.
        """
        info = self.info(name)
        wanted = self._wanted(info, selection or ())
        shape = tuple(map(len, wanted))
        size = math.prod(shape) * info.dtype.itemsize
        for what, found, most in (("chunk", info.chunk_bytes, CHUNK_LIMIT),
                                  ("read", size if out is None else 0, _READ_LIMIT)):  # fmt: skip
            if found > most:
                raise DataError(
                    f"{self.name}: array {name!r} of shape {info.shape}, chunks {info.chunks}: one "
                    f"{what} would take up {found / 1e9:.4g} GB, expected at most "
                    f"{most / 1e9:.3g} GB. If the array is not that large, its metadata are wrong."
                )
        if out is None:
            out = np.empty(shape, info.dtype.newbyteorder("="))
        elif out.shape != shape:
            raise DataError(f"{self.name}: {name!r} read into {out.shape}, expected {shape}")
        if self.format == 3 and (info.stored is None or self._is_remote):
            return self._read_v3(info, selection or (), out)  # zarr asks for many chunks at a time
        with self._chunks(info) as chunks:
            for pieces in itertools.product(*map(_pieces, wanted, info.chunks)):
                number, inner, outer = (tuple(piece[i] for piece in pieces) for i in range(3))
                try:
                    self._place_chunk(info, chunks.get(number), inner, outer, out)
                except DataError:
                    raise
                except _DAMAGE as error:
                    raise UnreadableError(
                        f"{self.name}: array {info.name!r}, chunk {chunks.key(number)!r} does not "
                        f"decode ({error or type(error).__name__}). The file is damaged; get it "
                        "again."
                    ) from error
        return out

    def _chunks(self, info: ArrayInfo) -> AbstractContextManager[ChunkReader]:
        """Return what gives out the stored chunks of an array."""
        # of format 2, an array without axes has its chunk in `0`
        stored = info.stored or ChunkFormat(separator=info.separator)
        most = packed_limit(TEXT_LIMIT if info.dtype.hasobject else info.chunk_bytes)
        return ChunkReader(store=self.store, name=info.name, format=stored, most=most).during()

    def read_text(self, name: str) -> list[str]:
        """Read an array of names, whichever of zarr's text types it has."""
        with parsing(f"{self.name}: the names in array {name!r}"):
            if self.format == 3:
                self._wanted(self.info(name), ())
                values = np.asarray(self._v3_members[name][...])
            else:
                values = self.read(name)
            return [v.decode() if isinstance(v, bytes) else str(v) for v in values.reshape(-1)]

    def decoded_bytes(self, name: str, selection: Selection | None = None) -> int:
        """Return how many bytes the chunks hold that a read of `selection` decodes."""
        info = self.info(name)
        wanted = self._wanted(info, selection or ())
        touched = (len(_pieces(w, chunk)) for w, chunk in zip(wanted, info.chunks, strict=True))
        return math.prod(touched) * info.chunk_bytes

    def missing_chunks(self, name: str) -> int:
        """Return how many chunks of an array are not stored, so that they read as its fill.

        Chunks within shards count one by one in local stores, otherwise whole shards.

        Raises:
            DataError: A shard is damaged.
        """
        info = self.info(name)
        counts = [range(-(-s // c)) for s, c in zip(info.shape, self._stored(info), strict=True)]
        if self._has_inner_chunks(info):
            return sum(
                self._missing_in_shard(info, number) for number in itertools.product(*counts)
            )
        there = [k.rsplit("/", 1)[-1] for k in self.store.names() if k.startswith(f"{name}/")]
        stored = sum(not last.startswith((".", "zarr.")) for last in there)
        return math.prod(map(len, counts)) - stored

    def _missing_in_shard(self, info: ArrayInfo, shard: tuple[int, ...]) -> int:
        assert info.stored is not None and info.stored.per_shard is not None
        inside = [
            range(n * per, min((n + 1) * per, -(-size // chunk)))
            for n, per, size, chunk in zip(shard, info.stored.per_shard, info.shape, info.chunks)
        ]
        with (
            parsing(f"{self.name}: array {info.name!r}, shard {shard}"),
            self._chunks(info) as chunks,
        ):
            return sum(not chunks.has(number) for number in itertools.product(*inside))

    def _stored(self, info: ArrayInfo) -> tuple[int, ...]:
        """Return the shape of what is stored as one object: a chunk, or a shard of them."""
        shards = self._v3_members[info.name].shards if self.format == 3 else None
        return tuple(shards or info.chunks)

    def _has_inner_chunks(self, info: ArrayInfo) -> bool:
        """Tell whether chunks lie in shards whose index can be read here."""
        return info.stored is not None and bool(info.stored.per_shard) and not self._is_remote

    def unwritten(
        self, name: str, selection: Selection, values: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any] | None:
        """Return True where values that were read stand for chunks that are not stored.

        Args:
            name: Name of the array.
            selection: What was read.
            values: What reading gave: the fill value where nothing is stored.

        Returns:
            The mask, of the values' shape; None where everything is stored.
        """
        info, mask = self.info(name), None
        fill = 0 if info.fill is None else info.fill
        wanted = self._wanted(info, selection)
        has_inner = self._has_inner_chunks(info)
        sizes = info.chunks if has_inner else self._stored(info)
        axes = [_pieces(w, c) for w, c in zip(wanted, sizes, strict=True)]
        with self._chunks(info) as chunks:
            for pieces in itertools.product(*axes):
                part = values[tuple(piece[2] for piece in pieces)]
                if not part.size or part.flat[0] != fill or (part != fill).any():
                    continue
                number = tuple(piece[0] for piece in pieces)
                if not (chunks.has(number) if has_inner else self._is_written(info, number)):
                    mask = np.zeros(values.shape, bool) if mask is None else mask
                    mask[tuple(piece[2] for piece in pieces)] = True
        return mask

    def _is_written(self, info: ArrayInfo, number: tuple[int, ...]) -> bool:
        if self.format == 3:
            key = f"{info.name}/{self._v3_members[info.name].metadata.encode_chunk_key(number)}"
        else:
            key = f"{info.name}/{info.separator.join(map(str, number))}"
        if isinstance(self.store, FolderStore):
            return is_file(join(self.name, key), self.options)
        return key in self.store.names()

    def _wanted(self, info: ArrayInfo, selection: Selection) -> list[Sequence[int]]:
        if len(selection) > len(info.shape):
            raise DataError(
                f"{self.name}: {len(selection)} indices for {info.name!r} of shape {info.shape}"
            )
        chosen = [*selection, *[slice(None)] * (len(info.shape) - len(selection))]
        found = []
        for axis, (index, length, chunk) in enumerate(
            zip(chosen, info.shape, info.chunks, strict=True)
        ):
            if isinstance(index, slice):
                start, stop, _ = index.indices(length)
                wanted: Sequence[int] = range(start, stop)
            else:
                wanted = [int(i) for i in index]
                if any(not 0 <= i < length for i in wanted):
                    raise DataError(
                        f"{self.name}: {info.name!r} has {length} entries on axis {axis}, "
                        f"index {list(wanted)} is out of range"
                    )
            if len(wanted) // chunk > _PIECES:
                raise DataError(
                    f"{self.name}: {len(wanted)} entries of {info.name!r} on axis {axis} in chunks "
                    f"of {chunk} are more than {_PIECES} chunks for one read. Read it in parts; if "
                    "it is not that large, its metadata are damaged."
                )
            found.append(wanted)
        return found

    def _place_chunk(
        self,
        info: ArrayInfo,
        raw: bytes | memoryview | None,
        inner: Any,
        outer: Any,
        out: np.ndarray[Any, Any],
    ) -> None:
        if raw is None:
            # without a fill value zarr-python leaves out chunks of zeros and reads them as such
            out[outer] = np.zeros((), info.dtype)[()] if info.fill is None else info.fill
            return
        target = out[outer] if all(isinstance(o, slice) for o in outer) else None
        whole = all(
            isinstance(i, slice) and i.start == 0 and i.stop == c
            for i, c in zip(inner, info.chunks, strict=True)
        )
        if (
            target is not None and whole and target.flags.c_contiguous and info.order == "C"
            and target.dtype == info.dtype and not info.filters
            and (info.compressor or {}).get("id") == "blosc"
        ):  # fmt: skip
            check_blosc(raw, info.chunk_bytes)
            codec = require("numcodecs", "geo").get_codec(dict(info.compressor or {}))
            codec.decode(raw, out=target)
            return
        out[outer] = decoded(info, raw)[inner]

    @cached_property
    def _is_remote(self) -> bool:
        return isinstance(self.store, FolderStore) and is_url(self.store.name)

    @cached_property
    def _v3_members(self) -> dict[str, Any]:
        return v3_members(self._v3, self.name)

    @cached_property
    def _v3(self) -> Any:
        return open_v3(self.store, self.name)

    def _read_v3(
        self, info: ArrayInfo, selection: Selection, out: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        index = tuple(s if isinstance(s, slice) else list(s) for s in selection)
        array = self._v3_members[info.name]
        is_plain = all(isinstance(s, slice) for s in index)
        with parsing(f"{self.name}: array {info.name!r} does not decode; it"):
            out[...] = (array if is_plain else array.oindex)[index if index else ...]
        return out


_METADATA = (".zarray", ".zattrs", ".zgroup")
_PIECES = 2**20  # chunks along one axis of one read
_READ_LIMIT = 2**33  # bytes of one read into new memory
_DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
_CUBES = HandlePool(limit=64)


def open_cube(source: str | bytes, name: str | None = None, options: Options | None = None) -> Cube:
    """Open a zarr group: a zip, a folder, an fsspec URL of either, or a zip's bytes.

    Cubes opened by path stay open in this process (least recently used ones are dropped).

    Raises:
        DataError: Nothing lies there, or it is neither a zip nor a zarr folder.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Cube(ZipFileStore(source, name or "<bytes>"), name or "<bytes>")
    path = str(source)

    def opener() -> Cube:
        if is_folder(path, options):
            return Cube(FolderStore(path, options), path, options)
        if is_file(path, options):
            return Cube(ZipFileStore(open_file(path, options), path), path)
        raise DataError(f"{path}: no such file or folder")

    cube: Cube = _CUBES.get(stamp(path), opener)
    return cube


def _pieces(wanted: Sequence[int], chunk: int) -> list[Any]:
    """Group indices by chunk: (chunk number, index inside the chunk, index in the output)."""
    groups: dict[int, tuple[list[int], list[int]]] = {}
    if isinstance(wanted, range):
        runs = []
        at = wanted.start
        while at < wanted.stop:
            number = at // chunk
            end = min(wanted.stop, (number + 1) * chunk)
            low = number * chunk
            outer = slice(at - wanted.start, end - wanted.start)
            runs.append((number, slice(at - low, end - low), outer))
            at = end
        return runs
    for position, index in enumerate(wanted):
        inner, outer_list = groups.setdefault(index // chunk, ([], []))
        inner.append(index % chunk)
        outer_list.append(position)
    return [(n, _as_slice(i), _as_slice(o)) for n, (i, o) in groups.items()]


def _as_slice(indices: list[int]) -> slice | list[int]:
    low = indices[0]
    run = indices == list(range(low, low + len(indices)))
    return slice(low, low + len(indices)) if run else indices


def _v3_arrays(members: Mapping[str, Any]) -> dict[str, ArrayInfo]:
    found = {}
    for name in sorted(name for name, item in members.items() if hasattr(item, "shape")):
        array = members[name]
        meta = array.metadata
        names = ", ".join(type(c).__name__ for c in meta.codecs)
        dims = tuple(meta.dimension_names or array.attrs.get("_ARRAY_DIMENSIONS", ()))
        dtype = np.dtype(array.dtype)
        stored = chunk_format(meta.to_dict()) if dtype.kind in "biuf" else None
        found[name] = ArrayInfo(
            name=name, shape=sizes_of(list(array.shape), 0), chunks=sizes_of(list(array.chunks), 1),
            dtype=dtype if stored is None else dtype.newbyteorder(stored.byte_order), dims=dims,
            attrs=dict(array.attrs), codec=names, fill=array.fill_value,
            compressor=None if stored is None else stored.compressor, stored=stored,
        )  # fmt: skip
    return found
