"""Exams listed in the JSON files of collections: Medical Decathlon, nnU-Net raw, nnssl."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from domainssl.errors import DataError, nearest, parsing
from domainssl.files import read_json
from domainssl.io.subjects import EVERY, Found
from domainssl.io.volume.exam import Exam, Wanted, stem_of

__all__ = [
    "is_decathlon",
    "is_nnssl",
    "is_nnunet",
    "read_decathlon",
    "read_nnssl",
    "read_nnunet",
]

_DATASET = "dataset.json"
_PRETRAIN = "pretrain_data.json"
_NAMED = 5
_PACKED = ".b2nd"  # arrays that nnssl writes beside its preprocessed list
_ADVICE = "The file is not in the form of its publisher."


def _dataset(root: str) -> Mapping[str, Any]:
    path = os.path.join(root, _DATASET)
    if not os.path.isfile(path):
        return {}
    content = read_json(path)
    return content if isinstance(content, Mapping) else {}


def is_decathlon(root: str) -> bool:
    """Tell whether a folder has the `dataset.json` of the Medical Decathlon or of its form."""
    return isinstance(_dataset(root).get("training"), list)


def is_nnunet(root: str) -> bool:
    """Tell whether a folder is a raw data set of nnU-Net (version 2)."""
    return "channel_names" in _dataset(root)


def is_nnssl(root: str) -> bool:
    """Tell whether a folder has the list of files that nnssl pretrains on."""
    return os.path.isfile(os.path.join(root, _PRETRAIN))


def _channels(stated: Mapping[Any, Any], wanted: Wanted, where: str) -> dict[str, int]:
    """Return the number of the channel of each modality key.

    Raises:
        DataError: The data set has no channel of that name.
    """
    named: dict[str, list[int]] = defaultdict(list)
    for number, name in stated.items():
        named[str(name).lower()].append(int(number))
    numbers = {str(number): int(number) for number in stated}
    out = {}
    for key, contrast in wanted.contrasts.items():
        if contrast == EVERY and len(numbers) == 1:
            out[key] = next(iter(numbers.values()))
            continue
        found = named.get(contrast.lower()) or [numbers[n] for n in numbers if n == contrast]
        if len(found) > 1:
            raise DataError(
                f"{where}: {len(found)} channels are named {contrast!r}, {_listed(found)}, so that "
                f"it is unknown which the modality {key!r} reads. Set "
                f"data.init_args.modalities.{key}.contrast to the number of one."
            )
        if not found:
            names = [str(name) for name in stated.values()]
            raise DataError(
                f"{where}: no channel {contrast!r} for the modality {key!r}, only "
                f"{', '.join(names)}.{nearest(contrast, names)} Set "
                f"data.init_args.modalities.{key}.contrast to one of them."
            )
        out[key] = found[0]
    return out


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def _counted(where: str, stated: Any, *counts: int) -> list[str]:
    """Say that a list of files has not as many cases as it states: a copy may be incomplete."""
    if not isinstance(stated, int) or stated in counts:
        return []
    return [f"{where}: numTraining is {stated}, but {counts[0]} cases for training are there"]


def read_decathlon(root: str, wanted: Wanted) -> Found[Exam]:
    """Return the exams of a `dataset.json` with `training`, `test` and maybe `validation`.

    Several contrasts are the volumes of one 4D file.

    Raises:
        DataError: A key or a file is missing.
    """
    where = os.path.join(root, _DATASET)
    content = _dataset(root)
    with parsing(where, advice=_ADVICE):
        stated = content.get("modality") or content.get("modalities") or {"0": "image"}
        channels = _channels(stated, wanted, where)
        entries = [(entry, "") for entry in content["training"]]
        entries += [(entry, "val") for entry in content.get("validation", [])]
        entries += [(entry, "test") for entry in content.get("test", [])]
        names = {int(n): str(name) for n, name in dict(content.get("labels", {})).items()}
        exams = [
            _decathlon_exam(root, entry, split, channels if len(stated) > 1 else {}, wanted)
            for entry, split in entries
        ]
    _must_exist(where, exams)
    training, known = (sum(e.split in w for e in exams) for w in (("",), ("", "val")))
    problems = _counted(where, content.get("numTraining"), training, known)
    return Found(layout="decathlon", items=exams, problems=problems, mask_names=names)


def _decathlon_exam(
    root: str, entry: Any, split: str, volumes: Mapping[str, int], wanted: Wanted
) -> Exam:
    image, label = (entry["image"], entry.get("label", "")) if isinstance(entry, Mapping) else (
        entry, ""
    )  # fmt: skip
    relative = os.path.normpath(image)
    path = os.path.join(root, relative)
    return Exam(
        id=relative,
        patient=stem_of(relative),
        scans=dict.fromkeys(wanted.contrasts, path),
        volumes=volumes,
        split=split,
        mask=os.path.join(root, os.path.normpath(label)) if label and wanted.mask else "",
    )


def read_nnunet(root: str, wanted: Wanted) -> Found[Exam]:
    """Return the cases of `imagesTr` (and `imagesTs`, split `test`), one file per channel.

    Raises:
        DataError: A key or a file is missing.
    """
    where = os.path.join(root, _DATASET)
    content = _dataset(root)
    with parsing(where, advice=_ADVICE):
        channels = _channels(content["channel_names"], wanted, where)
        ending = str(content["file_ending"])
        names = {
            int(value): str(name)
            for name, value in dict(content.get("labels", {})).items()
            if isinstance(value, int)
        }
    known = sorted(int(number) for number in content["channel_names"])
    if isinstance(content.get("dataset"), Mapping):  # lists its files itself
        with parsing(where, advice=_ADVICE):
            exams = _listed_cases(root, content["dataset"], channels, wanted)
        _must_exist(where, exams)
        problems = _counted(where, content.get("numTraining"), len(exams))
        return Found(layout="nnunet", items=exams, problems=problems, mask_names=names)
    exams = []
    problems = []
    for folder, labels, split in (("imagesTr", "labelsTr", ""), ("imagesTs", "labelsTs", "test")):
        cases = _cases(os.path.join(root, folder), ending)
        problems += _odd_cases(os.path.join(root, folder), cases, channels, known, ending)
        for case, files in sorted(cases.items()):
            mask = os.path.join(root, labels, case + ending)
            exams.append(
                Exam(
                    id=f"{folder}/{case}",
                    patient=case,
                    scans={key: files[n] for key, n in channels.items() if n in files},
                    split=split,
                    mask=mask if wanted.mask and os.path.isfile(mask) else "",
                )
            )
    count = sum(not exam.split for exam in exams)
    problems += _counted(where, content.get("numTraining"), count)
    exams = [exam for exam in exams if exam.scans]
    return Found(layout="nnunet", items=exams, problems=problems, mask_names=names)


def _listed_cases(
    root: str, cases: Mapping[str, Any], channels: Mapping[str, int], wanted: Wanted
) -> list[Exam]:
    """Return the cases whose files `dataset` lists, by channel in their order."""
    exams = []
    for case, entry in cases.items():
        files = [_expanded(root, str(name)) for name in entry["images"]]
        label = _expanded(root, str(entry["label"])) if entry.get("label") else ""
        exams.append(
            Exam(
                id=f"imagesTr/{case}",
                patient=case,
                scans={key: files[n] for key, n in channels.items()},
                mask=label if wanted.mask else "",
            )
        )
    return exams


def _odd_cases(
    folder: str,
    cases: Mapping[str, Mapping[int, str]],
    channels: Mapping[str, int],
    known: Sequence[int],
    ending: str,
) -> list[str]:
    """Say which files are of no channel, and which cases of none that is asked for."""
    found = []
    named = {file for files in cases.values() for n, file in files.items() if n in known}
    there = os.listdir(folder) if os.path.isdir(folder) else ()
    odd = sorted(n for n in there if n.endswith(ending) and not n.startswith(".")
                 and os.path.join(folder, n) not in named)  # fmt: skip
    if odd:
        numbers = ", ".join(f"{number:04d}" for number in known)
        found.append(
            f"{folder}: {len(odd)} files are of no channel, such as {', '.join(odd[:_NAMED])}; "
            f"expected CASE_NUMBER{ending} with one of {numbers}. Left out."
        )
    without = sorted(c for c, files in cases.items() if not set(files) & set(channels.values()))
    if without:
        found.append(
            f"{folder}: {len(without)} cases have no file of {', '.join(channels)}, such as "
            f"{', '.join(without[:_NAMED])}. Left out."
        )
    return found


def _cases(folder: str, ending: str) -> dict[str, dict[int, str]]:
    """Return the file of every channel, by case: `<case>_<0000><ending>`."""
    cases: dict[str, dict[int, str]] = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        found = re.fullmatch(r"([^.].*)_(\d{4})" + re.escape(ending), name)
        if found:
            cases.setdefault(found[1], {})[int(found[2])] = os.path.join(folder, name)
    return cases


def read_nnssl(root: str, wanted: Wanted) -> Found[Exam]:
    """Return an exam per session of `pretrain_data.json`, `$variables` in its paths expanded.

    Further images of a contrast in a session are left out and counted; with the contrast `*`
    every image is an exam of its own.

    Raises:
        DataError: A key or a file is missing.
    """
    where = os.path.join(root, _PRETRAIN)
    content = read_json(where)
    exams: list[Exam] = []
    ids: Counter[str] = Counter()
    spare = 0
    seen: set[str] = set()
    with parsing(where, advice=_ADVICE):
        for name, patient, images in _sessions(content):
            scans: dict[str, str] = {}
            hidden: dict[str, str] = {}
            for image in images:
                contrast = str(image["modality"])
                seen.add(contrast)
                path = _expanded(root, str(image["image_path"]))
                masks = image.get("associated_masks") or {}
                removed = masks.get("anonymization_mask")
                removed = _expanded(root, str(removed)) if removed else ""
                keys = [k for k, c in wanted.contrasts.items() if c.lower() == contrast.lower()]
                for key in [k for k, c in wanted.contrasts.items() if c == EVERY]:
                    one = f"{name}/{image.get('name') or stem_of(path)}"
                    ids[one] += 1
                    one = one if ids[one] == 1 else f"{one}_{ids[one]}"
                    own = {key: removed} if removed else {}
                    exams.append(Exam(id=one, patient=patient, scans={key: path}, anonymized=own))
                new = [key for key in keys if key not in scans]
                spare += len(keys) - len(new)
                scans |= dict.fromkeys(new, path)
                hidden |= dict.fromkeys(new if removed else (), removed)
            if scans:
                exams.append(Exam(id=name, patient=patient, scans=scans, anonymized=hidden))
    needed = {} if wanted.may_lack and exams else wanted.contrasts
    for key, contrast in needed.items():
        if contrast != EVERY and not any(key in exam.scans for exam in exams):
            raise DataError(
                f"{where}: no image has the modality {contrast!r} that {key!r} asks for, only "
                f"{', '.join(sorted(seen))}.{nearest(contrast, seen)} Set "
                f"data.init_args.modalities.{key}.contrast to one of them."
            )
    if any(os.path.exists(f + _PACKED) for exam in exams[:1] for f in exam.scans.values()):
        raise DataError(
            f"{where}: lists images that nnssl has preprocessed ({_PACKED}), which are normalised "
            "and not in physical values. Set data.init_args.root to the folder below $nnssl_raw "
            "with the list of the scans themselves."
        )
    _must_exist(where, exams)
    problems = [f"{where}: {spare} further images of a contrast in a session"] if spare else []
    return Found(layout="nnssl", items=exams, problems=problems)


def _sessions(content: Any) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield exam, patient and images."""
    for set_id, dataset in content["datasets"].items():
        for subject_id, subject in dataset["subjects"].items():
            patient = f"{set_id}/{subject_id}"
            for session_id, session in subject["sessions"].items():
                yield f"{patient}/{session_id}", patient, session["images"]


def _expanded(root: str, path: str) -> str:
    found = os.path.expandvars(path)
    if found.startswith("$"):
        variable = found[1:].split("/")[0].strip("{}")
        raise DataError(
            f"{root}: paths in its list of files begin with ${variable}, which is no variable "
            f"of the environment. Set it to the folder: export {variable}=…"
        )
    return os.path.join(root, found)


def _must_exist(where: str, exams: list[Exam]) -> None:
    files = [file for exam in exams for file in exam.files.values()]
    missing = [file for file in dict.fromkeys(files) if not os.path.exists(file)]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} files that it names are not there, such as "
            f"{', '.join(missing[:_NAMED])}. Unpack the whole data set beside it."
        )
