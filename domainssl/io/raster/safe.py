"""Sentinel-2 products as the Copernicus service delivers them: `.SAFE` folders, or zips of them.

The metadata say date, processing baseline, offsets and the grid; bands are JPEG 2000, one file each
at their own resolution, of which windows are decoded.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple
from xml.etree import ElementTree

import numpy as np

from domainssl.errors import DataError, nearest, parsing, require
from domainssl.files import open_regular
from domainssl.io.raster.grid import Grid
from domainssl.io.raster.layer import OFFSET_BASELINE, LayerFile, StoredBand
from domainssl.io.storage.archives import FolderStore, check_member
from domainssl.io.storage.handles import HandlePool, SharedFile, window
from domainssl.io.storage.paths import Options, is_url, join, open_file, stamp
from domainssl.sensors import L1C_BANDS, L2A_BANDS, canonical_band

__all__ = ["describe_safe", "is_safe", "read_safe", "safe_bands", "safe_site"]

Array = np.ndarray[Any, Any]
_PRODUCT = re.compile(r"S2[A-D]_MSIL(1C|2A)_\d{8}T\d{6}_.*", re.IGNORECASE)
_TILE = re.compile(r"_(T\d{2}[A-Z]{3})_")
_LEVELS = ("L1C", "L2A")
_METADATA = re.compile(r"MTD_MSIL(1C|2A)\.xml")
_TOP = re.compile(r"(?:^|/)(MTD_MSIL(?:1C|2A)\.xml)$")
_OF_TILE = re.compile(r"GRANULE/[^/]+/MTD_TL\.xml")
_BAND = re.compile(
    r"GRANULE/[^/]+/IMG_DATA/(?:R\d0m/)?[^/]*_(B\d{2}|B8A|SCL)(?:_(\d0)m)?\.jp2", re.IGNORECASE
)
_NATIVE_M = {
    **dict.fromkeys(("B02", "B03", "B04", "B08"), 10),
    **dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12", "SCL"), 20),
    **dict.fromkeys(("B01", "B09", "B10"), 60),
}
_JP2 = b"\0\0\0\x0cjP  "
_XML_LIMIT = 2**25  # bytes
_JP2_LIMIT = 2**31
_MOST_FILES = 10_000
_QUANTIFICATION = 10_000.0
_SATURATED = 65_535.0
_FILES = HandlePool(limit=64)


def is_safe(path: str) -> bool:
    """Whether a path is a Sentinel-2 product: a folder or zip of its name, a URL by that alone.

    A local folder of any name that holds the metadata of a product is one, too.
    """
    name = os.path.basename(path.rstrip("/\\"))
    is_named = _PRODUCT.fullmatch(name) is not None and not name.lower().endswith(".zarr.zip")
    if is_url(path):
        return is_named and name.lower().endswith((".safe", ".zip"))
    if name.lower().endswith(".zip"):
        return is_named and os.path.isfile(path)
    if is_named and name.upper().endswith(".SAFE"):
        return os.path.isdir(path)
    if os.path.splitext(name)[1].lower() not in ("", ".safe"):  # most of a folder of rasters
        return False
    return any(os.path.isfile(os.path.join(path, f"MTD_MSI{level}.xml")) for level in _LEVELS)


def safe_site(path: str) -> str | None:
    """Return the tile that a product shows, such as `T32TQM`, by its name; None if it has none."""
    found = _TILE.search(os.path.basename(path.rstrip("/\\")))
    return found[1] if found else None


class _File(NamedTuple):
    """A file of a product: its full name, and of zips size, method and place of its header."""

    name: str
    size: int = -1
    method: int = zipfile.ZIP_STORED
    start: int = 0


class _Product:
    """The files of a product, in a folder or a zip, local or behind a URL."""

    def __init__(self, path: str, options: Options | None = None) -> None:
        self.path, self._options = path, options
        self.is_zip, self.is_remote = path.lower().endswith(".zip"), is_url(path)
        files = self._zipped() if self.is_zip else self._listed()
        tops = [f.name[: match.start(1)] for f in files if (match := _TOP.search(f.name))]
        top = min(tops, key=len, default="")  # zips hold a folder, as a rule
        self._files = {  # by name inside of the product
            file.name[len(top) :]: file for file in files if file.name.startswith(top)
        }

    def _listed(self) -> list[_File]:
        found = []
        if self.is_remote:
            found = [_File(check_member(n, self.path)) for n in self._store.names()]
            if len(found) > _MOST_FILES:
                raise DataError(f"{self.path}: more than {_MOST_FILES} files, no such product.")
            return found
        for base, _, names in os.walk(self.path):  # links to folders are not followed
            for name in names:
                full = os.path.relpath(os.path.join(base, name), self.path)
                found.append(_File(full.replace(os.sep, "/")))
            if len(found) > _MOST_FILES:
                raise DataError(f"{self.path}: more than {_MOST_FILES} files, no such product.")
        return found

    @property
    def _store(self) -> FolderStore:
        return FolderStore(self.path, self._options)

    def _zipped(self) -> list[_File]:
        with open_file(self.path, self._options) as file, parsing(
            f"{self.path}: not a complete zip; it", also=(zipfile.BadZipFile, NotImplementedError)
        ), zipfile.ZipFile(file) as archive:  # fmt: skip
            infos = [info for info in archive.infolist() if not info.is_dir()]
        if len(infos) > _MOST_FILES:
            raise DataError(f"{self.path}: more than {_MOST_FILES} members, no such product.")
        return [
            _File(
                check_member(info.filename, self.path),
                info.file_size,
                info.compress_type,
                info.header_offset,
            )
            for info in infos
        ]

    def names(self, pattern: re.Pattern[str]) -> list[str]:
        """Return the names of files inside of the product that fit a pattern."""
        return sorted(name for name in self._files if pattern.fullmatch(name))

    def xml(self, pattern: re.Pattern[str], what: str) -> ElementTree.Element:
        """Parse the one file of a name.

        Raises:
            DataError: It is missing, too large, or no plain XML.
        """
        names = self.names(pattern)
        if len(names) != 1:
            raise DataError(
                f"{self.path}: {len(names)} files {what}, expected one; it holds "
                f"{', '.join(sorted(self._files)[:6]) or 'nothing'}. Sentinel-2 products in the "
                "format of December 2016 and later are read; get the product again."
            )
        where = f"{self.path}: {names[0]}"
        text = self._content(names[0])
        if len(text) > _XML_LIMIT or b"<!ENTITY" in text or b"<!DOCTYPE" in text:
            raise DataError(
                f"{where}: more than {_XML_LIMIT / 1e6:.0f} MB, or declares entities, which "
                "metadata of Sentinel-2 never do. The product is damaged or hostile."
            )
        with parsing(f"{where}: the metadata", also=(ElementTree.ParseError,)):
            return ElementTree.fromstring(text)

    def _content(self, name: str) -> bytes:
        full, size, *_ = self._files[name]
        if self.is_zip:
            if size > _XML_LIMIT:
                return bytes(_XML_LIMIT + 1)
            with open_file(self.path, self._options) as file, parsing(
                f"{self.path}: member {full!r}", also=(zipfile.BadZipFile, NotImplementedError)
            ), zipfile.ZipFile(file) as archive:  # fmt: skip
                return archive.read(full)
        if self.is_remote:
            return self._store.get(full, _XML_LIMIT) or b""
        with open_regular(os.path.join(self.path, full)) as file:
            return file.read(_XML_LIMIT + 1)

    def bands(self) -> dict[str, tuple[str, int]]:
        """Return file and pixel size in metres of each band, at its native resolution if there."""
        found: dict[str, tuple[str, int]] = {}
        for name in self.names(_BAND):
            match = _BAND.fullmatch(name)
            assert match is not None
            band = match[1].upper()
            own = _NATIVE_M.get(band, 10)
            metres = int(match[2] or own)
            best = found.get(band)
            if best is None or abs(metres - own) < abs(best[1] - own):
                found[band] = (name, metres)
        return found

    def member(self, name: str) -> str:
        """Return the name of a file as GDAL opens it.

        Raises:
            DataError: It is packed in a way that may unfold to any size.
        """
        full, size, method, _ = self._files[name]
        if not self.is_zip:
            return join(self.path, full)
        if size > _JP2_LIMIT or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{self.path}: member {full!r} has {size / 1e6:.0f} MB, packed by method {method} "
                "of zip; expected stored or deflated images of less than 2 GB."
            )
        if self.is_remote and method != zipfile.ZIP_STORED:
            raise DataError(
                f"{self.path}: member {full!r} is deflated, so that a window of it cannot be read "
                "behind a URL. Download the zip, or put the unpacked product there."
            )
        return full

    def opener(self, name: str) -> Callable[..., BinaryIO]:
        """Return what opens the image of a name behind a URL: ranges of it are read."""
        full, size, _, start = self._files[name]

        def opened(path: str, mode: str = "rb", **_: Any) -> BinaryIO:
            if not path.endswith(full):  # what GDAL looks for beside it, and rasterio's trial
                raise FileNotFoundError(path)
            if not self.is_zip:
                return open_file(join(self.path, full), self._options)
            archive = SharedFile(self.path, self._options)
            name_size, extra_size = struct.unpack("<26xHH", archive.read(start, 30))
            return window(archive, start + 30 + name_size + extra_size, size)

        return opened


def safe_bands(path: str, options: Options | None = None) -> list[str]:
    """Return the bands that a product holds; `SCL`, the scene classification, is none."""
    there = _Product(path, options).bands()
    return [band for band in L1C_BANDS if band in there]


def describe_safe(
    path: str, bands: Sequence[str], *, mask: str | None = None, options: Options | None = None
) -> LayerFile:
    """Find the bands of a product.

    The offset of processing baseline 04.00 and later is taken from the metadata, band by band, so
    that decoded values are digital numbers without it; stored 0 and 65535 are no measurements.

    Args:
        path: A `.SAFE` folder or a zip of one; also a URL.
        bands: Names wanted.
        mask: `scl`, the scene classification of L2A, or None.
        options: fsspec options of a URL.

    Raises:
        DataError: Metadata or a band are missing or cannot be read.
    """
    product = _Product(path, options)
    facts = product.xml(_METADATA, "MTD_MSIL1C.xml or MTD_MSIL2A.xml")
    tile = product.xml(_OF_TILE, "GRANULE/*/MTD_TL.xml")
    there = product.bands()
    with parsing(f"{path}: the metadata", also=(AttributeError,)):
        crs = _text(tile, "HORIZONTAL_CS_CODE").upper()
        baseline = float(_text(facts, "PROCESSING_BASELINE"))
        time = np.datetime64(_text(facts, "PRODUCT_START_TIME").rstrip("Z"), "s")
        scale = _QUANTIFICATION / _quantification(facts)
        offsets = _offsets(facts)
        grids = {metres: _grid(tile, metres, path) for metres in {m for _, m in there.values()}}
    if baseline >= OFFSET_BASELINE and not offsets:
        raise DataError(
            f"{path}: processing baseline {baseline:05.2f}, whose numbers are 1000 too high, but "
            "the metadata list no offsets. They are incomplete; get the product again."
        )
    if not re.fullmatch(r"EPSG:\d{4,6}", crs) or not np.isfinite(scale) or scale <= 0:
        raise DataError(f"{path}: the metadata hold {crs!r} as CRS and {scale!r} as scale.")

    def stored(name: str, found: str) -> StoredBand:
        if offsets and found not in offsets and found != "SCL":
            raise DataError(
                f"{path}: the metadata list offsets of {', '.join(offsets)}, none of {found}. They "
                "are incomplete; get the product again."
            )
        file, metres = there[found]
        grid = grids[metres]
        is_map = found == "SCL"
        return StoredBand(
            name=name, array=file, index=0, axes=("band", "y", "x"), grid=grid,
            chunk=(min(1024, grid.height), min(1024, grid.width)),
            scale=1.0 if is_map else scale,
            offset=0.0 if is_map else offsets.get(found, 0.0) * scale,
            nodata=() if is_map else (0.0, _SATURATED), is_integer=True,
        )  # fmt: skip

    chosen = []
    for band in bands:
        name = canonical_band(band)
        if name not in there:
            have = [b for b in L1C_BANDS if b in there]
            is_lost = name in L2A_BANDS or (name in L1C_BANDS and "SCL" not in there)
            advice = (
                " Products of its level hold it: this one is incomplete; get it again."
                if is_lost
                else nearest(name, have)
            )
            raise DataError(f"{path}: no band {band!r}; there are: {', '.join(have)}.{advice}")
        chosen.append(stored(band, name))
    if mask is not None and (mask.upper() != "SCL" or "SCL" not in there):
        raise DataError(
            f"{path}: the mask {mask!r} is asked for; products of level 2A have 'scl', those of "
            "level 1C none. Set data.init_args.modalities.<name>.mask: null, or leave out --mask "
            "of embed."
        )
    return LayerFile(
        path=path, kind="safe", bands=tuple(chosen), times=np.array([time], "datetime64[s]"),
        crs=crs, mask=stored("scl", "SCL") if mask is not None else None, baselines=(baseline,),
        options=options if product.is_remote else None,
    )  # fmt: skip


def _text(root: ElementTree.Element, name: str) -> str:
    found = next((e.text for e in root.iter() if _plain(e.tag) == name and e.text), None)
    if found is None:
        raise ValueError(f"lacks {name}")
    return found.strip()


def _plain(tag: str) -> str:
    return tag.rsplit("}", 1)[-1]


def _quantification(facts: ElementTree.Element) -> float:
    for element in facts.iter():
        if _plain(element.tag) in ("BOA_QUANTIFICATION_VALUE", "QUANTIFICATION_VALUE"):
            return float(element.text or "")
    return _QUANTIFICATION


def _offsets(facts: ElementTree.Element) -> dict[str, float]:
    """Return what is added to the stored numbers of each band; none before baseline 04.00."""
    found = {}
    for element in facts.iter():
        if _plain(element.tag) in ("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET"):
            number, value = int(element.get("band_id") or ""), float(element.text or "")
            if not 0 <= number < len(L1C_BANDS) or not np.isfinite(value):
                raise ValueError(f"has the offset {value!r} of a band {number}")
            found[L1C_BANDS[number]] = value
    return found


def _grid(tile: ElementTree.Element, metres: int, path: str) -> Grid:
    def of(tag: str) -> dict[str, float]:
        parts = [
            element for element in tile.iter()
            if _plain(element.tag) == tag and element.get("resolution") == str(metres)
        ]  # fmt: skip
        return {_plain(child.tag): float(child.text or "") for child in parts[0]}

    size, place = of("Size"), of("Geoposition")
    rows, columns = int(size["NROWS"]), int(size["NCOLS"])
    if (
        not (0 < rows <= 30_000 and 0 < columns <= 30_000)
        or not np.isfinite([place["ULX"], place["ULY"]]).all()
    ):
        raise ValueError(f"speaks of {rows} x {columns} pixels at {place}")
    transform = (metres, 0.0, place["ULX"], 0.0, -metres, place["ULY"])
    return Grid.of_transform(transform, rows, columns, path)


def read_safe(
    path: str, band: StoredBand, rows: slice, columns: slice, options: Options | None = None
) -> tuple[Array, int]:
    """Read a window of one band as stored.

    Args:
        path: The product.
        band: From `describe_safe`.
        rows: Rows of the window.
        columns: Columns of the window.
        options: fsspec options of a URL.

    Returns:
        Values (H, W), and how many bytes the blocks hold that were decoded.

    Raises:
        DataError: The image is damaged, or not the one that the metadata describe.
    """
    rasterio = require("rasterio", "geo")
    where = f"{path}: {band.array}"
    file = _FILES.get((*stamp(path), band.array), lambda: _open(path, band, where, options))
    place = rasterio.windows.Window.from_slices(rows, columns)
    with _reading(where):
        values: Array = file.read(1, window=place)
    high, wide = file.block_shapes[0]
    down = -(-rows.stop // high) - rows.start // high
    across = -(-columns.stop // wide) - columns.start // wide
    return values, down * across * high * wide * values.itemsize


def _reading(where: str) -> Any:
    rasterio = require("rasterio", "geo")
    return parsing(
        f"{where}: the JPEG 2000 image",
        also=(rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError),
    )


def _open(path: str, band: StoredBand, where: str, options: Options | None) -> Any:
    """Open an image with the one driver that may see it, and compare it with the metadata."""
    rasterio = require("rasterio", "geo")
    product = _Product(path, options)
    member = product.member(band.array)
    more: dict[str, Any] = {}
    if product.is_remote:
        name, more = member, {"opener": product.opener(band.array)}
    elif product.is_zip:
        name = f"/vsizip/{{{os.path.abspath(path)}}}/{member}"
    else:
        name = os.path.abspath(member)
        with open_regular(member) as file:
            if file.read(len(_JP2)) != _JP2:
                raise DataError(f"{where}: does not begin as JPEG 2000; get the product again.")
    # nothing that lies beside the image is looked at
    alone = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO"}
    with _reading(where), rasterio.Env(**alone):
        opened = rasterio.open(name, driver="JP2OpenJPEG", **more)
    shape, expected = (
        (opened.count, opened.height, opened.width),
        (1, band.grid.height, band.grid.width),
    )
    if shape != expected or np.dtype(opened.dtypes[0]).kind != "u":
        opened.close()
        raise DataError(
            f"{where}: holds {opened.dtypes[0]} of shape {shape}, but the metadata say {expected}. "
            "The product is damaged; get it again."
        )
    return opened
