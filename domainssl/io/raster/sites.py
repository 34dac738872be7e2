"""Find what belongs together below a root: files per site, by folders or by a pattern.

`{site}`, `{date}` and `{band}` in a pattern stand for parts of file names; equal sites of different
layers are partners.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from domainssl.errors import DataError, nearest
from domainssl.io.raster.bands import is_store, open_store
from domainssl.io.raster.geotiff import GEOTIFF_ENDINGS
from domainssl.io.raster.safe import is_safe, safe_site
from domainssl.io.raster.time import parse_date
from domainssl.io.storage.paths import Options, is_file, join, list_folder

__all__ = ["Found", "find_files", "other_format"]

_ENDINGS = (".zarr.zip", ".zarr", *GEOTIFF_ENDINGS)
_OTHERS = {  # formats that lie in such folders, and are not read
    ".nc": "netCDF", ".nc4": "netCDF", ".h5": "HDF5", ".hdf5": "HDF5", ".he5": "HDF5",
    ".hdf": "HDF", ".jp2": "JPEG 2000", ".j2k": "JPEG 2000", ".vrt": "VRT", ".img": "ERDAS",
    ".grib": "GRIB", ".grb": "GRIB", ".grib2": "GRIB", ".png": "PNG", ".jpg": "JPEG",
    ".jpeg": "JPEG", ".bil": "ESRI BIL", ".asc": "ESRI ASCII grid", ".dat": "ENVI",
    ".dim": "BEAM-DIMAP", ".safe": "SAFE", ".npy": "NumPy", ".npz": "NumPy", ".tar": "tar",
    ".tgz": "tar", ".gz": "gzip", ".zip": "zip other than .zarr.zip", ".gpkg": "GeoPackage",
    ".kea": "KEA", ".ecw": "ECW", ".sid": "MrSID", ".nitf": "NITF", ".json": "JSON",
    ".parquet": "Parquet",
}  # fmt: skip
_SIDECARS = (".xml", ".ovr", ".msk", ".aux", ".tfw", ".prj", ".txt", ".md", ".csv", ".lock")
_READ = "Zarr stores (.zarr, .zarr.zip), GeoTIFF (.tif, .tiff) and Sentinel-2 products are read"
_log = logging.getLogger(__name__)
_FIRST, _LAST = np.datetime64("1900-01-01", "s"), np.datetime64("2101-01-01", "s")
_DATE = r"\d{4}-?\d{2}-?\d{2}(?:T\d{6})?"
_FIELDS = {"site": "[^/]+?", "date": _DATE, "band": r"[^\W_]+"}


class Found(NamedTuple):
    """One file of a site.

    Attributes:
        path: File or store.
        date: Date in its name, if the pattern has one.
        group: Folder inside the store.
        band: Band in its name, if the pattern has one.
    """

    path: str
    date: str
    group: str
    band: str = ""


def find_files(
    root: str, path: str, group: str, options: Options | None = None
) -> dict[str, list[Found]]:
    """Return the files of one layer, by site.

    Args:
        root: Folder, URL, or a single store.
        path: Store, folder or pattern below the root; inside the root if that is a store.
        group: Folder inside the stores.
        options: fsspec options of a URL.

    Raises:
        DataError: There is none.
    """
    if is_safe(root):
        return {_stem(root): [Found(root, "", "")]}
    if any(sign in path for sign in "{*?"):
        found = _match(root, path, group, options)
        if not found:
            _refuse_others(list(_matches(root, path, options)), root)
            top = ", ".join(list_folder(root, options)[:8]) or "nothing"
            raise DataError(
                f"{root}: no file fits the pattern {path!r}. {root} holds: {top}. "
                "{site}, {date}, {band} stand for parts of names, * and ? for anything within one; "
                "{date} for 20200503, 2020-05-03 or 20200503T101031."
            )
        return found
    full = root if path in ("", ".") else join(root, path)
    single = _single(full, options)
    if single:
        return {_stem(full): [Found(full, "", group)]}
    names = _visible(list_folder(full, options))
    inside = [
        n for n in names
        if is_safe(join(full, n))
        or (n.lower().endswith(_ENDINGS) and _single(join(full, n), options))
    ]  # fmt: skip
    broken = [n for n in names if _is_dangling(join(full, n))]
    if broken:
        raise DataError(
            f"{join(full, broken[0])}: a link to {os.readlink(join(full, broken[0]))!r}, which "
            "does not exist. Remove the link, or bring back what it points to."
        )
    if inside:
        _tell_broken([join(full, n) for n in names if n not in inside])
        found = {}
        for name in inside:
            found.setdefault(_stem(name), []).append(Found(join(full, name), "", group))
        return found
    if _single(root, options):  # the layers are folders or variables of one store
        arrays = open_store(root, options).arrays
        is_inside = any(name == path or name.startswith(f"{path}/") for name in arrays)
        return {_stem(root): [Found(root, "", group or (path if is_inside else ""))]}
    _refuse_others([join(full, n) for n in names] or [full], root)
    place, have = (full, names) if names else (root, list_folder(root, options))
    guess = "" if names else nearest(path, have)
    raise DataError(
        f"{full}: no zarr store (.zarr, .zarr.zip), GeoTIFF, or folder of them. {place} holds: "
        f"{', '.join(have[:12]) or 'nothing'}.{guess} Set data.init_args.modalities."
        "<name>.path to a store, a folder, or a pattern such as '{site}/s2_{date}.tif'; root "
        "'sample' makes the embedded sample."
    )


def _visible(names: Sequence[str]) -> list[str]:
    """Leave out hidden files, such as the `._` files of macOS."""
    return [name for name in names if not name.startswith(".")]


def _tell_broken(paths: Sequence[str]) -> None:
    """Say which folders and files are called rasters and are passed over, since they are none."""
    broken = [path for path in paths if path.lower().endswith(_ENDINGS)]
    if broken:
        _log.warning(
            "%s (%d such in all): called a raster, but no Zarr hierarchy (zarr.json, .zgroup) or "
            "file; passed over. Get it again, or remove it.", broken[0], len(broken),
        )  # fmt: skip


def _is_dangling(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _refuse_others(paths: Sequence[str], root: str) -> None:
    """Say which formats are read where files of another were named.

    Raises:
        DataError: One of them has such an ending.
    """
    for path in paths:
        reason = other_format(path)
        if reason:
            raise DataError(f"{path}: {reason} {root} holds no other raster of this layer.")


def other_format(path: str) -> str:
    """Return that files of an ending are not read, and what to do; empty where nothing is known."""
    kind = _OTHERS.get(os.path.splitext(path.lower())[1])
    if kind is None:
        return ""
    if kind == "SAFE":
        return (
            "a folder or zip in SAFE that is no product of Sentinel-2 in the format of December "
            "2016 and later (S2A_MSIL2A_... with MTD_MSIL2A.xml). Older ones are to be had again "
            "in the new format; those of Sentinel-1 lie in radar geometry: terrain-correct them "
            "into GeoTIFF or Zarr first."
        )
    return (
        f"{kind} is not read. {_READ}; convert it, for instance with `gdal_translate -of COG` or "
        "xarray's `to_zarr`."
    )


def _single(path: str, options: Options | None) -> bool:
    if is_safe(path):
        return True
    if path.lower().endswith(GEOTIFF_ENDINGS):
        return "://" in path or is_file(path, options)
    return is_store(path, options)


def _stem(path: str) -> str:
    name = path.rstrip("/").replace("\\", "/").rpartition("/")[2]
    is_product = name.lower().endswith((".safe", ".zip")) or not os.path.splitext(name)[1]
    if is_product and (tile := safe_site(name)) is not None:
        return tile  # products of one tile are its dates
    ending = next((e for e in (*_ENDINGS, ".safe") if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)] or name


def _match(root: str, path: str, group: str, options: Options | None) -> dict[str, list[Found]]:
    """Return the rasters that fit a pattern, by site; anything else that fits is passed over."""
    found: dict[str, list[Found]] = {}
    passed = []
    for full, known in _matches(root, path, options).items():
        if _is_dangling(full):
            raise DataError(f"{full}: a link to {os.readlink(full)!r}, which does not exist.")
        if (
            is_safe(full)
            or full.lower().endswith(_ENDINGS)
            or (
                os.path.splitext(full)[1].lower() not in (*_OTHERS, *_SIDECARS)
                and _single(full, options)
            )
        ):
            _check_date(full, known.get("date", ""))
            site = known.get("site", _stem(root))
            file = Found(full, known.get("date", ""), group, known.get("band", ""))
            found.setdefault(site, []).append(file)
        else:
            passed.append(full)
    if found and passed:
        _log.info(
            "%s: %d files that fit %r are no rasters that are read, such as %s",
            root, len(passed), path, passed[0],
        )  # fmt: skip
    return found


def _check_date(path: str, date: str) -> None:
    """Refuse what stands for `{date}` in a name and is no date of this century or the last.

    Raises:
        DataError: Names the file and what stands there.
    """
    time = parse_date(date) if date else _FIRST
    if np.isnat(time) or not _FIRST <= time < _LAST:
        raise DataError(
            f"{path}: {date!r} stands for {{date}} in its name and is no date; expected year, "
            "month and day, such as 20200503 or 2020-05-03. Rename the file, or let * stand for it "
            "(then its date is not known)."
        )


def _matches(root: str, path: str, options: Options | None) -> dict[str, dict[str, str]]:
    """Walk the parts of a pattern, folder by folder; what fits, with its site, date and band."""
    open_: list[tuple[str, dict[str, str]]] = [(root, {})]
    for part in path.strip("/").split("/"):
        further = []
        for folder, known in open_:
            pattern = re.compile(_expression(part, known))
            for name in _visible(list_folder(folder, options)):
                fit = pattern.fullmatch(name)
                if fit:
                    further.append((join(folder, name), {**known, **fit.groupdict()}))
        open_ = further
    return dict(open_)


def _expression(part: str, known: dict[str, str]) -> str:
    text = ""
    seen: set[str] = set()
    for token in re.split(r"(\{site\}|\{date\}|\{band\}|\*|\?)", part):
        if token in ("{site}", "{date}", "{band}"):
            name = token[1:-1]
            if name in known:
                text += re.escape(known[name])
            elif name in seen:
                text += f"(?P={name})"
            else:
                text += f"(?P<{name}>{_FIELDS[name]})"
            seen.add(name)
        else:
            text += {"*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
    return text
