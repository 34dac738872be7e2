"""What the files of a layer say, whatever their format, remembered in the cache between runs.

files = LayerFiles(root, options)
files.fill({sought: found, ...})        # opens what is new, in processes where it pays
files.get(sought, found[0])             # a LayerFile; nothing is opened
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, BinaryIO

import numpy as np

from domainssl.errors import DataError, setting
from domainssl.io.raster.bands import describe_zarr, is_store
from domainssl.io.raster.geotiff import GEOTIFF_ENDINGS, describe_geotiff
from domainssl.io.raster.grid import Grid, said_crs
from domainssl.io.raster.layer import LayerFile, StoredBand
from domainssl.io.raster.safe import describe_safe, is_safe
from domainssl.io.raster.sites import Found
from domainssl.io.raster.zarr import Cube
from domainssl.io.storage.archives import FolderStore
from domainssl.io.storage.paths import Options, is_url
from domainssl.io.storage.scan_index import Rest, ScanIndex, Seen

__all__ = ["LayerFiles", "Sought", "describe"]

_log = logging.getLogger(__name__)
_HERE = logging.getLogger("domainssl.io.raster")
# what GDAL looks for beside a GeoTIFF: after its name, and in place of its ending
_BESIDE = (".aux.xml", ".msk", ".ovr", ".msk.ovr", ".ovr.msk", ".msk.msk", ".ovr.ovr")
_INSTEAD = (".tfw", ".TFW", ".tifw", ".tiffw", ".wld", ".WLD")


@dataclass(frozen=True, kw_only=True)
class Sought:
    """What is asked of every file of a layer.

    Attributes:
        bands: Names of bands.
        step_hint: Pixel size wanted, in CRS units; see `describe_zarr`.
        mask: Name of a mask array.
        crs: Used where a file does not say.
    """

    bands: tuple[str, ...]
    step_hint: float | None = None
    mask: str | None = None
    crs: str | None = None


def describe(
    sought: Sought, found: Found, options: Options | None = None, cube: Cube | None = None
) -> LayerFile:
    """Open a file and find the bands of a layer in it.

    Args:
        sought: What is asked.
        found: The file.
        options: fsspec options of a URL.
        cube: The store, where it is open.

    Raises:
        DataError: A band is missing, or the file does not say where or what it is.
    """
    file = _described(sought, found, options, cube)
    said = said_crs(sought.crs)
    if said not in (None, file.crs):
        _log.warning(
            "%s: states %s, which counts; %s of %s is for files that state none",
            found.path, file.crs[:60], setting("crs"), said,
        )  # fmt: skip
    return file


def _described(
    sought: Sought, found: Found, options: Options | None, cube: Cube | None
) -> LayerFile:
    if is_safe(found.path):
        return describe_safe(found.path, sought.bands, mask=sought.mask, options=options)
    if found.path.lower().endswith(GEOTIFF_ENDINGS):
        if sought.mask is not None:
            raise DataError(
                f"{found.path}: the mask {sought.mask!r} is asked for, as recipes/cube_croma.yaml "
                "does, but masks are read from zarr stores only. Set data.init_args.modalities."
                "<name>.mask: null, or leave out --mask of embed; nodata and masks of the GeoTIFF "
                "itself count all the same."
            )
        return describe_geotiff(found.path, sought.bands, crs=sought.crs, date=found.date)
    return describe_zarr(
        found.path,
        sought.bands,
        group=found.group,
        step_hint=sought.step_hint,
        mask=sought.mask,
        crs=sought.crs,
        date=found.date,
        options=options,
        cube=cube,
    )


class LayerFiles:
    """The files of the layers below a root, each opened once until it changes.

    Args:
        root: Folder or URL; what lies behind a URL is not remembered.
        options: fsspec options of a URL.
    """

    def __init__(self, root: str, options: Options | None = None) -> None:
        self._root, self._options = root, options
        self._indexes: dict[Sought, ScanIndex] = {}

    def fill(self, wanted: Mapping[Sought, Sequence[Found]], jobs: int | None = None) -> None:
        """Look up many files, and open those that are not known; errors are left to `get`.

        Args:
            wanted: The files, by what is asked of them.
            jobs: Processes; 0 opens in this one, None takes one per core where it pays.
        """
        for sought, files in wanted.items():
            local = {_key(found): found.path for found in files if not is_url(found.path)}
            if not local:
                continue
            request = {"root": os.path.abspath(self._root), **asdict(sought)}
            index = self._indexes.setdefault(sought, ScanIndex("cubes", request))
            index.fill(local, partial(_look, sought), jobs)
            if index.opened:
                _log.info("%s: opened %d of %d files", self._root, index.opened, len(local))

    def get(self, sought: Sought, found: Found) -> LayerFile:
        """Return what a file says.

        Raises:
            DataError: As `describe`.
        """
        index = self._indexes.get(sought)
        known = None if index is None else index.get(_key(found))
        if known is None:
            return describe(sought, found, self._options)
        return _from_texts(found.path, *known, self._options)


def _key(found: Found) -> str:
    return "\n".join((found.path, found.group, found.date))


def _look(sought: Sought, keys: Sequence[str]) -> list[Seen | None]:
    """Open files by their keys; None for those that cannot be read: `get` says why."""
    out: list[Seen | None] = []
    for key in keys:
        path, group, date = key.rsplit("\n", 2)
        found = Found(path, date, group)
        with _listening() as heard:
            try:
                file, rests = _watched(sought, found)
            except DataError:
                out.append(None)
                continue
        out.append(None if rests is None else Seen(*_to_texts(file, heard), rests))
    return out


def _watched(sought: Sought, found: Found) -> tuple[LayerFile, tuple[Rest, ...] | None]:
    """Describe a file, and return what that rests on; None where it cannot be told."""
    path = found.path
    if is_safe(path) and os.path.isdir(path):
        return describe(sought, found), None
    if path.lower().endswith(GEOTIFF_ENDINGS):
        ending = len(os.path.splitext(path)[1])
        beside = [(0, end) for end in ("", *_BESIDE)] + [(ending, end) for end in _INSTEAD]
        return describe(sought, found), tuple(beside)
    if path.endswith(".zip") or not is_store(path):
        return describe(sought, found), ((0, ""),)
    store = _WatchedStore(path)
    file = describe(sought, found, cube=Cube(store, path))
    marks = ("zarr.json", ".zmetadata", ".zgroup")
    keys = sorted({*store.touched, *(f"/{mark}" for mark in marks)})
    return file, None if store.is_listed else tuple((0, key) for key in keys)


class _WatchedStore(FolderStore):
    """A folder that remembers which of its files and folders were looked at."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.touched: set[str] = set()
        self.is_listed = False

    def get(self, key: str, *limit: int) -> bytes | None:
        self.touched.add(f"/{key}")
        return super().get(key, *limit)

    def part(self, key: str, offset: int, size: int) -> bytes | None:
        self.touched.add(f"/{key}")
        return super().part(key, offset, size)

    def open(self, key: str) -> BinaryIO | None:
        self.touched.add(f"/{key}")
        return super().open(key)

    def folders(self, key: str) -> list[str]:
        self.touched.add(f"/{key}".rstrip("/"))
        return super().folders(key)

    def names(self) -> Sequence[str]:
        self.is_listed = True
        return super().names()


class _Ear(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.heard: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append((record.levelno, record.getMessage()))


@contextmanager
def _listening() -> Iterator[list[tuple[int, str]]]:
    """Keep what is logged about a file, so that it is said in later runs too."""
    ear, before = _Ear(), (_HERE.propagate, _HERE.level)
    _HERE.addHandler(ear)
    _HERE.propagate = False
    if not _HERE.isEnabledFor(logging.INFO):
        _HERE.setLevel(logging.INFO)
    try:
        yield ear.heard
    finally:
        _HERE.removeHandler(ear)
        _HERE.propagate = before[0]
        _HERE.setLevel(before[1])


# Texts: what most files of a data set share, and what is a file's own -----------------------


def _to_texts(file: LayerFile, heard: Sequence[tuple[int, str]]) -> tuple[str, str]:
    """Return a description as two JSON texts; paths and options are left out."""
    grids: dict[Grid, int] = {}

    def plain(band: StoredBand | None) -> dict[str, Any] | None:
        if band is None:
            return None
        number = grids.setdefault(band.grid, len(grids))
        facts = {name: getattr(band, name) for name in _FACTS}
        return {**facts, "grid": number}

    bands, mask = [plain(band) for band in file.bands], plain(file.mask)
    known = [None if np.isnat(time) else int(time.astype(np.int64)) for time in file.times]
    shape = {
        "kind": file.kind, "crs": file.crs, "bands": bands, "mask": mask, "named": file.has_names,
        "grids": [[g.step, g.height, g.width, g.is_y_ascending] for g in grids],
    }  # fmt: skip
    own: list[Any] = [[[g.left, g.top] for g in grids], known]
    if any(baseline is not None for baseline in file.baselines) or heard:
        own += [list(file.baselines), list(heard)]
    return json.dumps(shape), json.dumps(own, separators=(",", ":"))


_FACTS = (
    "name", "array", "index", "axes", "chunk", "scale", "offset", "nodata", "limits", "unit",
    "is_integer", "is_byte", "has_mask",
)  # fmt: skip


def _from_texts(path: str, shape: str, own: str, options: Options | None) -> LayerFile:
    """Return a description from its texts; equal parts of different files are shared."""
    kind, crs, bands, mask, grids, has_names = _template(shape)
    places, known, *more = json.loads(own)
    laid = [
        Grid(left=left, top=top, step=step, height=height, width=width, is_y_ascending=up)
        for (left, top), (step, height, width, up) in zip(places, grids, strict=True)
    ]
    for level, text in more[1] if more else ():
        _say(level, text)
    times = np.array([np.iinfo(np.int64).min if t is None else t for t in known], np.int64)
    return LayerFile(
        path=path,
        kind=kind,
        bands=tuple(StoredBand(grid=laid[grid], **facts) for grid, facts in bands),
        times=times.view("datetime64[s]"),
        crs=crs,
        mask=None if mask is None else StoredBand(grid=laid[mask[0]], **mask[1]),
        options=options if kind == "zarr" else None,
        baselines=tuple(more[0]) if more else (None,) * len(known),
        has_names=has_names,
    )


@lru_cache(4096)
def _say(level: int, text: str) -> None:
    _log.log(level, "%s", text)


@lru_cache(4096)
def _template(shape: str) -> tuple[str, str, list[Any], Any, list[Any], bool]:
    """Parse what many files share."""
    facts = json.loads(shape)

    def of(band: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        number = band.pop("grid")
        return number, {k: tuple(v) if isinstance(v, list) else v for k, v in band.items()}

    mask = None if facts["mask"] is None else of(facts["mask"])
    bands = [of(b) for b in facts["bands"]]
    return facts["kind"], facts["crs"], bands, mask, facts["grids"], facts.get("named", False)
