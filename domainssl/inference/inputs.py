"""What `embed` is given: one file, a folder, or a manifest, as named files by modality."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, DataError, nearest, parsing, require
from domainssl.inference.outputs import file_name, is_output, repeated, was_written
from domainssl.inference.scenes import Scene, SceneOptions, open_scene, stem
from domainssl.io.raster.bands import is_store
from domainssl.io.raster.geotiff import GEOTIFF_ENDINGS
from domainssl.io.raster.safe import is_safe
from domainssl.io.raster.sites import other_format

__all__ = [
    "Found",
    "RASTERS",
    "examples",
    "find_inputs",
    "is_manifest",
    "is_raster",
    "open_each",
    "open_scenes",
    "read_manifest",
]

_log = logging.getLogger(__name__)
RASTERS = "a GeoTIFF (.tif, .tiff), Zarr store or Sentinel-2 product (.SAFE)"
_MANIFESTS = (".csv", ".parquet")
_Opened = TypeVar("_Opened")


@dataclass(frozen=True)
class Found:
    """One item.

    Attributes:
        name: Its path below the folder that was given, or its id in the manifest.
        files: Its file where the modality is to be found, or one per modality.
    """

    name: str
    files: str | Mapping[str, str]


def is_raster(path: str) -> bool:
    """Tell whether a path is a GeoTIFF by its ending, a Sentinel-2 product, or a Zarr store."""
    return is_safe(path) or path.lower().endswith(GEOTIFF_ENDINGS) or is_store(path)


def is_manifest(path: str) -> bool:
    """Tell whether a path is a table of items, by its ending."""
    return path.lower().endswith(_MANIFESTS) and os.path.isfile(path)


def open_scenes(
    found: Sequence[Found],
    backbone: Backbone,
    options: SceneOptions,
    left_out: dict[str, str] | None = None,
) -> list[Scene]:
    """Return the rasters of items.

    Args:
        found: The items.
        backbone: Whose modalities are read.
        options: What the user says.
        left_out: Takes why one cannot be opened, by its name; None ends at the first such.

    Raises:
        DataError: One cannot be opened, or none where bad ones are left out.
    """
    return open_each(
        [each.name for each in found],
        [partial(open_scene, each.files, backbone, options, each.name) for each in found],
        left_out,
    )


def open_each(
    names: Sequence[str],
    openers: Sequence[Callable[[], _Opened]],
    left_out: dict[str, str] | None = None,
) -> list[_Opened]:
    """Return what is opened of several inputs.

    Args:
        names: What they are called.
        openers: Opens each.
        left_out: Takes why one cannot be opened, by its name; None ends at the first such.

    Raises:
        DataError: One cannot be opened, or none where bad ones are left out.
    """
    opened = []
    for name, opener in zip(names, openers, strict=True):
        try:
            opened.append(opener())
        except DataError as error:
            if left_out is None or len(left_out) + 1 == len(names):
                raise
            _log.warning("%s is left out: %s", name, error)
            left_out[name] = str(error)
    return opened


def examples(folder: str) -> str:
    """Return a sentence that names a few files of a folder in which nothing was found."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if not names:
        return " The folder is empty."
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    told = next((f" {name}: {other_format(name)}" for name in names if other_format(name)), "")
    return f" It has {', '.join(names[:3])}{more}.{told}"


def find_inputs(
    given: str | Path,
    modalities: Sequence[str],
    is_item: Callable[[str], bool],
    what: str,
    output: Path | None = None,
    advice: Callable[[str], str] = examples,
) -> list[Found]:
    """Return the items at a path, in order of their names.

    Args:
        given: A file or store, a folder of some, or a manifest (CSV, Parquet).
        modalities: Names that columns of a manifest may have.
        is_item: Tells whether a path is an item.
        what: How messages call items.
        output: Where results go; what lies there, or was written there before, is no input.
        advice: What is said of a folder without items.

    Raises:
        DataError: There is none.
        ConfigError: The manifest has no usable columns.
    """
    path = str(given)
    if is_manifest(path):
        return read_manifest(path, modalities)
    if is_item(path):
        if "://" not in path and not os.path.exists(path):
            raise DataError(f"{path}: nothing lies there. Check the path.")
        return [Found(file_name(stem(path)), path)]
    if not os.path.isdir(path):
        reason = "is none of these" if os.path.exists(path) else "nothing lies there"
        if os.path.exists(path) and is_item is is_raster and other_format(path):
            raise DataError(f"{path}: {other_format(path)}")
        raise DataError(f"{path}: {reason}. Give {what}, a folder of some, or a manifest.")
    found, skipped = [], list[str]()
    for full in _items_below(path, is_item):
        if output is None or not is_output(full, output, path):
            found.append(Found(_named(os.path.relpath(full, path)), full))
        elif not was_written(full):
            skipped.append(full)
    if skipped:
        _log.warning(
            "%s (%d such in all) lies in the folder of results and is no input. Choose an --output "
            "outside of the inputs where it should be one.", skipped[0], len(skipped),
        )  # fmt: skip
    if not found:
        raise DataError(
            f"{path}: holds no {what.removeprefix('a ')}, which the model takes for "
            f"{', '.join(modalities) or 'slides'}.{advice(path)}"
        )
    return sorted(found, key=lambda item: item.name)


def _items_below(path: str, is_item: Callable[[str], bool]) -> Iterator[str]:
    """Yield the items below a folder; what is called a Zarr store is one, damaged or not."""
    for base, folders, names in os.walk(path):
        inside = [name for name in sorted(folders) if not name.startswith(".")]
        items = [
            name for name in inside
            if is_item(os.path.join(base, name))
            or (is_item is is_raster and name.lower().endswith(".zarr"))
        ]  # fmt: skip
        folders[:] = [name for name in inside if name not in items]
        yield from (os.path.join(base, name) for name in items)
        for name in sorted(names):
            if not name.startswith(".") and is_item(os.path.join(base, name)):
                yield os.path.join(base, name)


def _named(relative: str) -> str:
    folder, name = os.path.split(relative)
    return file_name(os.sep.join([*filter(None, folder.split(os.sep)), stem(name)]))


def read_manifest(path: str, modalities: Sequence[str]) -> list[Found]:
    """Return the rows of a table: `id`, and `path` or a column per modality; empty is absent.

    Relative paths lie below the folder of the manifest.

    Raises:
        ConfigError: There is no such column, or ids repeat.
        DataError: It cannot be read.
    """
    pandas: Any = require("pandas", "medical")
    with parsing(f"{path}: the manifest", advice="Write it as CSV or Parquet with a header."):
        if path.lower().endswith(".csv"):
            table = pandas.read_csv(path, dtype=str, keep_default_na=False)
        else:
            table = pandas.read_parquet(path).astype(object)
    columns = [str(name) for name in table.columns]
    named = [name for name in columns if name in modalities]
    if not named and "path" not in columns:
        wanted = ["path", *modalities]
        hint = "".join(nearest(name, wanted) for name in columns[:1])
        raise ConfigError(
            f"{path}: columns {', '.join(columns)}; expected id, and path or one per modality "
            f"({', '.join(modalities)}).{hint}"
        )
    base = os.path.dirname(os.path.abspath(path))
    found: list[Found] = []
    for row in table.to_dict("records"):
        places = {name: _place(base, row[name]) for name in named or ["path"]}
        places = {name: place for name, place in places.items() if place}
        if not places:
            raise ConfigError(f"{path}: row {len(found) + 1} names no file.")
        first = next(iter(places.values()))
        name = str(row.get("id") or "") or stem(first)
        found.append(Found(file_name(name), places if named else first))
    if not found:
        raise DataError(f"{path}: has no row. Write one per input: id, path.")
    twice = repeated(item.name for item in found)
    if twice:
        raise ConfigError(f"{path}: ids repeat: {', '.join(twice[:5])}. Give every row its own.")
    return found


def _place(base: str, value: Any) -> str:
    text = "" if value is None or value != value else str(value).strip()
    if not text or "://" in text or os.path.isabs(text):
        return text
    return os.path.join(base, text)
