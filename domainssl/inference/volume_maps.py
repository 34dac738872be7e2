"""Maps of classes or numbers of CT, MR and PET exams, as NIfTI on the grid of the stored scan.

An exam is prepared as for training (orientation, voxel size, one grid for all contrasts), predicted
in windows, and its map brought back: an exam is a piece, and one that is there is not made again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.files import write_json
from domainssl.inference.inputs import is_manifest, read_manifest
from domainssl.inference.map_preview import (
    class_colours,
    write_class_preview,
    write_number_preview,
)
from domainssl.inference.outputs import (
    beside,
    file_name,
    file_states,
    is_made_from,
    keep_source,
    refuse_inside,
    tell_again,
)
from domainssl.inference.predict import (
    LabelMap,
    NumberMap,
    PredictOptions,
    Predictor,
    predict_map,
)
from domainssl.inference.sliding import Box
from domainssl.io.subjects import Found
from domainssl.io.volume.dicom_studies import series_at
from domainssl.io.volume.exam import Exam, Wanted, stem_of
from domainssl.io.volume.exams import find_exams, layout_of
from domainssl.io.volume.facts import Reading, Scan, ScanFacts
from domainssl.io.volume.folder import EVERY, NoScanNamedError
from domainssl.io.volume.geometry import TOLERANCE, displacement
from domainssl.io.volume.prepared import Prepared
from domainssl.io.volume.scan import describe_scan, is_scan, placed
from domainssl.io.volume.write import write_labels, write_numbers
from domainssl.modality import Batch, key
from domainssl.options import as_dataclass
from domainssl.sources.preparation import prepare
from domainssl.sources.resampling import resample_labels, resample_scan
from domainssl.sources.volume_options import Contrast, Preparation

__all__ = [
    "VolumeInput",
    "VolumePrediction",
    "find_volumes",
    "refuse_results_among",
    "volume_batch",
    "volume_input",
]

Array = np.ndarray[Any, Any]
_log = logging.getLogger(__name__)


class Owner(Protocol):
    """Whatever has a backbone: a task, or an embedding."""

    backbone: Backbone


@dataclass(frozen=True, kw_only=True)
class VolumeInput:
    """How scans are read and prepared, as in training.

    Attributes:
        contrasts: By modality key.
        preparation: What is done to a whole exam.
        scan: What the user says of files that leave it open: fields of `Reading`.
    """

    contrasts: Mapping[str, Contrast]
    preparation: Preparation = field(default_factory=Preparation)
    scan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """What a result rests on, beside the files."""
        return {"scan": dict(self.scan)} if self.scan else {}


def volume_input(
    task: Owner, reading: Mapping[str, Any] | None = None, scan: Mapping[str, Any] | None = None
) -> VolumeInput:
    """Return how scans are read for a task.

    Args:
        task: Its modalities tell unit, channels and voxel size.
        reading: What the training data said of themselves, where the task kept it.
        scan: What the user says of these files: fields of `Reading`.
    """
    told = reading or {}
    contrasts = {}
    for name, modality in task.backbone.modalities.items():
        known = dict(told.get("contrasts", {}).get(name, {}))
        known["reading"] = as_dataclass(Reading, {**known.get("reading", {}), **(scan or {})})
        known |= {"value_unit": modality.value_unit, "channels": modality.channels}
        contrasts[name] = as_dataclass(Contrast, known)
    spacing = next(iter(task.backbone.modalities.values())).spacing_mm
    options = {"foreground": False, **told.get("preparation", {}), "spacing_mm": spacing}
    return VolumeInput(
        contrasts=contrasts, preparation=as_dataclass(Preparation, options), scan=scan or {}
    )


def scans_for(backbone: Backbone, scan: Mapping[str, Any] | None = None) -> VolumeInput:
    """Return how scans are read for a backbone alone.

    Of a backbone of one modality every scan of a folder is an exam, whatever it is called.
    """
    inputs = volume_input(_Holder(backbone), scan=scan)
    if len(inputs.contrasts) > 1:
        return inputs
    ((name, contrast),) = inputs.contrasts.items()
    return replace(inputs, contrasts={name: replace(contrast, contrast=EVERY)})


@dataclass
class _Holder:
    """What `volume_input` looks at."""

    backbone: Backbone


def find_volumes(path: str, inputs: VolumeInput, modality: str | None = None) -> list[Exam]:
    """Return the exams of an input: a scan, or a folder or data set with several.

    Args:
        path: A file, a folder with a DICOM series, a folder in one of the layouts of `find_exams`,
            or a manifest: CSV or Parquet with `id`, and `path` or a column per modality.
        inputs: What is read.
        modality: What a single scan is, where the task knows several; also every scan of a folder
            in which none is named like a modality.

    Raises:
        DataError: There is no scan.
        ConfigError: It does not say which modality a single scan is.
    """
    names = list(inputs.contrasts)
    if is_manifest(path):
        listed = [(found.name, found.files) for found in read_manifest(path, names)]
        return [
            _one_scan(files, names, modality, name)
            if isinstance(files, str)
            else Exam(id=name, patient="", scans=dict(files))
            for name, files in listed
        ]
    is_chosen = "series" in inputs.scan
    several = os.path.isdir(path) and is_scan(path) and not is_chosen and len(series_at(path)) > 1
    if several:  # a flat export: series are told by what they say of themselves
        inputs = _by_name(inputs, modality)
    if several or not is_scan(path):
        if not os.path.isdir(path):
            describe_scan(path)  # says what it is not
        wanted = Wanted(
            contrasts={name: c.contrast or name for name, c in inputs.contrasts.items()},
            label="", mask="", may_lack=True,
        )  # fmt: skip
        return _as_one(path, _exams(path, wanted, None if several else modality))
    return [_one_scan(path, names, modality, stem_of(path))]


def refuse_results_among(source: str, output: Path) -> None:
    """Refuse an output that the next call would read as one of the scans of a plain folder.

    Raises:
        ConfigError: It lies there.
    """
    if os.path.isdir(source) and not is_scan(source) and layout_of(source) == "folder":
        refuse_inside(output, source)


def _by_name(inputs: VolumeInput, modality: str | None) -> VolumeInput:
    """Return the contrasts, or one of them, each named by its key where it takes every scan."""
    contrasts = {
        name: replace(c, contrast="") if c.contrast == EVERY else c
        for name, c in inputs.contrasts.items()
        if modality in (None, name)
    }
    return replace(inputs, contrasts=contrasts or inputs.contrasts)


def _exams(path: str, wanted: Wanted, modality: str | None) -> list[Exam]:
    """Return the exams of a folder; of a stated modality every scan, where none has its name."""
    try:
        return _told(find_exams(path, wanted))
    except DataError as error:
        if modality in wanted.contrasts:
            every = replace(wanted, contrasts={str(modality): EVERY})
            return _told(find_exams(path, every))
        if not isinstance(error, NoScanNamedError):
            raise
        names = " or ".join(wanted.contrasts)
        raise DataError(
            f"{error} Where every scan of the folder is one of them, say which: --modality {names}."
        ) from error


def _told(found: Found[Exam]) -> list[Exam]:
    """Return the exams, and say what was left out."""
    for problem in found.problems:
        _log.warning("%s", problem)
    return list(found.items)


def _as_one(path: str, exams: list[Exam]) -> list[Exam]:
    """Return one exam of a folder that holds nothing but a scan per contrast, named like it."""
    names = [next(iter(exam.scans)) for exam in exams if len(exam.scans) == 1]
    if len(exams) < 2 or len(set(names)) < len(exams):
        return exams
    if any(e.id.casefold() != n.casefold() for e, n in zip(exams, names, strict=True)):
        return exams
    scans = {name: exam.scans[name] for name, exam in zip(names, exams, strict=True)}
    return [Exam(id=os.path.basename(os.path.abspath(path)), patient="", scans=scans)]


def _one_scan(path: str, names: Sequence[str], modality: str | None, id_: str) -> Exam:
    """Return the exam of one scan."""
    if modality is None and len(names) > 1:
        raise ConfigError(
            f"{path}: one scan, but the task knows {', '.join(names)}. Say which it is, such as "
            f"--modality {names[0]}, or give a folder with a file per contrast."
        )
    name = modality or names[0]
    if name not in names:
        raise ConfigError(
            f"--modality {name}: the task does not know it, only {', '.join(names)}."
            f"{nearest(name, names)}"
        )
    return Exam(id=id_, patient="", scans={name: path})


@dataclass(frozen=True, kw_only=True)
class VolumePrediction:
    """Class maps of exams: entries that are made one by one (see `pieces.build`).

    Attributes:
        folder: Where `<id>.nii.gz` go.
        exams: The exams.
        task: In evaluation mode, on its device.
        inputs: How scans are read.
        options: Windows and blending.
        writes_numbers: The task predicts numbers, not classes.
    """

    folder: Path
    exams: Sequence[Exam]
    task: Predictor
    inputs: VolumeInput
    options: PredictOptions = field(default_factory=PredictOptions)
    writes_numbers: bool = False

    @property
    def keys(self) -> Sequence[str]:
        """Ids of the exams, as names of files."""
        return [file_name(exam.id) for exam in self.exams]

    def path(self, name: str) -> Path:
        """Return the file of an exam."""
        return self.folder / f"{name}.nii.gz"

    def is_ready(self, key: str) -> bool:
        """Tell whether the map of an exam is there, made from its files as they are."""
        return is_made_from(self.path(key), self._source(key))

    @cached_property
    def _by_key(self) -> dict[str, Exam]:
        return dict(zip(self.keys, self.exams, strict=True))

    def _exam(self, key: str) -> Exam:
        return self._by_key[key]

    def _source(self, key: str) -> dict[str, Any]:
        """Return what the map of an exam rests on."""
        scans = self._exam(key).scans
        return {"files": file_states(scans.values()), "contrasts": list(scans), **self.inputs.facts}

    def make(self, key: str) -> None:
        """Predict an exam.

        Raises:
            DataError: A scan cannot be read.
        """
        exam, source = self._exam(key), self._source(key)
        tell_again(self.path(key))
        prepared = prepare(exam, self.inputs.contrasts, self.inputs.preparation)
        first = self.inputs.preparation.resample_to
        names = [name for name in self.inputs.contrasts if name in exam.scans]
        name = first if first in names else names[0]
        facts = describe_scan(exam.scans[name], self.inputs.contrasts[name].reading_of(exam, name))
        count = len(self.task.classes)
        read = partial(volume_batch, prepared)
        if self.writes_numbers:
            numbers = NumberMap(self.path(key), prepared.shape, count, source)
            predict_map(self.task, read, numbers, self.options)
            moved = _numbers_on_grid(numbers.numbers, prepared, facts)
            first = moved[0]
            layer = _fullest(np.isfinite(first))
            write_number_preview(
                beside(self.path(key), "png"), _axial(first, layer), self.task.classes[0]
            )
            write_numbers(self.path(key), moved, facts, self.task.classes)
            keep_source(self.path(key), source)
            numbers.remove()
            return
        found = LabelMap(self.path(key), prepared.shape, count, source)
        predict_map(self.task, read, found, self.options, nothing=0)
        labels = _on_grid(found.labels, prepared, facts)
        classes, colours = self.task.classes, class_colours(count)
        write_class_preview(
            beside(self.path(key), "png"), _axial(labels, _fullest(labels > 0)), classes, nodata=0
        )
        write_json(
            beside(self.path(key), "json"),
            {
                "labels": {str(value): name for value, name in enumerate(classes)},
                "colours": {str(value): list(colour) for value, colour in enumerate(colours)},
            },
        )
        write_labels(self.path(key), labels, facts, dict(enumerate(classes)))
        keep_source(self.path(key), source)
        found.remove()


def _fullest(shown: Array) -> int:
    """Return the axial layer (X, Y, Z) that shows most, of several the middle one."""
    counts = shown.sum((0, 1))
    best = np.flatnonzero(counts == counts.max())
    return int(best[len(best) // 2])


def _axial(values: Array, layer: int) -> Array:
    """Return an axial layer as a picture: front at the top, the patient's right on the left."""
    return np.asarray(values[..., layer].T[::-1, ::-1])


def volume_batch(prepared: Prepared, box: Box) -> Batch:
    """Return a box as a batch of one item; contrasts that the exam lacks are left out."""
    part = prepared.crop([s.start for s in box], [s.stop - s.start for s in box])
    batch: Batch = {}
    for name, values in part.values.items():
        batch[name] = torch.from_numpy(values.astype(np.float32))[None]
        batch[key(name, "valid")] = torch.from_numpy(np.array(part.valid[name]))[None]
        if name in part.limits:
            batch[key(name, "window")] = torch.from_numpy(part.limits[name])[None]
        if name in part.facts["source"]:
            batch[key(name, "source")] = torch.tensor([part.facts["source"][name]])
    return batch


def _on_grid(labels: Array, prepared: Prepared, facts: ScanFacts) -> Array:
    """Return labels on the grid of the scan; 0 where nothing was predicted."""
    moved = _same_voxels(labels[None], prepared, facts)
    if moved is not None:
        return np.asarray(moved[0])
    found = resample_labels(labels, prepared.affine, facts.shape, facts.affine)
    return found.astype(labels.dtype)


def _numbers_on_grid(numbers: Array, prepared: Prepared, facts: ScanFacts) -> Array:
    """Return numbers (K, *S) on the grid of the scan, NaN where nothing was predicted."""
    covered = np.ones((1, *numbers.shape[1:]), np.float32)
    moved = _same_voxels(np.concatenate([numbers, covered]), prepared, facts)
    if moved is not None:
        return np.where(moved[-1] > 0, moved[:-1], np.float32(np.nan))
    known: Array = np.asarray(np.isfinite(numbers).all(0))
    values, valid = resample_scan(
        np.where(known, numbers, np.float32(0)), known, prepared.affine, facts.shape, facts.affine
    )
    return np.where(valid, values, np.float32(np.nan))


def _same_voxels(values: Array, prepared: Prepared, facts: ScanFacts) -> Array | None:
    """Return values (C, *S) in the scan's order where its voxels are those of the preparation."""
    map_ = Scan(values=values, valid=None, affine=prepared.affine, facts=facts)
    moved = placed(map_, facts.shape, facts.affine)
    is_same = moved.values.shape[1:] == facts.shape
    if is_same and displacement(moved.affine, facts.affine, facts.shape)[1] <= TOLERANCE:
        return np.asarray(moved.values)
    return None
