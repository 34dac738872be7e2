"""What the files of SSL4EO-S12 hold, each opened once until it changes.

opened = OpenedFiles({"s1": ".../S1GRD", "s2": ".../S2L2A"}, "B")
opened.fill({"s1": names, "s2": names}, "s1")   # looks them up in the cache, opens what is new
opened.members(path)                # where the locations of a tar lie
opened.shape(path)                  # locations, dates, rows, columns
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

from domainssl.errors import DataError, UnreadableError
from domainssl.io.raster.zarr import Cube
from domainssl.io.storage.archives import Member, ZipFileStore, tar_index
from domainssl.io.storage.paths import fetch_ranges, is_url, join
from domainssl.io.storage.scan_index import ScanIndex, Seen

__all__ = ["OpenedFiles", "tile_facts"]

_THREADS = 8  # that open files
_TRIES = 4  # locations of a tar that are opened for the size of all


class OpenedFiles:
    """The files of some products.

    Args:
        folders: Folder of each modality key.
        release: `A`, zips of many locations, or a release of tars.
        options: fsspec options of a URL; what lies behind one is not remembered.
    """

    def __init__(
        self, folders: Mapping[str, str], release: str, options: Mapping[str, Any] | None = None
    ) -> None:
        self.options = dict(options or {})
        self._folders, self._is_zip = folders, release == "A"
        self._indexes: dict[str, ScanIndex] = {}

    def fill(self, names: Mapping[str, Iterable[str]], shapes_of: str | None) -> None:
        """Look up many files, and open those that are not known; errors are left to the others.

        Args:
            names: Of files, by modality key.
            shapes_of: The modality whose files are asked for their shape.
        """
        for modality, folder in self._folders.items():
            has_shape = modality == shapes_of
            if is_url(folder) or folder in self._indexes or (self._is_zip and not has_shape):
                continue
            request = {
                "folder": os.path.abspath(folder), "zips": self._is_zip, "shapes": has_shape,
            }  # fmt: skip
            index = self._indexes[folder] = ScanIndex("ssl4eo", request)
            look = partial(_look, is_zip=self._is_zip, has_shape=has_shape)
            paths = (join(folder, name) for name in sorted(names[modality]))
            index.fill({path: path for path in paths}, look)

    def members(self, path: str) -> list[Member]:
        """Return where the locations of a tar lie.

        Raises:
            DataError: It is damaged.
        """
        known = self._known(path)
        if known is None:
            return _members(path, self.options)
        return [Member(str(key), int(at), int(size)) for key, at, size in json.loads(known[1])]

    def shape(self, path: str) -> tuple[int, int, int, int]:
        """Return locations, dates, rows and columns; of a tar, those of its first good location.

        Raises:
            DataError: The file is damaged.
        """
        known = self._known(path)
        stated = json.loads(known[0]) if known is not None else None
        count, dates, rows, columns = stated or _shape(path, self._is_zip, self.options)
        return count, dates, rows, columns

    def _known(self, path: str) -> tuple[str, str] | None:
        index = self._indexes.get(os.path.dirname(path))
        return None if index is None else index.get(path)


def _look(paths: Sequence[str], *, is_zip: bool, has_shape: bool) -> list[Seen | None]:
    """Open files; None for those that cannot be read: who asks for them says why."""

    def one(path: str) -> Seen | None:
        try:
            members = [] if is_zip else _members(path, {})
            shape = _shape(path, is_zip, {}) if has_shape else None
        except DataError:
            return None
        return Seen(json.dumps(shape), json.dumps(members), ((0, ""),))

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, paths))


def _members(path: str, options: Mapping[str, Any]) -> list[Member]:
    every = tar_index(path, options)
    found = [
        entry
        for entry in every
        # `._` files are what tar of macOS adds
        if entry.key.endswith(".zarr.zip") and not os.path.basename(entry.key).startswith(".")
    ]
    if not found:
        there = ", ".join(repr(entry.key) for entry in every[:3]) or "nothing"
        raise UnreadableError(
            f"{path}: holds no .zarr.zip member, but {there}. Expected one <key>.zarr.zip per "
            "location; get the file again."
        )
    return found


def _shape(path: str, is_zip: bool, options: Mapping[str, Any]) -> tuple[int, int, int, int]:
    if is_zip:
        with closing(ZipFileStore(path, path, options)) as store:
            count, dates, _, rows, columns = tile_facts(Cube(store, path), 5)
        return count, dates, rows, columns
    problem: DataError | None = None
    for entry in _members(path, options)[:_TRIES]:
        name = f"{path}:{entry.key}"
        try:
            [raw] = fetch_ranges(path, [(entry.offset, entry.size)], options)
            dates, _, rows, columns = tile_facts(Cube(ZipFileStore(raw, name), name), 4)
        except UnreadableError as error:  # reading the location names it
            problem = problem or error
        else:
            return 1, dates, rows, columns
    assert problem is not None
    raise problem


def tile_facts(cube: Cube, dims: int) -> tuple[int, ...]:
    """Return the shape of the pixels of a file.

    Raises:
        DataError: There are more or fewer dimensions than `dims`.
    """
    shape = cube.info("bands").shape
    if len(shape) != dims:
        raise DataError(f"{cube.name}: array 'bands' has shape {shape}, expected {dims} dimensions")
    return shape
