"""GDAL, kept to GeoTIFF: a file can be named .tif and be anything that GDAL opens.

Virtual rasters, service descriptions and the like name other files and servers. Only the GeoTIFF
driver is let near a file of the user, and what lies beside it under GDAL's own names (`.ovr`,
`.msk`) must be TIFF as well; overviews that the file says are elsewhere are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from domainssl.errors import DataError, UnreadableError, parsing, require, unwritable
from domainssl.files import answer_of_server, open_regular
from domainssl.io.storage.handles import names_in
from domainssl.io.storage.paths import is_url

__all__ = ["open_raster", "reading", "writing"]

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BESIDE = (".ovr", ".msk", ".msk.ovr", ".ovr.msk", ".msk.msk", ".ovr.ovr")
_PATIENCE = {
    "GDAL_HTTP_MAX_RETRY": "4",
    "GDAL_HTTP_RETRY_DELAY": "0.5",  # seconds, doubled every time
    "GDAL_HTTP_RETRY_CODES": "429,500,502,503,504",
}
_REMOTE = (
    "Its server did not answer as expected, or the file is damaged: see whether the address, "
    "credentials and network are right, and try again; what is done is kept."
)
_SIDECAR = 2**26  # bytes of .aux.xml, which GDAL reads whole


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn failures of GDAL into errors that name the file; requests to a server are repeated.

    Raises:
        DataError: It cannot be read.
    """
    rasterio = require("rasterio", "geo")
    failures = (rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError)
    what = f"{path}: the GeoTIFF"
    if not is_url(str(path)):
        with parsing(what, also=failures):
            yield
        return
    with (
        rasterio.Env(**_PATIENCE),
        parsing(what, kind=DataError, also=failures, advice=_REMOTE),  # the file may be whole
    ):
        yield


@contextmanager
def writing(path: object) -> Iterator[None]:
    """Turn failures of GDAL to write into errors that name the file: no fault of the input.

    Raises:
        StorageError: It cannot be written.
    """
    rasterio = require("rasterio", "geo")
    try:
        yield
    except (OSError, rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError) as error:
        raise unwritable(path, error) from error


def open_raster(path: str | os.PathLike[str]) -> Any:
    """Open a GeoTIFF for reading, and nothing else.

    Args:
        path: The file; also a URL that GDAL knows.

    Raises:
        DataError: It is missing, no regular file, no GeoTIFF, or takes pixels from elsewhere.
    """
    rasterio = require("rasterio", "geo")
    is_local = not is_url(path)
    if is_local:
        try:
            _check(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    with reading(path):
        # a local file of any name is that file: no /vsi prefix, no `zip+s3` scheme
        file = rasterio.open(os.path.abspath(path) if is_local else path, driver="GTiff")
        named = file.tags(ns="OVERVIEWS").get("OVERVIEW_FILE")
        if named is not None:
            file.close()
            raise DataError(
                f"{path}: takes its overviews from {named!r}, which is refused: nothing is read "
                "that was not named by you. Remove the tag OVERVIEW_FILE, or the .aux.xml with it."
            )
        return file


def _check(path: str | os.PathLike[str]) -> None:
    with open_regular(path) as file:
        start = file.read(512)
        if start[:4] not in _TIFF:
            other = (
                " VRT, WMS and other formats are not read under this name; convert it with "
                "gdal_translate."
            )
            raise UnreadableError(
                f"{path}: not recognized as GeoTIFF: it "
                f"{'does not begin as a TIFF file' if start else 'is empty'}."
                f"{answer_of_server(start) or other}"
            )
    folder, name = os.path.split(os.path.abspath(path))
    beside = names_in(folder)
    for ending in _BESIDE:
        found = beside.get((name + ending).lower())
        if found is not None:
            with open_regular(os.path.join(folder, found)) as file:
                if file.read(4) not in _TIFF:
                    raise DataError(f"{path}: {found!r} beside it is no TIFF; remove or mend it.")
    sidecar = beside.get(f"{name}.aux.xml".lower())
    if sidecar is not None and os.stat(os.path.join(folder, sidecar)).st_size > _SIDECAR:
        raise DataError(f"{path}: {sidecar!r} beside it has more than {_SIDECAR / 1e6:.0f} MB.")
