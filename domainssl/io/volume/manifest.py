"""Exams from a table: CSV, JSON lines or Parquet, one row per exam and one column per contrast.

Columns: `id`, `patient` (or `patient_id`), `split`, one per contrast with paths relative to the
root (an empty cell is a missing contrast), and optionally `source`, `label`, `mask`, `anon_mask`;
in upper or lower case, with `_`, `-` or a space in them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from domainssl.errors import DataError, nearest
from domainssl.io.subjects import EVERY, Found, split_of
from domainssl.io.tables import own_columns, read_table, without_patient
from domainssl.io.volume.exam import Exam, Wanted

__all__ = ["read_manifest"]

_NAMED = 5  # missing files that a message names
_OWN = ("id", "patient", "patient_id", "split", "source", "anon_mask")


def read_manifest(path: str, root: str, wanted: Wanted) -> Found[Exam]:
    """Return the exams of a table.

    Args:
        path: The table.
        root: Folder that paths in it are relative to.
        wanted: Columns to read.

    Raises:
        DataError: A column is missing, an id stands twice, or a file is not there.
    """
    columns, rows = read_table(path)
    contrasts = {name: name if c == EVERY else c for name, c in wanted.contrasts.items()}
    wanted = replace(wanted, contrasts=contrasts)
    for name, column in contrasts.items():
        if column not in columns:
            raise DataError(
                f"{path}: no column {column!r} for the modality {name!r}, only "
                f"{', '.join(columns)}.{nearest(column, columns)} Set "
                f"data.init_args.modalities.{name}.contrast to one of them."
            )
    if wanted.dates and wanted.dates not in columns:
        raise DataError(
            f"{path}: no column {wanted.dates!r} with dates, only {', '.join(columns)}."
            f"{nearest(wanted.dates, columns)} Set data.init_args.exams.dates to one of them."
        )
    for option, column in (("column", wanted.label), ("mask", wanted.mask)):
        if column and column not in (*columns, Wanted.label, Wanted.mask):
            raise DataError(
                f"{path}: no column {column!r}, only {', '.join(columns)}."
                f"{nearest(column, columns)} Set data.init_args.labels.{option} to one of them."
            )
    own = own_columns(columns, (*_OWN, wanted.label, wanted.mask))
    exams: dict[str, Exam] = {}
    missing: list[str] = []
    named = [own[name] for name in ("patient", "patient_id") if name in own]
    problems = without_patient(path, columns, rows, named)
    for number, row in enumerate(rows, 2):
        exam = _exam({**row, **{name: row[column] for name, column in own.items()}}, root, wanted,
                     f"{path}, line {number}")  # fmt: skip
        if exam is None:
            problems.append(f"{path}, line {number}: no scan of {', '.join(wanted.contrasts)}")
            continue
        if exam.id in exams:
            raise DataError(
                f"{path}, line {number}: the id {exam.id!r} stands twice; every exam needs an id "
                "of its own."
            )
        exams[exam.id] = exam
        missing += [file for file in exam.files.values() if not os.path.exists(file)]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} files that it names are not there, such as "
            f"{', '.join(missing[:_NAMED])}. Paths are relative to {root}; leave the cell empty "
            "where an exam lacks a contrast."
        )
    return Found(layout="manifest", items=list(exams.values()), problems=problems)


def _exam(row: Mapping[str, str], root: str, wanted: Wanted, where: str) -> Exam | None:
    """Return the exam of a row; None without any scan."""

    def path(column: str) -> str:
        cell = row.get(column, "") if column else ""
        return os.path.join(root, cell) if cell else ""

    cells = {name: path(column) for name, column in wanted.contrasts.items()}
    scans = {name: file for name, file in cells.items() if file}
    if not scans:
        return None
    first = os.path.relpath(next(iter(scans.values())), root)
    removed = path("anon_mask")
    named = row.get("id") or first
    split = row.get("split", "")
    if split and not split_of(split):
        raise DataError(f"{where}: split is {split!r}, expected train, val or test.")
    return Exam(
        id=named,
        patient=row.get("patient") or row.get("patient_id") or "",
        scans=scans,
        split=split_of(split),
        source=row.get("source", "").lower(),
        label=row.get(wanted.label, "") if wanted.label else "",
        mask=path(wanted.mask),
        anonymized=dict.fromkeys(scans, removed) if removed else {},
        date=row.get(wanted.dates, "") if wanted.dates else "",
    )
