"""Zarr hierarchies read by whole chunks: format 2 decoded here, format 3 through zarr-python.

`Cube.read` asks the codec to write each chunk straight into the array that is returned wherever
the chunk's place in it is contiguous.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from domainssl.errors import DataError, nearest, require
from domainssl.io.storage.archives import FolderStore, Store, ZipFileStore
from domainssl.io.storage.handles import HandlePool
from domainssl.io.storage.paths import Options, is_file, is_folder, is_url, open_file, stamp

__all__ = ["ArrayInfo", "Cube", "open_cube"]

Selection = Sequence[slice | Sequence[int]]


@dataclass(frozen=True)
class ArrayInfo:
    """What a zarr array's metadata say."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    dims: tuple[str, ...]
    attrs: Mapping[str, Any]
    codec: str
    fill: Any
    order: str = "C"
    separator: str = "."
    compressor: Mapping[str, Any] | None = None
    filters: tuple[Mapping[str, Any], ...] = ()

    @property
    def chunk_bytes(self) -> int:
        """Size of one decoded chunk."""
        return math.prod(self.chunks) * self.dtype.itemsize


class Cube:
    """One zarr group.

    Args:
        store: Where its bytes are.
        name: How errors call it, usually the path.
        options: fsspec options for a URL.
    """

    def __init__(self, store: Store, name: str, options: Options | None = None) -> None:
        self.store, self.name, self.options = store, name, dict(options or {})

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        raw = self.store.get(".zmetadata")
        if raw is not None:
            return dict(self._json(".zmetadata", raw)["metadata"])
        keys = [k for k in self.store.names() if k.rsplit("/", 1)[-1] in _METADATA]
        return {key: self._json(key, self.store.get(key) or b"") for key in keys}

    def _json(self, key: str, raw: bytes) -> Any:
        try:
            return json.loads(raw)
        except ValueError as error:
            raise DataError(f"{self.name}: metadata {key!r} is not JSON ({error})") from error

    @cached_property
    def format(self) -> int:
        """The zarr format, 2 or 3."""
        if self.store.get("zarr.json") is not None:
            return 3
        if not any(key.endswith((".zarray", ".zgroup")) for key in self._metadata):
            raise DataError(f"{self.name}: no zarr hierarchy (neither .zgroup nor zarr.json)")
        return 2

    @cached_property
    def arrays(self) -> dict[str, ArrayInfo]:
        """The arrays by name."""
        if self.format == 3:
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
        codecs = [meta.get("compressor"), *(meta.get("filters") or ())]
        if any(isinstance(c, dict) and c.get("id") == "pickle" for c in codecs):  # may run code
            raise DataError(f"{self.name}: array {name!r} is pickled, which is refused")
        try:
            dtype = np.dtype(
                [tuple(d) for d in meta["dtype"]]
                if isinstance(meta["dtype"], list)
                else meta["dtype"]
            )
            compressor = meta["compressor"]
            return ArrayInfo(
                name,
                tuple(meta["shape"]),
                tuple(meta["chunks"]),
                dtype,
                tuple(attrs.get("_ARRAY_DIMENSIONS", ())),
                attrs,
                _codec_name(compressor),
                _fill(meta.get("fill_value"), dtype),
                meta.get("order", "C"),
                meta.get("dimension_separator", "."),
                compressor,
                tuple(meta.get("filters") or ()),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.name}: metadata of array {name!r} cannot be understood ({error!r})"
            ) from error

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
        axes = self._axes(info, selection or ())
        shape = tuple(n for n, _ in axes)
        if out is None:
            out = np.empty(shape, info.dtype.newbyteorder("="))
        elif out.shape != shape:
            raise DataError(f"{self.name}: {name!r} read into {out.shape}, expected {shape}")
        if self.format == 3:
            return self._read_v3(info, selection or (), out)
        for pieces in itertools.product(*(pieces for _, pieces in axes)):
            number = tuple(piece[0] for piece in pieces)
            inner = tuple(piece[1] for piece in pieces)
            outer = tuple(piece[2] for piece in pieces)
            self._place_chunk(info, number, inner, outer, out)
        return out

    def read_text(self, name: str) -> list[str]:
        """Read an array of names, whichever of zarr's text types it has."""
        if self.format == 3:
            return [str(value) for value in np.asarray(self._v3_members[name][...]).reshape(-1)]
        return [
            value.decode() if isinstance(value, bytes) else str(value)
            for value in self.read(name).reshape(-1)
        ]

    def decoded_bytes(self, name: str, selection: Selection | None = None) -> int:
        """Return how many bytes the chunks hold that a read of `selection` decodes."""
        info = self.info(name)
        touched = (len(pieces) for _, pieces in self._axes(info, selection or ()))
        return math.prod(touched) * info.chunk_bytes

    def missing_chunks(self, name: str) -> int:
        """Return how many chunks of an array are not stored, so that they read as its fill."""
        info = self.info(name)
        total = math.prod(-(-s // c) for s, c in zip(info.shape, info.chunks, strict=True))
        prefix = f"{name}/"
        there = [k for k in self.store.names() if k.startswith(prefix)]
        return total - len({k for k in there if k[len(prefix) :][:1].isdigit()})

    def _axes(self, info: ArrayInfo, selection: Selection) -> list[tuple[int, list[Any]]]:
        if len(selection) > len(info.shape):
            raise DataError(
                f"{self.name}: {len(selection)} indices for {info.name!r} of shape {info.shape}"
            )
        chosen = [*selection, *[slice(None)] * (len(info.shape) - len(selection))]
        axes = []
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
            axes.append((len(wanted), _pieces(wanted, chunk)))
        return axes

    def _place_chunk(
        self, info: ArrayInfo, number: Any, inner: Any, outer: Any, out: np.ndarray[Any, Any]
    ) -> None:
        key = f"{info.name}/" + info.separator.join(map(str, number or (0,)))
        raw = getattr(self.store, "borrow", self.store.get)(key)
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
            and target.dtype == info.dtype and not info.filters and info.codec.startswith("blosc")
        ):  # fmt: skip
            self._decode(info, key, raw, target)
            return
        out[outer] = self._decode(info, key, raw, None)[inner]

    def _decode(
        self,
        info: ArrayInfo,
        key: str,
        raw: bytes | memoryview,
        target: np.ndarray[Any, Any] | None,
    ) -> np.ndarray[Any, Any]:
        numcodecs = require("numcodecs", "geo")
        try:
            if info.codec.startswith("blosc"):
                _check_blosc(raw, info.chunk_bytes if not info.filters else None)
            data: Any = raw
            if info.compressor is not None:
                codec = numcodecs.get_codec(dict(info.compressor))
                data = codec.decode(raw) if target is None else codec.decode(raw, out=target)
            if target is not None:
                return target
            for config in reversed(info.filters):
                data = numcodecs.get_codec(dict(config)).decode(data)
            if isinstance(data, np.ndarray) and info.dtype.kind == "O":
                flat: np.ndarray[Any, Any] = data.reshape(-1)
            else:
                flat = np.frombuffer(data, info.dtype)
            if info.order == "F":
                return flat.reshape(info.chunks[::-1]).T
            return flat.reshape(info.chunks)
        except (ValueError, RuntimeError, TypeError, OSError, EOFError, struct.error) as error:
            raise DataError(
                f"{self.name}: array {info.name!r}, chunk {key!r} does not decode "
                f"({error or type(error).__name__}). The file is damaged; get it again."
            ) from error

    @cached_property
    def _v3_members(self) -> dict[str, Any]:
        """Everything in the store, opened once: opening an array anew asks for its metadata."""
        return dict(self._v3.members(max_depth=None))

    @cached_property
    def _v3(self) -> Any:
        zarr = require("zarr", "geo")
        from zarr.core.buffer import default_buffer_prototype
        from zarr.storage import FsspecStore, LocalStore, MemoryStore

        if isinstance(self.store, FolderStore):  # asks for the byte ranges of inner chunks alone
            found: Any = LocalStore(self.name)
            if is_url(self.name):
                theirs = {k: v for k, v in self.options.items() if k != "retry"}  # ours
                found = FsspecStore.from_url(self.name, read_only=True, storage_options=theirs)
            return zarr.open_group(found, mode="r", zarr_format=3)
        make = default_buffer_prototype().buffer.from_bytes
        content = {key: make(self.store.get(key) or b"") for key in self.store.names()}
        return zarr.open_group(MemoryStore(content), mode="r", zarr_format=3)

    def _read_v3(
        self, info: ArrayInfo, selection: Selection, out: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        index = tuple(s if isinstance(s, slice) else list(s) for s in selection)
        array = self._v3_members[info.name]
        is_plain = all(isinstance(s, slice) for s in index)
        try:
            out[...] = (array if is_plain else array.oindex)[index if index else ...]
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise DataError(
                f"{self.name}: array {info.name!r} does not decode ({error})"
            ) from error
        return out


_METADATA = (".zarray", ".zattrs", ".zgroup")
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


def _check_blosc(raw: bytes | memoryview, expected: int | None) -> None:
    if len(raw) < 16:
        raise ValueError("shorter than a Blosc header")
    size, _, packed = struct.unpack("<III", raw[4:16])
    if packed != len(raw):
        raise ValueError(f"Blosc header says {packed} bytes, there are {len(raw)}")
    if expected is not None and size != expected:
        raise ValueError(f"Blosc header says {size} decoded bytes, the chunk needs {expected}")


def _codec_name(compressor: Mapping[str, Any] | None) -> str:
    if compressor is None:
        return "none"
    name = str(compressor["id"])
    if name == "blosc":
        level, shuffle = compressor.get("clevel"), compressor.get("shuffle")
        return f"blosc({compressor.get('cname')}, {level}, shuffle {shuffle})"
    return name


def _fill(value: Any, dtype: np.dtype[Any]) -> Any:
    if value is None:
        return None
    if dtype.kind in "SV":
        padded = base64.standard_b64decode(value).ljust(dtype.itemsize, b"\0")
        return np.frombuffer(padded, dtype)[0]
    if dtype.kind == "U":
        return str(value)
    if dtype.kind == "O":
        return value
    return np.array(value if not isinstance(value, str) else float(value)).astype(dtype)[()]


def _v3_arrays(members: Mapping[str, Any]) -> dict[str, ArrayInfo]:
    found = {}
    for name in sorted(name for name, item in members.items() if hasattr(item, "shape")):
        array = members[name]
        meta = array.metadata
        names = ", ".join(type(c).__name__ for c in meta.codecs)
        dims = tuple(meta.dimension_names or array.attrs.get("_ARRAY_DIMENSIONS", ()))
        found[name] = ArrayInfo(
            name, tuple(array.shape), tuple(array.chunks), np.dtype(array.dtype), dims,
            dict(array.attrs), names, array.fill_value,
        )  # fmt: skip
    return found
