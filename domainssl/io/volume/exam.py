"""One exam: which files show it, whose it is, what is known of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from domainssl.errors import DataError

__all__ = ["Exam", "Found", "Owned", "Wanted", "patients_in_two_splits", "split_of", "stem_of"]

SPLITS = ("train", "val", "test")
_OTHER_NAMES = {
    "training": "train", "tr": "train", "validation": "val", "valid": "val", "va": "val",
    "testing": "test", "ts": "test",
}  # fmt: skip
_SUFFIXES = re.compile(r"\.(nii|nrrd|nhdr|mha|mhd|mgh|mgz|hdr|img|dcm)(\.gz)?\Z", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The scans of one patient at one time.

    Attributes:
        id: Path relative to the root, or the id of a manifest.
        patient: Whose it is; exams of one patient stay in one split.
        split: `train`, `val`, `test`, or empty where the data do not say.
        scans: File, or folder of a DICOM series, per modality key; missing contrasts are not there.
        volumes: Which volume of a 4D file a modality reads, where it is one of several.
        source: What kind of scan it is, such as `ct` or `mr`; empty where unknown.
        label: Class of the exam; empty where unknown.
        mask: File with the class of every voxel; empty where there is none.
        anonymized: File that is not 0 where voxels were removed (a defaced head); empty for none.
    """

    id: str
    patient: str
    scans: Mapping[str, str]
    split: str = ""
    volumes: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    label: str = ""
    mask: str = ""
    anonymized: str = ""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is looked for.

    Attributes:
        contrasts: Name of the contrast in the data, per modality key.
        label: Column of a table that holds the class of an exam; empty for none.
        mask: Column, or name of the files, of the segmentation maps; empty for none.
        patient: Regular expression whose first group, found in an exam's id, is the patient.
    """

    contrasts: Mapping[str, str]
    label: str = "label"
    mask: str = "mask"
    patient: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a layout holds.

    Attributes:
        layout: Which one it is.
        exams: The exams, by id.
        problems: What was left out, and why.
        mask_names: Name of every value of the segmentation maps, where the data state them.
    """

    layout: str
    exams: Sequence[Exam]
    problems: Sequence[str] = ()
    mask_names: Mapping[int, str] = field(default_factory=dict)


def split_of(name: str) -> str:
    """Return `train`, `val` or `test` for the usual names of a split; empty for other words."""
    word = name.strip().lower()
    return word if word in SPLITS else _OTHER_NAMES.get(word, "")


def stem_of(path: str) -> str:
    """Return the name of a scan without the ending of its format."""
    return _SUFFIXES.sub("", os.path.basename(path.rstrip("/")))


class Owned(Protocol):
    """What belongs to a patient and to a split: an exam, a slide."""

    @property
    def patient(self) -> str:
        """Whose it is."""

    @property
    def split(self) -> str:
        """`train`, `val`, `test`, or empty where the data do not say."""


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
