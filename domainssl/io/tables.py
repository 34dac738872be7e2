"""Tables that list exams, tiles or slides: CSV, JSON lines or Parquet."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from domainssl.errors import DataError, parsing, require
from domainssl.files import open_regular, read_small

__all__ = ["MANIFESTS", "cut_row", "own_columns", "read_table", "without_patient"]

MANIFESTS = ("manifest.csv", "manifest.parquet", "manifest.jsonl")
_MOST_BYTES = 500_000_000
_EMPTY = ("nan", "n/a", "<na>")  # as pandas and BIDS write a cell that holds nothing
_PERSON = r"patient|subject|participant|person|\bmrn\b|\bpid\b"
_ADVICE = "Each row needs as many cells as the first one, which names the columns."


def read_table(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and rows of a table, every cell as text, empty where nothing stands.

    Raises:
        DataError: The file is no such table.
    """
    pandas: Any = require("pandas", "medical")
    lower = path.lower()
    with parsing(f"{path}: the table", advice=_ADVICE, also=(pandas.errors.ParserError,)):
        if lower.endswith(".parquet"):
            require("pyarrow", "medical")
            with open_regular(path) as file:
                table = pandas.read_parquet(io.BytesIO(file.read(_MOST_BYTES)))
        else:
            text = io.StringIO(read_small(path, limit=_MOST_BYTES))
            if lower.endswith((".jsonl", ".ndjson")):
                table = pandas.read_json(text, lines=True, dtype=False)
            else:
                header = text.readline()
                text.seek(0)
                mark = max((",", ";", "\t", "|"), key=header.count)
                # a header that pandas reads as such may have fewer cells than the rows
                cells = pandas.read_csv(
                    text, sep=mark, dtype=str, keep_default_na=False, header=None
                )
                table = cells.iloc[1:].set_axis(list(cells.iloc[0]), axis=1)
    columns = [_text(name, pandas) for name in table.columns]
    twice = [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]
    if twice:
        raise DataError(
            f"{path}: two columns are named {' and '.join(map(repr, twice))}, so that it is "
            "unknown which counts. Rename one."
        )
    rows = [
        {name: _text(cell, pandas) for name, cell in zip(columns, row, strict=True)}
        for row in table.itertuples(index=False, name=None)
    ]
    return columns, rows


def cut_row(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Say which row of `csv.DictReader` lacks cells, None where all have those of the header."""
    for number, row in enumerate(rows, 2):
        if None in row.values():
            have = sum(value is not None for value in row.values())
            return (
                f"line {number}: {have} cells, the header has {len(row)}. The table was cut off "
                "or written by hand: get it again, or fill in the row."
            )
    return None


def own_columns(columns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Return the columns of some names, in any letter case and with `-` or a space for `_`."""
    spelled: dict[str, str] = {}
    for column in columns:
        spelled.setdefault(re.sub(r"[\s-]+", "_", column.casefold()), column)
    found = {name: name if name in columns else spelled.get(name, "") for name in names if name}
    return {name: column for name, column in found.items() if column}


def without_patient(
    path: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]], own: Sequence[str],
    what: str = "exam",
) -> list[str]:  # fmt: skip
    """Say where exams or slides count as patients of their own, though they may be of one.

    Args:
        path: The table.
        columns: Its columns.
        rows: Its rows.
        own: Those of the columns that name the patient.
        what: What the rows are.
    """
    if not own:
        like = [column for column in columns if re.search(_PERSON, column, re.IGNORECASE)]
        return [
            f"{path}: no column 'patient', so each {what} counts as a patient of its own. Rename "
            f"{column!r} to it, if that is the patient." for column in like[:1]
        ]  # fmt: skip
    count = sum(not any(row[name] for name in own) for row in rows)
    if not 0 < count < len(rows):
        return []
    return [
        f"{path}: {count} of {len(rows)} rows name no patient in {own[0]!r}; each of them counts "
        "as a patient of its own."
    ]


def _text(cell: Any, pandas: Any) -> str:
    if cell is None or cell is pandas.NA or (isinstance(cell, float) and cell != cell):
        return ""
    if isinstance(cell, float) and cell.is_integer():  # whole numbers beside an empty cell
        return str(int(cell))
    text = str(cell).strip()
    return "" if text.lower() in _EMPTY else text
