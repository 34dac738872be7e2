"""When exams of a patient were made: days since the first of them, never a date.

Dates of a table are turned into distances as soon as they are read; nothing that is kept, batched
or written holds the date itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from domainssl.errors import DataError
from domainssl.io.volume.exam import Exam

__all__ = ["with_days"]

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
_COMPACT = re.compile(r"(1[89]|2[01])\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")
_NAMED = 5  # exams that a message names


def with_days(exams: Sequence[Exam], where: str, column: str) -> list[Exam]:
    """Return the exams with `day`, counted from the first visit of their patient, and no date.

    Args:
        exams: With the text of the column in `date`, and their patients.
        where: Folder or table, for messages.
        column: Name of the column, likewise.

    Raises:
        DataError: A text is missing or no date, or a patient has dates beside numbers of days.
    """
    unknown = [exam.id for exam in exams if not exam.date]
    if unknown:
        raise DataError(
            f"{where}: {len(unknown)} of {len(exams)} exams have no date in {column!r}, such as "
            f"{', '.join(unknown[:_NAMED])}. Add them (or days since the first visit), leave these "
            "exams out, or set data.init_args.exams.dates: '' to train on single exams."
        )
    known = {exam.id: _day(exam, where, column) for exam in exams}
    first: dict[str, tuple[int, bool]] = {}
    for exam in exams:
        day, is_date = known[exam.id]
        lowest, other = first.get(exam.patient, (day, is_date))
        if other != is_date:
            raise DataError(
                f"{where}: {column!r} holds dates and numbers of days for the exams of one "
                f"patient, such as {exam.id}. Give all exams of a patient the one or the other."
            )
        first[exam.patient] = min(day, lowest), is_date
    return [
        replace(exam, date="", day=known[exam.id][0] - first[exam.patient][0]) for exam in exams
    ]


def _day(exam: Exam, where: str, column: str) -> tuple[int, bool]:
    """Return the day that a text means, and whether it is a date."""
    text = exam.date.strip()
    if _NUMBER.fullmatch(text) and not _COMPACT.fullmatch(text):
        return round(float(text)), False
    try:
        return datetime.fromisoformat(text.replace("/", "-")).toordinal(), True
    except ValueError:
        raise DataError(
            f"{where}: the date of {exam.id} in {column!r} is neither a date such as 2019-05-03 "
            "nor a number of days since the first visit. Visits that are named (bl, m12, V2) have "
            "no distance in time: add a column with days."
        ) from None
