"""Labels that lie beside an SSL4EO-S12 archive (`labels/<split>.csv`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import numpy as np

from domainssl.errors import DataError, parsing
from domainssl.io.raster.zarr import open_cube
from domainssl.io.ssl4eo.layout import Catalogue, Group
from domainssl.io.ssl4eo.read import cubes_b
from domainssl.io.storage.paths import is_file, join, open_file
from domainssl.pieces import spread

__all__ = ["Labels", "labels", "unmatched"]

_LIMIT = 2**28  # bytes
_MOST = 100_000  # classes
_OPENED = 256  # files or members whose ids are looked at


@dataclass(frozen=True)
class Labels:
    """Labels of locations.

    Attributes:
        names: Class names by label.
        label: Label of each location id.
        factors: Further numeric columns of the file, by name, then location id.
        path: The file.
    """

    names: tuple[str, ...]
    label: Mapping[str, int]
    factors: Mapping[str, Mapping[str, float]]
    path: str

    def of(self, keys: list[str], ids: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the label of each location, -1 where there is none, int64 (n,).

        Args:
            keys: What pairs locations over products: the key in a tar, which counts first.
            ids: Location ids as stored.
        """
        known = self.label
        pairs = zip(keys, ids, strict=True)
        return np.array([known.get(key, known.get(name, -1)) for key, name in pairs], np.int64)


def _text(handle: BinaryIO, file: str) -> str:
    content = handle.read(_LIMIT + 1)
    if len(content) > _LIMIT:
        raise DataError(f"{file}: more than {_LIMIT / 1e6:.0f} MB, which no table of labels has.")
    return content.decode("utf-8-sig")


def labels(
    root: str,
    split: str,
    storage_options: Mapping[str, Any] | None = None,
    path: str | None = None,
) -> Labels | None:
    """Read the labels of a split, None when none lie beside the data.

    The file is CSV with a header: `sample` (location id, or tar key in release B), `label`
    (0, 1, …), optionally `name` (of the class), and any numeric columns (factors).

    Args:
        root: Root of the data; the file is `<root>/labels/<split>.csv`.
        split: `train` or `val`.
        storage_options: fsspec options for a URL.
        path: Another file.

    Raises:
        DataError: The file given by `path` is absent, or a row cannot be read.
    """
    file = path or join(root, "labels", f"{split}.csv")
    if not is_file(file, storage_options):
        if path is not None:
            raise DataError(f"labels: no file at {path!r}")
        return None
    with open_file(file, storage_options) as handle:
        advice = "It must be CSV in UTF-8 with a header."
        with parsing(f"{file}: the table", advice=advice, also=(csv.Error,)):
            reader = csv.DictReader(io.StringIO(_text(handle, file), newline=""))
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    if not {"sample", "label"} <= set(columns):
        raise DataError(f"{file}: columns {columns}, expected 'sample', 'label' and others")
    label: dict[str, int] = {}
    names: dict[int, str] = {}
    factors: dict[str, dict[str, float]] = {
        name: {} for name in columns if name not in ("sample", "label", "name")
    }
    for number, row in enumerate(rows, 2):
        try:
            key, value = row["sample"], int(row["label"])
            name = row.get("name") or str(value)
            _keep(label, key, value)
            _keep(names, value, name)
            for name, column in factors.items():
                column[key] = float(row[name])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file}, line {number}: cannot be read ({error}): {row}") from error
    odd = [value for value in label.values() if not 0 <= value < _MOST]
    if odd:
        raise DataError(f"{file}: labels must be 0, 1, … below {_MOST}, found {odd[0]}")
    count = max(names, default=-1) + 1
    return Labels(tuple(names.get(i, str(i)) for i in range(count)), label, factors, file)


def unmatched(found: Labels, catalogue: Catalogue) -> tuple[str, bool] | None:
    """Say that labels name none of the locations of a split; None where they name one.

    Returns:
        The text, and whether all locations were looked at: ids lie in files, of which a part is
        opened.
    """
    if any(key in found.label for key in catalogue.locations()):
        return None
    groups = spread(catalogue.groups, _OPENED)
    most = max(1, _OPENED // len(groups))
    ids: list[str] = []
    for group in groups:
        names = _ids(group, most)
        if any(name in found.label for name in names):
            return None
        ids += names
    is_sure = len(ids) == catalogue.count or catalogue.release.startswith("1.0")
    looked_at = catalogue.count if is_sure else len(ids)
    there = [*ids[:1], *islice(catalogue.locations(), 1)]
    text = (
        f"{found.path}: the column 'sample' names none of the {looked_at} locations of "
        f"{catalogue.root} ({catalogue.split}) that were looked at: it has "
        f"{', '.join(map(repr, list(found.label)[:2])) or 'no row'}, they are called "
        f"{' or '.join(map(repr, there)) or '(unreadable)'}. Write the ids as the data have them, "
        "or set data.init_args.labels: null."
    )
    return text, is_sure


def _ids(group: Group, most: int) -> list[str]:
    """Return the ids that locations have in their files, of tars those of the first ones."""
    if group.release.startswith("1.0"):  # members are called by them
        return []
    try:
        if group.release == "A":
            path = next(iter(group.files.values()))
            names = open_cube(path, options=group.storage_options).read("sample")
            return [str(name) for name in names.reshape(-1)]
        modality = next(iter(group.products))
        cubes = cubes_b(group, modality, range(group.count)[:most])
        return [str(cube.read("sample").reshape(-1)[0]) for cube in cubes
                if cube is not None and "sample" in cube.arrays]  # fmt: skip
    except DataError:
        return []  # who reads the locations says why


def _keep(found: dict[Any, Any], given: Any, what: Any) -> None:
    """Note what something is.

    Raises:
        ValueError: A line above says that it is something else.
    """
    if found.setdefault(given, what) != what:
        raise ValueError(f"{given!r} is {found[given]!r} in a line above")
