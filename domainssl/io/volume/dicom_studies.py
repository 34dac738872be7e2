"""Contrasts of exams in DICOM folders that are named after none: flat exports, one per series.

A series belongs to a contrast by what it says of itself. The series of one folder are an exam, and
those of one study in several folders: `p01/<all images>`, `p01/SE2/<images>`, `p01/SE3/<images>`.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from domainssl.errors import DataError
from domainssl.io.volume.dicom import contents, series_keys
from domainssl.io.volume.dicom_words import is_asked_for

__all__ = ["Series", "Studies", "series_at", "studies_of"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A series of images in a folder.

    Attributes:
        key: Such as `mr-3`.
        word: Its contrast, such as `t1c`; empty where unknown.
        images: How many it has.
        study: Digest that tells its study from others.
        texts: What it is called; never shown.
    """

    key: str
    word: str
    images: int
    study: str = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """Key and word, for messages."""
        return f"{self.key} ({self.word})" if self.word else self.key


@dataclass(kw_only=True)
class Studies:
    """What the folders hold.

    Attributes:
        scans: By exam, then by modality: folder and key of the series.
        problems: What was left out, and why.
        seen: Series by their words, for messages.
    """

    scans: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)


def series_at(path: str) -> list[Series]:
    """Return the series with images in a folder or file, localizers left out beside others.

    Raises:
        DataError: A DICOM file is damaged.
    """
    images = [file for file in contents(path)[0] if file.what == "image"]
    placed = [f for f in images if any(p.position and p.orientation for p in f.planes)]
    keys = series_keys(placed)
    real = {
        key: group for key, group in keys.items()
        if not all(plane.is_localizer for file in group for plane in file.planes)
    }  # fmt: skip
    return [
        Series(
            key=key,
            word=group[0].word,
            images=sum(len(file.planes) for file in group),
            study=group[0].study,
            texts=group[0].texts,
        )
        for key, group in (real or keys).items()
    ]


@dataclass(frozen=True)
class _Unit:
    """Series of one folder that belong together, by modality."""

    folder: str
    number: int  # of several exams in the folder, else 0
    found: Mapping[str, str]
    studies: frozenset[str]


def studies_of(folders: Sequence[str], root: str, contrasts: Mapping[str, str]) -> Studies:
    """Return the exams of folders with DICOM series.

    Args:
        folders: Folders whose names say no contrast.
        root: Exams are named by their paths relative to it.
        contrasts: Name of the contrast, by modality key.
    """
    out = Studies()
    units = [unit for folder in folders for unit in _units(folder, contrasts, out)]
    merged: list[list[_Unit]] = []
    for unit in units:
        fitting = next(
            (
                group for group in merged
                if any(unit.studies & other.studies for other in group)
                and not any(set(unit.found) & set(other.found) for other in group)
                and all(unit.folder != other.folder for other in group)
            ),
            None,
        )  # fmt: skip
        if fitting is None:
            merged.append([unit])
        else:
            fitting.append(unit)
    for group in merged:
        files = {name: (unit.folder, key) for unit in group for name, key in unit.found.items()}
        if files:
            out.scans[_name(group, root, out.scans)] = files
    return out


def _units(folder: str, contrasts: Mapping[str, str], out: Studies) -> list[_Unit]:
    """Return the exams of one folder, and note what is left out."""
    try:
        series = series_at(folder)
    except DataError as error:
        out.problems.append(f"{error} Left out.")
        return []
    out.seen.update(s.word or "without a known word" for s in series)
    asked = {
        name: [s for s in series if is_asked_for(contrast, s.key, s.word, list(s.texts))]
        for name, contrast in contrasts.items()
    }
    if max(map(len, asked.values()), default=0) <= 1:
        parts = [asked]
    else:
        by_study: dict[str, dict[str, list[Series]]] = defaultdict(dict)
        for name, found in asked.items():
            for one in found:
                by_study[one.study].setdefault(name, []).append(one)
        parts = [by_study[study] for study in sorted(by_study)]
    units = []
    for number, part in enumerate(parts):
        chosen = {}
        for name, found in part.items():
            if len(found) > 1:
                out.problems.append(
                    f"{folder}: {len(found)} series of {name!r}: "
                    f"{', '.join(one.name for one in found)}; left out. Set "
                    f"data.init_args.modalities.{name}.contrast to the key of one, or to its "
                    "description with * for any letters, such as '*mprage*'."
                )
            elif found:
                chosen[name] = found[0].key
        studies = frozenset(s.study for found in part.values() for s in found if s.study)
        units.append(_Unit(folder, number + 1 if len(parts) > 1 else 0, chosen, studies))
    return units


def _name(group: Sequence[_Unit], root: str, taken: Mapping[str, object]) -> str:
    """Return the name of an exam: what its folders have in common below the root."""
    first = os.path.relpath(group[0].folder, root)
    shared = os.path.relpath(os.path.commonpath([unit.folder for unit in group]), root)
    name = first if shared == "." else shared
    if name == ".":  # the root itself is the folder
        name = os.path.basename(os.path.abspath(root))
    name = name.replace(os.sep, "/")
    if group[0].number:  # the first part of a name is the patient
        name = f"{name}/study_{group[0].number}"
    count, found = 1, name
    while found in taken:
        count += 1
        found = f"{name}/study_{count}"
    return found
