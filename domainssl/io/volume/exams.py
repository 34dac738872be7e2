"""Find the exams of a data set, whatever its layout.

found = find_exams("/data/brain", Wanted(contrasts={"t1": "t1", "flair": "flair"}))
found.items[0].scans        # {"t1": "/data/brain/p01/t1.nii.gz", ...}
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.subjects import Found, alike, patients_in_two_splits, shared_files
from domainssl.io.tables import MANIFESTS
from domainssl.io.volume.bids import is_bids, read_bids
from domainssl.io.volume.collections import (
    is_decathlon,
    is_nnssl,
    is_nnunet,
    read_decathlon,
    read_nnssl,
    read_nnunet,
)
from domainssl.io.volume.exam import Exam, Wanted
from domainssl.io.volume.folder import read_folder
from domainssl.io.volume.manifest import read_manifest
from domainssl.io.volume.visits import with_days

__all__ = ["LAYOUTS", "find_exams", "layout_of"]


def _has(*names: str) -> Callable[[str], bool]:
    return lambda root: any(os.path.isfile(os.path.join(root, name)) for name in names)


# layout -> (recognises a folder, reads it), in the order in which they are asked
LAYOUTS: Mapping[str, tuple[Callable[[str], bool], Callable[[str, Wanted], Found[Exam]]]] = {
    "manifest": (_has(*MANIFESTS), lambda root, wanted: _table_in(root, wanted)),
    "nnssl": (is_nnssl, read_nnssl),
    "nnunet": (is_nnunet, read_nnunet),
    "decathlon": (is_decathlon, read_decathlon),
    "bids": (is_bids, read_bids),
    "folder": (os.path.isdir, read_folder),
}


_DATED = ("manifest", "bids")  # layouts that state dates of exams
_NAMED = 5  # scans that are named


def _table_in(root: str, wanted: Wanted) -> Found[Exam]:
    paths = [os.path.join(root, name) for name in MANIFESTS]
    there = [path for path in paths if os.path.isfile(path)]
    if not there:
        raise ConfigError(
            f"data.init_args.exams.layout: manifest, but {root} has none of "
            f"{', '.join(MANIFESTS)}. Name the table in data.init_args.exams.manifest."
        )
    return read_manifest(there[0], root, wanted)


def layout_of(root: str) -> str | None:
    """Return the layout of a folder, None where there is none."""
    return next((name for name, (recognise, _) in LAYOUTS.items() if recognise(root)), None)


def find_exams(
    root: str, wanted: Wanted, *, manifest: str | None = None, layout: str = "auto"
) -> Found[Exam]:
    """Return the exams under a folder, by id; those of one patient are in one split.

    Args:
        root: The folder.
        wanted: Contrasts, labels and maps that are looked for.
        manifest: A table that lists the exams; paths in it are relative to the root.
        layout: One of `LAYOUTS`, or `auto`, which recognises it.

    Raises:
        ConfigError: There is no such folder, manifest or layout.
        DataError: Files or columns are missing, or a patient is in two splits.
    """
    if not os.path.isdir(root):
        raise ConfigError(
            f"data.init_args.root: {root!r} is no folder. Give one with scans, or an embedded "
            "sample: sample:ctmr, sample:petct, sample:upright, sample:brain, sample:heads, "
            "sample:visits, sample:organs or sample:lesions."
        )
    if layout != "auto" and layout not in LAYOUTS:
        raise ConfigError(
            f"data.init_args.exams.layout: got {layout!r}, expected auto or one of "
            f"{', '.join(LAYOUTS)}.{nearest(layout, LAYOUTS)}"
        )
    if manifest is not None:
        path = os.path.join(root, manifest)
        if not os.path.isfile(path):
            raise ConfigError(
                f"data.init_args.exams.manifest: there is no file {path!r}; expected a CSV, JSON "
                "lines or Parquet file, relative to the root or absolute."
            )
        found = read_manifest(path, root, wanted)
    else:
        named = layout_of(root) if layout == "auto" else layout
        assert named is not None  # a folder is at least a plain one
        if wanted.dates and named not in _DATED:
            raise ConfigError(
                f"data.init_args.exams.dates: the layout {named!r} states no dates, "
                f"{' and '.join(_DATED)} do. Write a manifest with a column {wanted.dates!r}."
            )
        found = LAYOUTS[named][1](root, wanted)
    if not found.items:
        raise DataError(
            f"{root}: no exam with {' or '.join(wanted.contrasts)} in it (layout {found.layout}). "
            f"{found.problems[0] if found.problems else 'Check data.init_args.modalities.'}"
        )
    if wanted.label not in ("", Wanted.label) and not any(exam.label for exam in found.items):
        raise DataError(
            f"{root}: data.init_args.labels.column is {wanted.label!r}, but no exam has a class "
            f"there (layout {found.layout}). It is a column of the manifest, or of "
            "participants.tsv in BIDS; other layouts state none."
        )
    exams = [_with_patient(exam, wanted.patient) for exam in found.items]
    patients_in_two_splits(exams, root)
    exams, again = _once(exams, root)
    shared = shared_files(_files(exams), root)
    problems = [*found.problems, *again, *shared, *alike(exams, root)]
    if wanted.dates:
        exams = with_days(exams, root, wanted.dates)
    exams.sort(key=lambda exam: exam.id)
    return dataclasses.replace(found, items=exams, problems=problems)


def _once(exams: Sequence[Exam], root: str) -> tuple[list[Exam], list[str]]:
    """Return exams by different ids; one that is listed twice is taken once.

    Raises:
        DataError: Different exams have one id.
    """
    known: dict[str, Exam] = {}
    again = []
    for exam in exams:
        other = known.setdefault(exam.id, exam)
        if other is exam:
            continue
        if other != exam:
            raise DataError(
                f"{root}: two different exams have the id {exam.id!r}; every exam needs an id of "
                "its own. Correct the list of files."
            )
        again.append(exam.id)
    if not again:
        return list(exams), []
    text = f"{root}: {len(again)} exams are listed twice and taken once, such as {again[0]}"
    return list(known.values()), [text]


def _files(exams: Sequence[Exam]) -> Iterator[tuple[Hashable, str, Exam]]:
    """Yield each scan, told from others by its path, volume and series."""
    for exam in exams:
        for name, path in exam.scans.items():
            place = os.path.normpath(path), exam.volumes.get(name), exam.series.get(name)
            yield place, path, exam


def _with_patient(exam: Exam, pattern: str) -> Exam:
    """Return the exam with the patient that its id names, or its own id where nothing does."""
    if not pattern:
        return dataclasses.replace(exam, patient=exam.patient or exam.id)
    found = re.search(pattern, exam.id)
    if found is None or not found.re.groups or not found[1]:
        raise DataError(
            f"data.init_args.exams.patient: {pattern!r} finds no group in the id {exam.id!r}; "
            "expected a regular expression with one group, such as '(sub-[0-9]+)'."
        )
    return dataclasses.replace(exam, patient=found[1])
