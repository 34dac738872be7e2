"""CT, MR and PET exams of your own: NIfTI, NRRD, MetaImage, MGZ or DICOM, one or several contrasts.

    data = VolumeDataModule(root="sample:petct", modalities={"ct": Contrast(value_unit="hu"),
                            "pet": Contrast()}, global_batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))     # ct, pet (8, 1, 96, 96, 96)

`io/volume/exams.py` finds exams, `sources/preparation.py` brings them to one grid,
`sources/volumes.py` cuts windows.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from domainssl.arguments import plain
from domainssl.datamodules.base import DomainDataModule, check_labels, named_sample
from domainssl.datamodules.statistics import statistics_of
from domainssl.errors import ConfigError, DataError, counted, nearest
from domainssl.io.ids import ids_of, write_table
from domainssl.io.subjects import Found
from domainssl.io.volume.cache import Exams
from domainssl.io.volume.exam import Exam
from domainssl.io.volume.exams import find_exams
from domainssl.io.volume.scan import describe_scan
from domainssl.loading.source import Loading, Source
from domainssl.modality import Modality, as_modalities
from domainssl.pieces import Buildable, spread
from domainssl.sources.held_out import HeldOut
from domainssl.sources.labels import class_names
from domainssl.sources.patients import split_by_patient
from domainssl.sources.preparation import kept_exams, key_of, split_volumes
from domainssl.sources.visits import VisitSource, visits_of
from domainssl.sources.volume_options import (
    Contrast,
    ExamFiles,
    ExamLabels,
    ExamWindow,
    Preparation,
    wanted,
)
from domainssl.sources.volumes import VolumeSource, size_of

__all__ = ["VolumeDataModule"]

_log = logging.getLogger(__name__)
_HEADERS = 4  # scans of a modality whose headers the description looks at
# what the embedded samples hold
_SAMPLES: dict[str, dict[str, Contrast]] = {
    "ctmr": {"scan": Contrast(sources=("ct", "mr"))},
    "petct": {"ct": Contrast(value_unit="hu"), "pet": Contrast()},
    "upright": {"ct": Contrast(value_unit="hu")},
    "brain": {name: Contrast() for name in ("t1", "t1c", "t2", "flair")},
    "heads": {"t1": Contrast()},
    "visits": {"flair": Contrast()},
    "organs": {"scan": Contrast(sources=("ct", "mr"))},
    "lesions": {name: Contrast() for name in ("t1", "t1c", "t2", "flair")},
}


class VolumeDataModule(DomainDataModule):
    """Windows of exams, the same box of voxels from every contrast.

    One item is one window; a block is an exam. Values are physical: Hounsfield units, or what a
    scanner without units wrote.

    Args:
        root: `sample:ctmr`, `sample:petct`, `sample:upright`, `sample:brain`, `sample:heads`,
            `sample:visits`, `sample:organs` or `sample:lesions` (made on first use in the cache),
            or a folder.
        modalities: What is read by modality key; None takes everything of a sample.
        global_batch_size: Windows per optimiser step, over all devices and accumulation.
        window: Their size, 96 voxels by default, and how they are drawn.
        held_out: Which patients are held out, where the data state no validation split.
        labels: Class of an exam and segmentation maps; `auto` takes those of a manifest; None.
        exams: How exams are found and named.
        preparation: What is done to a whole exam before windows are cut.
        on_bad_sample: `raise`, or `replace` by the next good window.
        statistics: `published` (those that `modalities` state, if any), a YAML or JSON file, or
            `card` (those of the model's weights).
        seed: Seed of order and windows.
        loading: Worker processes and memory.

    Raises:
        ConfigError: An argument cannot be used.
    """

    def __init__(
        self,
        root: str = "sample:petct",
        modalities: dict[str, Contrast] | None = None,
        global_batch_size: int = 8,
        window: ExamWindow | None = None,
        held_out: HeldOut | None = None,
        labels: ExamLabels | Literal["auto"] | None = "auto",
        exams: ExamFiles | None = None,
        preparation: Preparation | None = None,
        on_bad_sample: Literal["raise", "replace"] = "raise",
        statistics: str = "published",
        seed: int = 0,
        loading: Loading | None = None,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            seed=seed,
            on_bad_sample=on_bad_sample,
            loading=loading,
        )
        check_labels(labels, "column, classes, mask and names")
        self.root = root
        if not modalities and root.removeprefix("sample:") not in _SAMPLES:
            raise ConfigError(
                "data.init_args.modalities: missing; expected a mapping of modality keys to what "
                "they read, such as ct: {contrast: ct, value_unit: hu}."
            )
        self.contrasts = dict(modalities or _SAMPLES[root.removeprefix("sample:")])
        self.source_names = {name: c.sources for name, c in self.contrasts.items() if c.sources}
        self.preparation = preparation = preparation or Preparation()
        if preparation.resample_to not in (None, *self.contrasts):
            raise ConfigError(
                f"data.init_args.preparation.resample_to: got {preparation.resample_to!r}, "
                f"expected one of {', '.join(self.contrasts)}."
                f"{nearest(preparation.resample_to, self.contrasts)}"
            )
        self.window = (window or ExamWindow()).in_voxels(preparation.spacing_mm)
        self.held_out = (held_out or HeldOut()).of(("val_fraction", "patients", "seed"))
        self.labels = ExamLabels() if isinstance(labels, str) else labels
        self.exams = exams or ExamFiles()
        self._check_visits()
        self.found: Found[Exam] | None = None
        self.splits: dict[str, list[Exam]] = {}
        self.prepared: Exams[Exam] | None = None
        self._modalities = as_modalities(
            {
                name: statistics_of(
                    contrast.modality(
                        name,
                        self.window.shape,
                        preparation.spacing_mm,
                        kind="series" if self.exams.dates else "volume",
                    ),
                    statistics,
                )
                for name, contrast in self.contrasts.items()
            }
        )

    def _check_visits(self) -> None:
        """Refuse options that visits of one patient cannot share."""
        self.days_are_relative = bool(self.exams.dates)
        if not self.exams.dates:
            return
        where = "data.init_args.exams.dates"
        if self.preparation.foreground:
            raise ConfigError(
                f"{where}: visits of a patient need one grid, and every exam is cut to its own "
                "foreground. Set data.init_args.preparation.foreground: false."
            )
        for name in self.source_names:
            raise ConfigError(
                f"{where}: a series holds scans of one kind, but modalities.{name}.sources lists "
                "several. Read them as modalities of their own."
            )

    @property
    def modalities(self) -> dict[str, Modality]:
        """The contrasts by their keys; statistics as asked for."""
        return self._modalities

    def prepare_data(self) -> None:
        """Write the embedded sample, once per machine."""
        self._root()

    def _root(self) -> str:
        name = named_sample(self.root, _SAMPLES)
        if name is None:
            return self.root
        module = importlib.import_module("domainssl.datamodules.samples.volumes")
        return str(module.sample_root(name))

    def open_sources(self) -> dict[str, Source]:
        """Find the exams and hold some patients out; predict on the test split, or on those."""
        root = self._root()
        found = find_exams(
            root,
            wanted(self.contrasts, self.exams, self.labels),
            manifest=self.exams.manifest,
            layout=self.exams.layout,
        )
        exams = self._merged(split_volumes(found.items, self.contrasts))
        found = replace(found, items=exams)
        self.found = found
        for problem in found.problems:
            _log.warning("%s", problem)
        self.splits = split_by_patient(found.items, self.held_out)
        if "val" not in self.splits:
            _log.warning("%s: nothing is held out for validation", root)
        self.label_names = self._classes(found.items)
        self.persons = self._persons(found.items)
        self.prepared = self._prepared(found.items)
        if self.exams.id_table is not None and self._rank == 0:
            named = [(exam.id, exam.patient) for exam in found.items]
            write_table(self.exams.id_table, named, self._ids)
        sources: dict[str, Source] = {
            split: self._source(part, is_training=split == "train")
            for split, part in self.splits.items()
        }
        sources["predict"] = self._source(list(self.splits.values())[-1], is_training=False)
        return sources

    def _source(self, exams: Sequence[Exam], *, is_training: bool) -> VolumeSource:
        assert self.found is not None
        names = self.label_names
        numbers = {name: i for i, name in enumerate(names or ())}
        visits = visits_of(exams, self.exams.max_visits) if self.exams.dates else {}
        items, labels = [exam.id for exam in exams], [exam.label for exam in exams]
        if self.exams.dates:
            items = list(visits)
            labels = [_one_label([exams[i] for i in own]) for own in visits.values()]
        common: dict[str, Any] = {
            "exams": exams,
            "ids": ids_of(items, self._ids),
            "modalities": self._modalities,
            "contrasts": self.contrasts,
            "window": self.window,
            "preparation": self.preparation,
            "labels": None if names is None else [numbers.get(label, -1) for label in labels],
            "has_masks": self._has_masks,
            "seed": self.seed,
            "is_training": is_training,
            "prepared": self.prepared,
            "keys": self._keys(exams),
        }
        if self.exams.dates:
            return VisitSource(**common, visits=list(visits.values()))
        return VolumeSource(**common)

    @property
    def _ids(self) -> str:
        """How exams are named: phantoms have nothing to protect."""
        return "plain" if self.root.startswith("sample:") else self.exams.ids

    def _persons(self, exams: Sequence[Exam]) -> dict[str, int]:
        """Return a number per patient for the ids that items of evaluation have."""
        patients = {name: i for i, name in enumerate(dict.fromkeys(e.patient for e in exams))}
        if self.exams.dates:
            return dict(zip(ids_of(list(patients), self._ids), patients.values(), strict=True))
        ids = ids_of([exam.id for exam in exams], self._ids)
        return {name: patients[e.patient] for name, e in zip(ids, exams, strict=True)}

    @property
    def _has_masks(self) -> bool:
        assert self.found is not None
        return not self.exams.dates and any(exam.mask for exam in self.found.items)

    def _prepared(self, exams: Sequence[Exam]) -> Exams[Exam] | None:
        """Return where prepared exams are kept on disk, if they are."""
        if self.preparation.cache == "none":
            return None
        return kept_exams(exams, self.contrasts, self.preparation, with_masks=self._has_masks)

    def _keys(self, exams: Sequence[Exam]) -> list[str]:
        if self.prepared is None:
            return []
        return [key_of(exam, self.prepared.cache, self.preparation) for exam in exams]

    def preparations(self) -> list[Buildable]:
        """Return the exams that `cache build` can prepare before a run."""
        return [] if self.prepared is None else [self.prepared]

    def _classes(self, exams: Sequence[Exam]) -> tuple[str, ...] | None:
        """Return the class names of exams by number; None without labels."""
        there = {exam.label for exam in exams if exam.label}
        if self.labels is None or not there:
            return None
        return class_names(there, self.labels.classes, "exams")

    def _merged(self, exams: Sequence[Exam]) -> Sequence[Exam]:
        """Return the exams with the names that merged classes have.

        Raises:
            ConfigError: No exam is of a class that is to be merged.
        """
        merge = self.labels.merge if self.labels is not None else {}
        there = sorted({exam.label for exam in exams if exam.label})
        for name in merge:
            if name not in there:
                raise ConfigError(
                    f"data.init_args.labels.merge: no exam is of the class {name!r}; there are "
                    f"{', '.join(there) or 'none'}.{nearest(name, there)}"
                )
        return [replace(exam, label=merge.get(exam.label, exam.label)) for exam in exams]

    @property
    def num_classes(self) -> int | None:
        """Number of classes of exams, None without labels; known after setup."""
        return len(self.label_names) if self.label_names is not None else None

    @property
    def mask_names(self) -> dict[int, str]:
        """Names of the values of segmentation maps, where they are known; known after setup."""
        if self.labels is None or self.found is None:
            return {}
        return dict(enumerate(self.labels.names)) or dict(self.found.mask_names)

    @property
    def mask_classes(self) -> tuple[str, ...] | None:
        """Names of the classes of voxels, by number; None where they are not known (yet)."""
        names = self.mask_names
        if not names:
            return None
        return tuple(names.get(value, f"class_{value}") for value in range(max(names) + 1))

    @property
    def reading(self) -> dict[str, Any]:
        """How scans are read and prepared, plain data without paths: prediction does the same."""
        done = ("resample_to", "foreground", "margin_mm")
        return {
            "contrasts": {name: plain(contrast) for name, contrast in self.contrasts.items()},
            "preparation": {name: plain(getattr(self.preparation, name)) for name in done},
        }

    def identity(self) -> dict[str, Any]:
        """Return what tells these exams from others, without a name or a path."""
        return {
            "format": "volumes",
            "layout": self.found.layout if self.found else None,
            "exams": {
                split: {"count": len(part), "digest": _digest(part)}
                for split, part in self.splits.items()
            },
        }

    @property
    def withheld(self) -> tuple[str, ...]:
        """Root, table and patients, unless ids are plain."""
        if self._ids == "plain":
            return ()
        texts = [self.root, self.exams.manifest or "", "held_out.patients"]
        return tuple(text for text in (*texts, *self.held_out.patients) if len(text) > 2)

    @property
    def problems(self) -> list[str]:
        """What was left out, and why."""
        return list(self.found.problems) if self.found else []

    def _headers(self, name: str) -> str:
        """Return sizes, orientations and types of a few of the scans of a modality."""
        assert self.found is not None
        exams = [exam for exam in self.found.items if name in exam.scans]
        read = self.contrasts[name].reading_of
        try:
            facts = [describe_scan(e.scans[name], read(e, name)) for e in spread(exams, _HEADERS)]
        except DataError as error:
            return f"; {error}"
        shapes = _span([f.shape for f in facts], "{:d}")
        steps = _span([f.spacing for f in facts], "{:.3g}")
        codes, types = (" ".join(sorted({*found})) for found in
                        ([f.orientation for f in facts], [f.dtype for f in facts]))  # fmt: skip
        return f"; of {len(facts)}: {shapes} voxels of {steps} mm, {codes}, {types}"

    def describe(self) -> list[str]:
        """Return lines that tell what was found."""
        found = self.found
        assert found is not None  # called after setup
        patients = len({exam.patient for exam in found.items})
        exams = counted(len(found.items), "exam")
        whose = counted(patients, "patient")
        lines = [f"{exams} of {whose} in {self.root} ({found.layout})"]
        lines += [f"problem: {text}" for text in found.problems]
        size = " x ".join(str(n) for n in self.window.shape)
        for name, modality in self._modalities.items():
            count = sum(name in exam.scans for exam in found.items)
            lines.append(
                f"{name}: {modality.num_channels} channel(s) {' '.join(modality.channels)} "
                f"({modality.value_unit}), {size} voxels, in {count} exams{self._headers(name)}"
            )
        names, masks = self.label_names, sum(bool(exam.mask) for exam in found.items)
        lines.append("labels: none" if names is None else f"labels: {', '.join(names)}")
        classes = ", ".join(f"{value} {name}" for value, name in self.mask_names.items())
        lines.append(f"segmentation maps: {masks or 'none'}" + (f" ({classes})" if classes else ""))
        return lines + super().describe()


def _one_label(visits: Sequence[Exam]) -> str:
    """Return the class of a patient, that of the visits where it is known.

    Raises:
        DataError: Visits are of different classes.
    """
    known = sorted({exam.label for exam in visits if exam.label})
    if len(known) > 1:
        raise DataError(
            f"{visits[0].id} and later visits are of the classes {', '.join(known)}; an item is a "
            "patient and needs one. State one class per patient, or set data.init_args.labels: "
            "null."
        )
    return known[0] if known else ""


def _span(sizes: Sequence[tuple[Any, ...]], form: str) -> str:
    """Return the least and the largest size along each axis."""
    ends = [(min(axis), max(axis)) for axis in zip(*sizes, strict=True)]
    texts = [(form.format(low), form.format(high)) for low, high in ends]
    return " x ".join(low if low == high else f"{low}..{high}" for low, high in texts)


def _digest(exams: Sequence[Exam]) -> str:
    """Return a hash over the sizes of the files of exams, in their order."""
    found = hashlib.sha256()
    for exam in exams:
        for name, path in sorted({**exam.scans, "mask": exam.mask}.items()):
            found.update(f"{name} {size_of(path) if path else 0}\n".encode())
    return found.hexdigest()[:16]
