"""Exams from a plain folder: one file or DICOM series per exam and contrast.

A scan belongs to a contrast whose name ends its file name (`p01_t1.nii.gz`, `p01/t1.nii.gz`) or is
one of its folders (`t1/p01.nii.gz`, `p01/t1/<series>`). The rest of the path is the exam, its first
folder the patient; folders named `train`, `val` or `test` say the split. DICOM folders that no name
of a contrast is in are asked what their series show.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from domainssl.errors import DataError, counted, nearest
from domainssl.io.subjects import EVERY, Found, ends_with, split_of
from domainssl.io.volume.dicom import some_names
from domainssl.io.volume.dicom_studies import Studies, studies_of
from domainssl.io.volume.exam import Exam, Wanted, stem_of
from domainssl.io.volume.scan import scans_and_aside

__all__ = ["MASKS", "NoScanNamedError", "read_folder"]

MASKS = ("mask", "labels", "label", "seg", "segmentation", "dseg", "gt")
_CROWD = 8  # exams of one patient that are no surprise
_ANONYMIZED = "anon_mask"


class NoScanNamedError(DataError):
    """There are scans, but none is named like a contrast that is asked for."""


@dataclass(kw_only=True)
class _Sorted:
    """What the names of files say of them."""

    scans: dict[str, dict[str, str]] = field(default_factory=dict)  # exam -> name of modality
    extra: dict[str, dict[str, str]] = field(default_factory=dict)  # of each exam: mask, anonymized
    matched: set[str] = field(default_factory=set)  # modalities
    seen: list[str] = field(default_factory=list)  # names of all scans
    unnamed: list[str] = field(default_factory=list)  # folders with DICOM
    problems: list[str] = field(default_factory=list)


def read_folder(root: str, wanted: Wanted) -> Found[Exam]:
    """Return the exams of a folder.

    Raises:
        DataError: No scan has the name of a contrast.
    """
    names = {**wanted.contrasts}
    masks: tuple[str, ...] = (wanted.mask,)
    if not wanted.mask or wanted.mask in MASKS:  # maps are no scans, wanted or not
        masks = tuple(name for name in MASKS if name not in names.values())
    paths, aside = scans_and_aside(root)
    found = _sorted(paths, root, names, masks)
    scans, extra = found.scans, found.extra
    problems = [*aside.told(root), *found.problems]
    problems += _maps(aside.maps, root, masks, extra) if wanted.mask else []
    studies = studies_of(found.unnamed, root, names)
    problems += studies.problems
    for exam, parts_of in studies.scans.items():
        for name, (path, _) in parts_of.items():
            found.matched.add(name)
            scans.setdefault(exam, {}).setdefault(name, path)
    needed = {} if wanted.may_lack and found.matched else names
    if not found.seen and not extra and (aside.lost or aside.linked):
        raise DataError(f"{root}: no scan there. {' '.join(aside.told(root))}")
    _must_match(root, needed, found.matched, found.seen, len(extra), studies)
    if not wanted.mask:
        extra = {exam: {k: v for k, v in e.items() if k != "mask"} for exam, e in extra.items()}
    problems += _assign(extra, scans, names)
    exams = [
        _exam(exam, files, extra.get(exam, {}), studies.scans.get(exam, {}))
        for exam, files in sorted(scans.items())
    ]
    if not wanted.patient:
        problems += _crowds(root, exams)
    return Found(layout="folder", items=exams, problems=problems)


def _sorted(
    paths: Sequence[str], root: str, names: Mapping[str, str], masks: Sequence[str]
) -> _Sorted:
    """Sort scans and maps by exam, contrasts by modality."""
    found = _Sorted()
    for path in paths:
        parts = _parts(path, root)
        place = _other(parts, masks)
        if place is not None:
            kind, of = place
            found.extra.setdefault(of, {}).setdefault(kind, path)
            continue
        found.seen.append(parts[-1])
        exams = {
            name: "/".join(parts) if contrast == EVERY else _exam_of(parts, contrast)
            for name, contrast in names.items()
        }
        shown = {name: exam for name, exam in exams.items() if exam is not None}
        if not shown and os.path.isdir(path):
            found.unnamed.append(path)
        for name, exam in shown.items():
            found.matched.add(name)
            files = found.scans.setdefault(exam, {})
            if name in files:
                found.problems.append(
                    f"{path}: a second scan of {name!r} beside {files[name]}; left out. Give "
                    f"data.init_args.modalities.{name}.contrast a longer name to tell them apart."
                )
            else:
                files[name] = path
    return found


def _parts(path: str, root: str) -> list[str]:
    """Return the folders below the root and the name without its ending."""
    relative = os.path.relpath(path, root)
    if relative == ".":  # the root itself is a series
        return [os.path.basename(os.path.abspath(root))]
    return [*relative.split(os.sep)[:-1], stem_of(relative)]


def _exam_of(parts: Sequence[str], contrast: str) -> str | None:
    """Return the exam of a scan that shows a contrast; None where its name says another."""
    before = ends_with(parts[-1], contrast)
    if before is not None:
        folders = list(parts[:-1])
        if before and before not in folders[-1:]:  # BraTS repeats the case in the name
            folders.append(before)
        return "/".join(folders) or parts[-1]
    lowered = [part.lower() for part in parts[:-1]]
    if contrast.lower() not in lowered:
        return None
    at = lowered.index(contrast.lower())
    return "/".join(parts[:at] if at and not split_of(parts[at - 1]) else
                    [*parts[:at], *parts[at + 1 :]])  # fmt: skip


def _other(parts: Sequence[str], masks: Sequence[str]) -> tuple[str, str] | None:
    """Return `mask` or `anonymized` and the exam, where a file is one; None for a scan."""
    for kind, names in (("anonymized", (_ANONYMIZED,)), ("mask", masks)):
        for name in names:
            exam = _exam_of(parts, name)
            if exam is not None:
                return kind, exam
    return None


def _maps(
    paths: Sequence[str], root: str, masks: Sequence[str], extra: dict[str, dict[str, str]]
) -> list[str]:
    """Give DICOM segmentations that are named like maps to their exams; tell of the others."""
    others = []
    for path in paths:
        place = _other(_parts(path, root), masks)
        if place is None:
            others.append(os.path.relpath(path, root))
        else:
            extra.setdefault(place[1], {}).setdefault(place[0], path)
    if not others:
        return []
    return [
        f"{root}: {counted(len(others), 'DICOM segmentation')} left out, not named like one: "
        f"{some_names(others)}. Name the files or their folders {masks[0]!r}, or list them in the "
        "column of the label maps in a manifest."
    ]


def _assign(
    extra: dict[str, dict[str, str]],
    scans: Mapping[str, Mapping[str, str]],
    names: Mapping[str, str],
) -> list[str]:
    """Give maps named after a scan (`t1_seg`) to its exam; return those that belong to none."""
    problems = []
    for name in sorted(set(extra).difference(scans)):
        parts = name.split("/")
        found = [_exam_of(parts, contrast) for contrast in names.values() if contrast != EVERY]
        exam = next((e for e in found if e in scans), None)
        for kind, path in extra[name].items():
            if exam is None:
                problems.append(f"{path}: belongs to no scan that is read; left out.")
            else:
                extra.setdefault(exam, {}).setdefault(kind, path)
    return problems


def _crowds(root: str, exams: Sequence[Exam]) -> list[str]:
    """Return a doubt about every folder that is taken for one patient with many exams."""
    counts = Counter(exam.patient for exam in exams if "/" in exam.id)
    return [
        f"{os.path.join(root, name)}: taken for one patient with {count} exams, which stay in one "
        "split. If it holds several, set data.init_args.exams.patient to a regular expression "
        "with one group that finds the patient in an exam's path."
        for name, count in counts.items()
        if count > _CROWD
    ]


def _must_match(
    root: str, names: dict[str, str], matched: set[str], seen: Sequence[str], others: int,
    studies: Studies,
) -> None:  # fmt: skip
    if not seen and others:
        raise DataError(
            f"{root}: no scan there, only {others} segmentation maps, as their names say "
            f"({', '.join(MASKS)}). Rename those that are scans."
        )
    if not seen:
        raise DataError(
            f"{root}: no volume there (NIfTI, NRRD, MetaImage, MGZ or a DICOM series). Check "
            "data.init_args.root, or take an embedded sample, such as sample:ctmr."
        )
    for name, contrast in names.items():
        if name not in matched:
            shown = sorted(set(seen))
            series = studies.seen
            said = ", ".join(f"{count} {word}" for word, count in series.items())
            said = f" By what DICOM series say they are {said}." if series else ""
            said += "".join(f" {text}" for text in studies.problems[:1])
            words = ", or to one of these words or the description of a series" if series else ""
            raise NoScanNamedError(
                f"{root}: no scan ends with or lies in a folder {contrast!r}, as modality "
                f"{name!r} asks for; there are {len(shown)} names, such as "
                f"{', '.join(shown[:6])}.{said}{nearest(contrast, [*shown, *series])} Set "
                f"data.init_args.modalities.{name}.contrast to the end of the file names, or to "
                f"'{EVERY}' where every scan is an exam{words}."
            )


def _exam(
    name: str, scans: dict[str, str], extra: dict[str, str],
    series: Mapping[str, tuple[str, str]],
) -> Exam:  # fmt: skip
    folders = name.split("/")
    split = split_of(folders[0]) if len(folders) > 1 else ""
    return Exam(
        id=name,
        patient=folders[1 if split else 0],
        scans=scans,
        series={n: key for n, (path, key) in series.items() if scans[n] == path},
        split=split,
        mask=extra.get("mask", ""),
        anonymized=dict.fromkeys(scans, extra["anonymized"]) if "anonymized" in extra else {},
    )
