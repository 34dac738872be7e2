"""What exams, slides and tiles have in common: a patient, a split, a name in a folder."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from domainssl.errors import DataError

__all__ = [
    "EVERY", "Found", "Owned", "alike", "ends_with", "first_few", "patients_in_two_splits",
    "shared_files", "split_of",
]  # fmt: skip

EVERY = "*"  # as the name of a contrast or stain: every file is an exam or a tile
_NAMED = 5  # of many, that are named
SPLITS = ("train", "val", "test")
_OTHER_NAMES = {
    "training": "train", "tr": "train", "validation": "val", "valid": "val", "va": "val",
    "testing": "test", "ts": "test",
}  # fmt: skip


class Owned(Protocol):
    """What belongs to a patient and to a split: an exam, a slide."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def patient(self) -> str:
        """Whose it is."""

    @property
    def split(self) -> str:
        """`train`, `val`, `test`, or empty where the data do not say."""


Item = TypeVar("Item", bound=Owned, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Found(Generic[Item]):
    """What a data set holds.

    Attributes:
        layout: Which one it is.
        items: The exams or slides, by id.
        problems: What was left out, and why.
        mask_names: Name of every value of the segmentation maps, where the data state them.
    """

    layout: str
    items: Sequence[Item]
    problems: Sequence[str] = ()
    mask_names: Mapping[int, str] = field(default_factory=dict)


def split_of(name: str) -> str:
    """Return `train`, `val` or `test` for the usual names of a split; empty for other words."""
    word = name.strip().lower()
    return word if word in SPLITS else _OTHER_NAMES.get(word, "")


def ends_with(stem: str, name: str) -> str | None:
    """Return what stands before `name` at the end of a stem; None where it is not there."""
    found = re.fullmatch(rf"(?:(.*?)[^A-Za-z0-9]+)?{re.escape(name)}", stem, re.IGNORECASE)
    return None if found is None else found[1] or ""


def patients_in_two_splits(found: Iterable[Owned], where: str, what: str = "Exams") -> None:
    """Refuse exams of one patient in two splits: results on held-out exams would mean nothing.

    Raises:
        DataError: Lists the patients.
    """
    splits: dict[str, set[str]] = {}
    for exam in found:
        splits.setdefault(exam.patient, set()).add(exam.split or "no split")
    torn = [f"{name} ({', '.join(sorted(s))})" for name, s in sorted(splits.items()) if len(s) > 1]
    if torn:
        more = f", and {len(torn) - 20} more" if len(torn) > 20 else ""
        raise DataError(
            f"{where}: {len(torn)} patient(s) appear in two splits: {', '.join(torn[:20])}{more}. "
            f"{what} of one patient belong in one split; correct the column or the folders."
        )


def alike(items: Iterable[Owned], where: str) -> list[str]:
    """Say which patients differ in upper and lower case alone: they may be one."""
    names: dict[str, str] = {}
    found = {}
    for item in items:
        other = names.setdefault(item.patient.casefold(), item.patient)
        if other != item.patient:
            found[other] = item.patient
    return [
        f"{where}: {other!r} and {name!r} count as two patients, which differ in upper and lower "
        "case alone; write them alike if they are one"
        for other, name in list(found.items())[:_NAMED]
    ]


def shared_files(
    files: Iterable[tuple[Hashable, str, Owned]], where: str, what: str = "scan", of: str = "exams"
) -> list[str]:
    """Say which file is that of two patients; a held-out patient would be trained on.

    Args:
        files: What tells a file from others, its path, and the exam or slide that it is of.
        where: The data, for messages.
        what: What the files are.
        of: What they are of.

    Raises:
        DataError: It is, in two splits.
    """
    owners: dict[Hashable, Owned] = {}
    found: list[str] = []
    for place, path, item in files:
        other = owners.setdefault(place, item)
        if other.patient == item.patient:
            continue
        text = (
            f"{path}: is a {what} of {other.id} and of {item.id}, which are {of} of different "
            f"patients. Give {of} of one patient one name, or correct the path."
        )
        if other.split != item.split:
            raise DataError(
                f"{text} They are in the splits {other.split or 'none'} and {item.split or 'none'}."
            )
        found.append(text)
    return first_few(found, f"{where}: {len(found)} {what}s in all are of several patients.")


def first_few(texts: Sequence[str], summary: str) -> list[str]:
    """Return texts, or the first five and a summary where there are more."""
    return [*texts[:_NAMED], summary] if len(texts) > _NAMED else list(texts)
