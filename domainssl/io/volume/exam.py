"""One exam: which files show it, whose it is, what is known of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Exam", "Wanted", "stem_of"]

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
        series: Which series of a DICOM folder a modality reads, where the folder holds several.
        source: What kind of scan it is, such as `ct` or `mr`; empty where unknown.
        label: Class of the exam; empty where unknown.
        mask: File with the class of every voxel; empty where there is none.
        anonymized: File per modality key that is not 0 where voxels were removed (a defaced head).
        day: Days since the first visit of its patient; 0 where dates are not asked for.
        date: What a table says of its date, until it is a day; empty afterwards.
    """

    id: str
    patient: str
    scans: Mapping[str, str]
    split: str = ""
    volumes: Mapping[str, int] = field(default_factory=dict)
    series: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    label: str = ""
    mask: str = ""
    anonymized: Mapping[str, str] = field(default_factory=dict)
    day: int = 0
    date: str = field(default="", repr=False)

    @property
    def files(self) -> dict[str, str]:
        """All files by what they are: the scans by modality key, and maps in parentheses."""
        removed = {f"(anonymized {name})": file for name, file in self.anonymized.items()}
        return {**self.scans, **({"(mask)": self.mask} if self.mask else {}), **removed}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is looked for.

    Attributes:
        contrasts: Name of the contrast in the data, per modality key.
        label: Column of a table that holds the class of an exam; empty for none.
        mask: Column, or name of the files, of the segmentation maps; empty for none.
        patient: Regular expression whose first group, found in an exam's id, is the patient.
        dates: Column of a table with the date of an exam; empty for none.
        may_lack: All exams may lack a contrast, as where a trained model is used.
    """

    contrasts: Mapping[str, str]
    label: str = "label"
    mask: str = "mask"
    patient: str = ""
    dates: str = ""
    may_lack: bool = False


def stem_of(path: str) -> str:
    """Return the name of a scan without the ending of its format."""
    return _SUFFIXES.sub("", os.path.basename(path.rstrip("/")))
