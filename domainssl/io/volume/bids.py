"""Exams from a BIDS folder: `sub-01/[ses-02/]anat/sub-01_ses-02_T1w.nii.gz`.

A contrast is a suffix (`T1w`), or entities and a suffix (`ce-gadolinium_T1w`): a file belongs to it
if its suffix is that, and if it has these entities and no others than `sub`, `ses` and `run`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from domainssl.errors import DataError, nearest
from domainssl.io.subjects import EVERY, Found
from domainssl.io.tables import read_table
from domainssl.io.volume.exam import Exam, Wanted, stem_of
from domainssl.io.volume.scan import scans_and_aside

__all__ = ["is_bids", "read_bids"]

_USUAL = {"t1": "T1w", "t2": "T2w", "flair": "FLAIR", "t1c": "ce-gadolinium_T1w", "pd": "PDw"}
_OWN = ("sub", "ses", "run")
_PARTICIPANTS = "participants.tsv"


def is_bids(root: str) -> bool:
    """Tell whether a folder is a BIDS data set."""
    names = os.listdir(root) if os.path.isdir(root) else []
    return "dataset_description.json" in names or any(
        re.fullmatch(r"sub-[A-Za-z0-9]+", name) and os.path.isdir(os.path.join(root, name))
        for name in names
    )


def read_bids(root: str, wanted: Wanted) -> Found[Exam]:
    """Return an exam per subject and session, derivatives apart from their maps left out.

    Raises:
        DataError: No file has the suffix of a contrast.
    """
    found = _Files(asked={n: _name(c) for n, c in wanted.contrasts.items()}, mask=wanted.mask)
    paths, aside = scans_and_aside(root)
    for path in paths:
        found.add(path, os.path.relpath(path, root).split(os.sep)[:-1])
    found.problems += aside.told(root)
    _must_be_there(root, wanted, found.scans, found.seen, aside.told(root))
    labels = _labels(root, wanted.label, {exam.split("/")[0] for exam in found.scans})
    dates = _dates(root, found.scans, wanted.dates) if wanted.dates else {}
    exams = [
        Exam(
            id=exam,
            patient=exam.split("/")[0],
            scans=files,
            label=labels.get(exam.split("/")[0], ""),
            mask=found.masks.get(exam, ""),
            date=dates.get(exam, ""),
        )
        for exam, files in found.scans.items()
    ]
    return Found(layout="bids", items=exams, problems=[*found.problems, *found.left_out(root)])


@dataclass(kw_only=True)
class _Files:
    """The files of a BIDS folder, by what their names say.

    Attributes:
        asked: Entities and suffix of each modality.
        mask: Suffix of segmentation maps beside `dseg`; empty where none are wanted.
        scans: File of each modality, by exam.
        masks: Segmentation map of each exam.
        seen: Entities and suffixes that are there.
        unlike: Of each modality, files of its suffix that are not read.
        problems: What is doubtful.
    """

    asked: Mapping[str, tuple[dict[str, str], str]]
    mask: str
    scans: dict[str, dict[str, str]] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    unlike: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, path: str, folders: Sequence[str]) -> None:
        """Sort a file in.

        Args:
            path: The file.
            folders: Those below the root that it lies in.
        """
        entities, suffix = _entities(stem_of(path))
        if "sub" not in entities:
            return
        exam = "/".join(f"{e}-{entities[e]}" for e in _OWN[:2] if e in entities)
        if suffix in (self.mask, "dseg") and self.mask:
            self._add_mask(exam, path)
            return
        if folders[:1] and folders[0] in ("derivatives", "sourcedata"):
            return
        others = {k: v for k, v in entities.items() if k not in _OWN}
        if f"sub-{entities['sub']}" not in folders:
            self.problems.append(
                f"{path}: lies in the folder of another subject; by its name it is of "
                f"sub-{entities['sub']}, as which it is read"
            )
        self.seen.add("_".join([*(f"{k}-{v}" for k, v in others.items()), suffix]))
        for name, (entities_of, suffix_of) in self.asked.items():
            if suffix_of == EVERY:
                self.scans[f"{exam}/{stem_of(path)}"] = {name: path}
            if (suffix, others) == (suffix_of, entities_of):
                self._add_scan(exam, name, path)
            elif suffix.lower() == suffix_of.lower():
                self.unlike.setdefault(name, []).append(path)

    def _add_mask(self, exam: str, path: str) -> None:
        if self.masks.setdefault(exam, path) != path:
            self.problems.append(
                f"{path}: another segmentation map of {exam} beside {self.masks[exam]}; left out, "
                "the first one is read."
            )

    def _add_scan(self, exam: str, name: str, path: str) -> None:
        files = self.scans.setdefault(exam, {})
        if files.setdefault(name, path) != path:
            self.problems.append(
                f"{path}: another run of {name!r} beside {files[name]}; left out, the first one "
                "is read."
            )

    def left_out(self, root: str) -> list[str]:
        """Say which files have the suffix of a modality, but other entities."""
        return [
            f"{root}: {len(files)} files end in {self.asked[name][1]!r}, but have other entities "
            f"than {name!r} asks for, such as {os.path.basename(files[0])}; left out. To read them "
            f"set data.init_args.modalities.{name}.contrast to what stands behind sub, ses and run"
            for name, files in self.unlike.items()
        ]


def _name(contrast: str) -> tuple[dict[str, str], str]:
    """Return entities and suffix of a contrast."""
    return _entities(_USUAL.get(contrast, contrast))


def _entities(stem: str) -> tuple[dict[str, str], str]:
    """Take a file name apart: `sub-01_ce-gd_T1w` has two entities and a suffix."""
    *parts, suffix = stem.split("_")
    pairs = (part.partition("-") for part in parts)
    return {key: value for key, mark, value in pairs if mark}, suffix


def _must_be_there(
    root: str,
    wanted: Wanted,
    scans: Mapping[str, Mapping[str, str]],
    seen: set[str],
    told: Sequence[str],
) -> None:
    there = {name for files in scans.values() for name in files}
    if there and wanted.may_lack:
        return
    for name, contrast in wanted.contrasts.items():
        if name not in there:
            word = _USUAL.get(contrast, contrast)
            raise DataError(
                f"{root}: no file of the BIDS folder ends in {word!r}, as modality {name!r} asks "
                f"for; there are {', '.join(sorted(seen)[:12]) or 'no scans'}."
                f"{nearest(word, seen)} Set data.init_args.modalities.{name}.contrast to one of "
                f"them.{''.join(f' {line}' for line in told)}"
            )


def _labels(root: str, column: str, subjects: Set[str]) -> dict[str, str]:
    """Return the class of each participant, by `sub-…`.

    Raises:
        DataError: The table names none of the subjects that have scans.
    """
    path = os.path.join(root, _PARTICIPANTS)
    if not column or not os.path.isfile(path):
        return {}
    columns, rows = read_table(path)
    if column not in columns or "participant_id" not in columns:
        return {}
    found = {f"sub-{row['participant_id'].removeprefix('sub-')}": row[column] for row in rows}
    if found and subjects and not subjects & found.keys():
        raise DataError(
            f"{path}: none of its {len(found)} participants has scans: it names "
            f"{min(found)!r}, the folders are called {min(subjects)!r}. Write participant_id as "
            "the folders are called."
        )
    return {name: value for name, value in found.items() if value and value.lower() != "n/a"}


def _dates(root: str, scans: Mapping[str, Mapping[str, str]], column: str) -> dict[str, str]:
    """Return the date of each exam: of its session, else of its first scan that has one."""
    found: dict[str, str] = {}
    for exam, files in scans.items():
        subject, _, session = exam.partition("/")
        sessions = os.path.join(root, subject, f"{subject}_sessions.tsv")
        cells = _column(sessions, "session_id", column) if session else {}
        text = cells.get(session, "")
        if not text:
            folder = os.path.join(root, *exam.split("/"))
            stem = "_".join(part for part in (subject, session) if part)
            cells = _column(os.path.join(folder, f"{stem}_scans.tsv"), "filename", column)
            names = (os.path.relpath(path, folder).replace(os.sep, "/") for path in files.values())
            text = next((cells[name] for name in names if cells.get(name)), "")
        found[exam] = text
    return found


def _column(path: str, key: str, column: str) -> dict[str, str]:
    """Return a column of a table by another one; empty without the table or either of them."""
    if not os.path.isfile(path):
        return {}
    columns, rows = read_table(path)
    if column not in columns or key not in columns:
        return {}
    return {row[key]: row[column] for row in rows if row[column].lower() not in ("", "n/a")}
