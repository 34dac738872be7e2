"""Tables that list slides, and the resolution that a row states for those whose files do not.

slides = listed_slides("slides.csv")        # TRIDENT's `wsi,mpp`; path, slide_id ...
known = stated_in("/data/slides", paths)    # of the table in a folder, by path
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from domainssl.errors import DataError
from domainssl.io.slide.facts import MPP_RANGE_UM
from domainssl.io.slide.picture import advice_on_pictures
from domainssl.io.slide.pyramid import ENDINGS, list_slides
from domainssl.io.tables import MANIFESTS, own_columns, read_table

__all__ = [
    "TABLES", "ListedSlide", "MppColumns", "file_column", "is_slide_table", "listed_slides",
    "slides_at", "stated_in", "stem_of", "with_ending",
]  # fmt: skip

_MPP = ("mpp_um", "mpp")
_FILES = ("path", "wsi", "file", "filename", "slide", "slide_id")  # columns that name a slide
TABLES = (".csv", ".parquet", ".jsonl")
_ENDING = re.compile(rf"(\.ome)?({'|'.join(map(re.escape, ENDINGS))})\Z", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ListedSlide:
    """A slide of a table.

    Attributes:
        name: The column `id`, or the file as the table names it.
        path: Its file.
        mpp_um: Micrometres per pixel of level 0, where the row states it.
    """

    name: str
    path: str
    mpp_um: float | None = None


@dataclass(frozen=True)
class MppColumns:
    """The columns of a table that state micrometres per pixel of level 0.

    Attributes:
        of_row: The column for all files of a row, `mpp_um` or `mpp`; empty without one.
        of_files: Columns for a single column of files, such as `mpp_ihc` for `ihc`, by its name.
    """

    of_row: str
    of_files: Mapping[str, str]

    @classmethod
    def among(cls, columns: Sequence[str]) -> MppColumns:
        """Find them, in any letter case."""
        spelled = {f"{name}_{column}": column for name in _MPP for column in columns}
        own = own_columns(columns, (*_MPP, *spelled))
        return cls(
            of_row=next((own[name] for name in _MPP if name in own), ""),
            of_files={spelled[name]: own[name] for name in spelled if name in own},
        )

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.of_row or self.of_files)

    def stated(self, row: Mapping[str, str], column: str, where: str) -> float | None:
        """Return what a row says of the file in a column, None where it says nothing.

        Raises:
            DataError: It is no resolution of a slide.
        """
        own = self.of_files.get(column, "")
        name = own if own and row[own] else self.of_row
        return _resolution(row[name], f"{where}: {name}") if name and row[name] else None


def _resolution(text: str, where: str) -> float:
    low, high = MPP_RANGE_UM
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise DataError(
            f"{where} is {text!r}, expected micrometres per pixel of level 0 between {low:g} and "
            f"{high:g}, such as 0.25 of a scan at 40x. Correct it, or leave the cell empty where "
            "the file of the slide states it."
        )
    return value


def stem_of(name: str) -> str:
    """Return the name of a slide without the ending of its file."""
    return _ENDING.sub("", name)


def slides_at(path: str) -> list[ListedSlide]:
    """Return the slides at a path, named by their paths below it.

    Args:
        path: A slide, a folder with some, or a table of slides. A table in the folder
            (`manifest.csv`) may state their resolutions.

    Raises:
        DataError: There is none, or a table cannot be used.
    """
    if os.path.isdir(path):
        inside = list_slides(path)
        if not inside:
            raise DataError(
                f"{path}: holds no slides, expected files that end in {', '.join(ENDINGS)}."
                + advice_on_pictures(path)
            )
        stated = stated_in(path, inside)
        return [
            ListedSlide(name=os.path.relpath(file, path), path=file, mpp_um=stated.get(file))
            for file in inside
        ]
    if not os.path.exists(path):
        raise DataError(
            f"{path}: nothing lies there. Give slides, folders with slides, or a table of slides."
        )
    if path.lower().endswith(TABLES):
        return listed_slides(path)
    return [ListedSlide(name=os.path.basename(path), path=path)]


def is_slide_table(path: str) -> bool:
    """Tell whether a file is a table of slides: by its ending and its columns.

    Raises:
        DataError: It has the ending of a table, but cannot be read.
    """
    if not path.lower().endswith(TABLES) or not os.path.isfile(path):
        return False
    columns, rows = read_table(path)
    own = own_columns(columns, _FILES)
    return any(row[column].lower().endswith(ENDINGS) for row in rows for column in own.values())


def listed_slides(path: str) -> list[ListedSlide]:
    """Return the slides of a table, in its order.

    A column names their files, relative to the folder of the table; names without an ending are
    those of the slide that lies there. `id` names what is written of them, `mpp_um` or `mpp` is
    their resolution.

    Raises:
        DataError: It is no such table, names a slide twice, or states an impossible resolution.
    """
    columns, rows = read_table(path)
    own, column = own_columns(columns, ("id",)), file_column(columns)
    if column is None:
        raise DataError(
            f"{path}: no column {', '.join(_FILES)}, only {', '.join(columns)}. One of them names "
            "the file of every slide, relative to the folder of the table."
        )
    stated, base = MppColumns.among(columns), os.path.dirname(path)
    found: dict[str, ListedSlide] = {}
    for number, row in enumerate(rows, 2):
        where, cell = f"{path}, line {number}", row[column]
        if not cell:
            raise DataError(f"{where}: {column} is empty, expected the file of a slide.")
        file = with_ending(os.path.join(base, cell))
        if file in found:
            raise DataError(f"{where}: {cell!r} stands twice; keep one row per slide.")
        name = row.get(own.get("id", ""), "") or os.path.relpath(file, base or os.curdir)
        found[file] = ListedSlide(name=name, path=file, mpp_um=stated.stated(row, column, where))
    if not found:
        raise DataError(f"{path}: has no row. Write one per slide: {column}, mpp_um.")
    return list(found.values())


def file_column(columns: Sequence[str]) -> str | None:
    """Return the column of a table that names the file of a slide, in any letter case."""
    own = own_columns(columns, _FILES)
    return next((own[name] for name in _FILES if name in own), None)


def with_ending(path: str) -> str:
    """Return the file that a table names with its ending or without; as it stands if none is."""
    if os.path.exists(path):
        return path
    return next((path + ending for ending in ENDINGS if os.path.isfile(path + ending)), path)


def stated_in(folder: str, slides: Sequence[str]) -> dict[str, float]:
    """Return what the table in a folder says of the resolution of its slides, by path.

    A row speaks of the slides that its cells name by their path below the folder; of a row without
    one, of those that `slide_id`, `wsi` and their like name, with an ending or without.

    Args:
        folder: Which may hold `manifest.csv`, `.parquet` or `.jsonl`.
        slides: Paths of slides below it.

    Raises:
        DataError: The table cannot be read, or states two resolutions of a slide.
    """
    table = next((p for n in MANIFESTS if os.path.isfile(p := os.path.join(folder, n))), None)
    if table is None:
        return {}
    columns, rows = read_table(table)
    stated = MppColumns.among(columns)
    if not stated:
        return {}
    paths = {os.path.relpath(slide, folder): slide for slide in slides}
    names: dict[str, list[str]] = {}
    for relative, slide in paths.items():
        for name in {stem_of(relative), *_without_folder(relative)}:
            names.setdefault(name, []).append(slide)
    own = own_columns(columns, (*_FILES, "id")).values()
    found: dict[str, float] = {}
    for number, row in enumerate(rows, 2):
        where = f"{table}, line {number}"
        meant = [(c, paths[p]) for c, cell in row.items() if (p := os.path.normpath(cell)) in paths]
        if not meant:
            meant = [(c, slide) for c in own for slide in names.get(row[c], ())]
        for column, slide in meant:
            value = stated.stated(row, column, where)
            if value is not None and found.setdefault(slide, value) != value:
                raise DataError(
                    f"{where}: {value:g} um per pixel for {slide}, which has {found[slide]:g} in "
                    "another row. Keep one row per slide."
                )
    return found


def _without_folder(relative: str) -> tuple[str, str]:
    name = os.path.basename(relative)
    return name, stem_of(name)
