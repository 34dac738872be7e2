"""Labels that lie beside an SSL4EO-S12 archive (`labels/<split>.csv`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from domainssl.errors import DataError, parsing
from domainssl.io.storage.paths import is_file, join, open_file

__all__ = ["Labels", "labels"]

_LIMIT = 2**28  # bytes
_MOST = 100_000  # classes


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

    def of(self, ids: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the label of each location, -1 where there is none, int64 (n,)."""
        return np.array([self.label.get(name, -1) for name in ids], np.int64)


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


def _keep(found: dict[Any, Any], given: Any, what: Any) -> None:
    """Note what something is.

    Raises:
        ValueError: A line above says that it is something else.
    """
    if found.setdefault(given, what) != what:
        raise ValueError(f"{given!r} is {found[given]!r} in a line above")
