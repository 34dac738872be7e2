"""Prepared exams on disk, in two forms, of which boxes are read without the rest.

`memmap`: one `.npy` per array, mapped into memory; all processes of a machine share its pages.
`zarr`: one sharded Zarr v3 group; a third to a half of the space, and time to decode.

An entry is a folder with `entry.json` (geometry, limits, facts; type, shape, size and checksums of
the rest). What does not agree with it is an error, never data.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from domainssl.errors import DataError, parsing, require
from domainssl.files import open_regular, read_json, sync_folder
from domainssl.io.raster.zarr3 import open_v3, v3_members
from domainssl.io.storage.archives import FolderStore
from domainssl.io.storage.handles import HandlePool
from domainssl.io.volume.prepared import Prepared, check_box, shifted

__all__ = ["FORMAT", "TIERS", "Packing", "Stored", "Tier", "forget", "write_entry"]

Array = np.ndarray[Any, Any]
Tier = Literal["memmap", "zarr"]
TIERS: tuple[Tier, ...] = ("memmap", "zarr")
FORMAT = "domainssl prepared exam 2"
_ENTRY, _MASK = "entry.json", "mask"
_ZARR = "arrays"  # folder of the group
_SAMPLES, _SAMPLE = 16, 4096  # blocks of a file that opening compares, and their bytes
_PIECE = 2**24  # bytes written or read at a time
_BLOCK = 2**20  # bytes of a mapped file with a checksum of their own
_open = HandlePool(128)  # mapped arrays and Zarr arrays of this process
_compared: dict[tuple[str, ...], set[int]] = {}  # blocks of mapped files that this process has seen
_ADVICE = "Delete the folder; it is built again from the scans."


@dataclass(frozen=True)
class Packing:
    """How the tier `zarr` cuts and packs arrays; measured with `bench volumes`.

    Attributes:
        chunk: Voxels along each axis of what is decoded at once.
        shard: Voxels along each axis of a file.
        codec: Compressor inside Blosc.
        level: Its level.
    """

    chunk: int = 64
    shard: int = 256
    codec: Literal["zstd", "lz4"] = "zstd"
    level: int = 3


@dataclass(frozen=True)
class Stored:
    """An entry that was opened: facts of the exam, and boxes of its arrays on demand.

    It holds no handle, so it can be pickled and forked; arrays are opened by the process that
    reads, and stay open in a pool.

    Attributes:
        folder: The entry.
        entry: Content of `entry.json`.
    """

    folder: Path
    entry: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, tag: str) -> Stored:
        """Open an entry and check it: names, sizes, headers and some blocks of every file.

        Args:
            folder: The entry.
            tag: What `write_entry` was given; says which exam and preparation it is.

        Raises:
            FileNotFoundError: There is no entry.
            DataError: It is damaged, or of another exam, preparation or version.
        """
        path = folder / _ENTRY
        if not path.is_file():
            raise FileNotFoundError(path)
        content = read_json(path)
        with parsing(f"{path}: the entry", advice=_ADVICE):
            if content["check"] != _digest(content):
                raise ValueError("its checksum differs")
            if content["format"] != FORMAT or content["tag"] != tag:
                raise ValueError("it is of another exam, preparation or version")
            for name, facts in content["files"].items():
                _check_file(folder / name, facts)
        found = cls(folder, content)
        if content["tier"] == "zarr":
            found._group()
        else:
            for name in content["arrays"]:
                found._mapped(name)
        return found

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along X, Y, Z."""
        x, y, z = self.entry["shape"]
        return x, y, z

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that the exam has."""
        return tuple(self.entry["modalities"])

    @cached_property
    def affine(self) -> Array:
        """Voxel to RAS in mm, (4, 4)."""
        return np.array(self.entry["affine"], np.float64)

    @cached_property
    def limits(self) -> dict[str, Array]:
        """Intensity limits (C, 2) of the whole exam, by modality."""
        return {name: np.array(v, np.float32) for name, v in self.entry["limits"].items()}

    @property
    def facts(self) -> Mapping[str, Any]:
        """Plain data kept with the exam."""
        found: Mapping[str, Any] = self.entry["facts"]
        return found

    @property
    def has_mask(self) -> bool:
        """Whether every voxel has a class."""
        return _MASK in self.entry["arrays"]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays, unpacked."""
        arrays = self.entry["arrays"].values()
        return sum(int(np.prod(a["shape"])) * np.dtype(a["dtype"]).itemsize for a in arrays)

    def crop(self, start: Sequence[int], size: Sequence[int]) -> Prepared:
        """Read a box and nothing else.

        Args:
            start: First voxel along X, Y, Z.
            size: Voxels along X, Y, Z.

        Returns:
            Arrays of their own, not views of the file; `valid` has every modality.

        Raises:
            DataError: The box leaves the exam, or the entry is damaged.
        """
        box = check_box(start, size, self.shape)
        valid: dict[str, Array] = {}
        for name in self.modalities:
            array = f"{name}.valid"
            is_stored = array in self.entry["arrays"]
            valid[name] = (
                self._read(array, box) if is_stored else np.broadcast_to(True, tuple(size))
            )
        return Prepared(
            values={n: self._read(f"{n}.values", (slice(None), *box)) for n in self.modalities},
            valid=valid,
            limits=dict(self.limits),
            mask=self._read(_MASK, box) if self.has_mask else None,
            affine=shifted(self.affine, start),
            facts=self.facts,
        )

    def whole(self) -> Prepared:
        """Read everything."""
        return self.crop((0, 0, 0), self.shape)

    def _read(self, name: str, box: tuple[slice, ...]) -> Array:
        array = self._array(name)
        where = f"{self.folder}: {name}"
        if self.entry["tier"] == "zarr":
            with parsing(f"{where}: a chunk", advice=_ADVICE):
                return np.asarray(array[box])
        if array.base.size() < array.offset + array.nbytes:  # a page beyond the end kills a process
            raise DataError(f"{where}: the file was cut short while it was in use. {_ADVICE}")
        part = np.array(array[box])
        self._compare(name, array, box)
        return part

    def _compare(self, name: str, array: Any, box: tuple[slice, ...]) -> None:
        """Compare the blocks of a mapped file that a box lies in, each once per process.

        Raises:
            DataError: One of them is not what was written.
        """
        file = f"{name}.npy"
        sums = self.entry["blocks"][file]
        seen = _compared.setdefault((str(self.folder), str(self.entry["check"]), name), set())
        wanted = _blocks_of(array.shape, array.itemsize, array.offset, box) - seen
        if not wanted:
            return
        with open_regular(self.folder / file) as handle:
            for block in sorted(wanted):
                handle.seek(block * _BLOCK)
                if zlib.crc32(handle.read(_BLOCK)) != sums[block]:
                    raise DataError(
                        f"{self.folder}: the content of {file} differs from what was written. "
                        f"{_ADVICE}"
                    )
                seen.add(block)

    def _array(self, name: str) -> Any:
        """Return an array of this process, opened on its first use."""
        key = (str(self.folder), self.entry["check"])
        if self.entry["tier"] == "zarr":
            return _open.get(key, self._group)[name]
        return _open.get((*key, name), lambda: self._mapped(name))

    def _mapped(self, name: str) -> Any:
        with parsing(f"{self.folder}: {name}", advice=_ADVICE):  # no objects, pickles or archives
            array = np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="r")
            self._check(name, array)
        return array

    def _group(self) -> dict[str, Any]:
        where = f"{self.folder}: the arrays"
        with parsing(where, advice=_ADVICE):
            found = v3_members(open_v3(FolderStore(self.folder / _ZARR), where), where)
            for name in self.entry["arrays"]:
                self._check(name, found[name])
        return found

    def _check(self, name: str, array: Any) -> None:
        facts = self.entry["arrays"][name]
        found = [str(np.dtype(array.dtype)), list(array.shape)]
        if found != [facts["dtype"], facts["shape"]]:
            raise ValueError(f"{name} holds {found}, the entry says {list(facts.values())}")


def write_entry(
    folder: Path, exam: Prepared, tag: str, tier: Tier, packing: Packing | None = None
) -> None:
    """Fill an empty folder; all is on the disk when this returns.

    Args:
        folder: The folder, which has a temporary name.
        exam: The exam.
        tag: Names exam and preparation; asked for again when the entry is opened.
        tier: Form of the arrays.
        packing: Chunks and codec of the tier `zarr`; the measured ones by default.

    Raises:
        OSError: It cannot be written.
    """
    arrays: dict[str, Array] = {f"{name}.values": a for name, a in exam.values.items()}
    arrays |= {f"{name}.valid": a for name, a in exam.valid.items() if not a.all()}
    if exam.mask is not None:
        arrays[_MASK] = exam.mask
    if tier == "zarr":
        _write_zarr(folder, arrays, packing or Packing())
    else:
        _write_npy(folder, arrays)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "format": FORMAT,
        "tag": tag,
        "tier": tier,
        "shape": list(exam.shape),
        "modalities": list(exam.values),
        "affine": exam.affine.astype(float).tolist(),
        "limits": {name: a.astype(float).tolist() for name, a in exam.limits.items()},
        "facts": dict(exam.facts),
        "arrays": {
            n: {"dtype": str(a.dtype.newbyteorder("=")), "shape": list(a.shape)}
            for n, a in arrays.items()
        },
        "files": {str(p.relative_to(folder).as_posix()): _facts_of(p) for p in files},
        "blocks": {p.name: _block_sums(p) for p in files} if tier == "memmap" else {},
    }
    content = json.loads(json.dumps(content, allow_nan=False))
    with (folder / _ENTRY).open("w", encoding="utf-8") as file:
        json.dump({**content, "check": _digest(content)}, file)
        file.flush()
        os.fsync(file.fileno())
    for path in files:
        _to_disk(path)
    for inner in {folder, *(path.parent for path in files)}:
        sync_folder(inner)


def _write_npy(folder: Path, arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        with (folder / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, np.lib.format.header_data_from_array_1_0(array)
            )
            content: Any = array.reshape(-1).view(np.uint8)  # NumPy's way hides the system's reason
            for at in range(0, len(content), _PIECE):
                file.write(content[at : at + _PIECE])


def _write_zarr(folder: Path, arrays: Mapping[str, Array], packing: Packing) -> None:
    zarr: Any = require("zarr", "medical")
    from zarr.codecs import BloscCodec, Crc32cCodec

    group = zarr.open_group(str(folder / _ZARR), mode="w", zarr_format=3)
    for name, array in arrays.items():
        lead, grid = (1,) * (array.ndim - 3), array.shape[-3:]
        chunks = [min(packing.chunk, n) for n in grid]
        shards = [
            min(packing.shard // c, -(-n // c)) * c for c, n in zip(chunks, grid, strict=True)
        ]
        packed = BloscCodec(
            cname=packing.codec,
            clevel=packing.level,
            shuffle="bitshuffle",
            typesize=array.dtype.itemsize,
        )
        stored = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(*lead, *chunks),
            shards=(*lead, *shards),
            compressors=[packed, Crc32cCodec()],
            fill_value=0,
        )
        stored[...] = array


def _digest(content: Mapping[str, Any]) -> int:
    rest = {name: value for name, value in content.items() if name != "check"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _facts_of(path: Path) -> list[int]:
    """Return the size of a file and the checksum of some of its blocks."""
    size = path.stat().st_size
    return [size, _sample(path, size)]


def _block_sums(path: Path) -> list[int]:
    """Return the checksum of every block of a file."""
    with open_regular(path) as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(_BLOCK), b"")]


def _blocks_of(shape: Sequence[int], item: int, offset: int, box: tuple[slice, ...]) -> set[int]:
    """Return the blocks of a file that a box lies in.

    Args:
        shape: Of the array, in C order; the last two axes of a box are taken as a whole run.
        item: Bytes of a value.
        offset: Bytes before the first value.
        box: Slices with ends along every axis but those that are complete.
    """
    ends = [s.indices(n)[:2] for s, n in zip(box, shape, strict=True)]
    row = shape[-1] * item
    low = ends[-2][0] * row + ends[-1][0] * item
    high = (ends[-2][1] - 1) * row + ends[-1][1] * item  # after the last value
    lead = np.indices([b - a for a, b in ends[:-2]]).reshape(len(ends) - 2, -1)
    starts = np.array([a for a, _ in ends[:-2]]).reshape(-1, 1)
    planes = np.ravel_multi_index(tuple(lead + starts), tuple(shape[:-2])) * shape[-2] * row
    found: set[int] = set()
    for plane in planes.tolist():
        first, last = offset + plane + low, offset + plane + high - 1
        found.update(range(first // _BLOCK, last // _BLOCK + 1))
    return found


def _check_file(path: Path, facts: Sequence[int]) -> None:
    size, sample = facts
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"{path.name} has {found} bytes, expected {size}")
    if _sample(path, size) != sample:
        raise ValueError(f"the content of {path.name} differs from what was written")


def _sample(path: Path, size: int) -> int:
    found = 0
    with open_regular(path) as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * i // (_SAMPLES - 1))
            found = zlib.crc32(file.read(_SAMPLE), found)
            if size <= _SAMPLE:
                break
    return found


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget() -> None:
    """Close what this process has open: an entry was replaced."""
    _open.clear()
    _compared.clear()
