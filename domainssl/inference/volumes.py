"""Vectors of CT, MR and PET exams on the grid of their patches, as NIfTI or Zarr.

An exam is prepared as for training: axes in RAS order, the voxel size of the card, one grid for
all contrasts. An exam is a piece; its shards are kept when a call is killed in the middle of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn.functional import pad

from domainssl.backbones.base import Backbone
from domainssl.backbones.card import weights_digest
from domainssl.inference.dense import DenseEmbedding, DenseOptions, Writer
from domainssl.inference.finished import lost_shards
from domainssl.inference.outputs import (
    beside,
    file_name,
    file_states,
    make_folder,
    read_record,
    refuse_one_file,
    refuse_other,
)
from domainssl.inference.preview import write_map_preview
from domainssl.inference.tokens import TokenWindows, token_windows
from domainssl.inference.volume_maps import (
    VolumeInput,
    find_volumes,
    refuse_results_among,
    scans_for,
    volume_batch,
)
from domainssl.io.ids import ids_of, write_ids
from domainssl.io.raster.geozarr import VectorLayout, VectorStore
from domainssl.io.volume.exam import Exam
from domainssl.io.volume.prepared import Prepared
from domainssl.modality import Batch, key
from domainssl.pieces import Plan, build
from domainssl.sources.preparation import prepare

__all__ = ["VolumeEmbedding", "VolumeItem", "volume_embedding"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class VolumeItem:
    """A prepared exam whose cells can be read.

    Attributes:
        name: Its id.
        prepared: Its values, on one grid.
        stamps: Size and time of change of its files.
    """

    name: str
    prepared: Prepared
    stamps: Sequence[Sequence[int]]

    @property
    def facts(self) -> dict[str, Any]:
        """What the result rests on."""
        return {
            "files": [list(stamp) for stamp in self.stamps],
            "voxels": list(self.prepared.shape),
            "contrasts": sorted(self.prepared.values),
        }

    def shape(self, windows: TokenWindows) -> tuple[int, ...]:
        """Return the cells along X, Y, Z."""
        sides = self._sides(windows)
        return tuple(-(-n // s) for n, s in zip(self.prepared.shape, sides, strict=True))

    @staticmethod
    def _sides(windows: TokenWindows) -> tuple[int, ...]:
        return windows.cells(next(iter(windows.sizes)))

    def numbers(self, windows: TokenWindows) -> int:
        """Return how many numbers are read for a cell."""
        channels = sum(len(values) for values in self.prepared.values.values())
        return int(channels * np.prod(self._sides(windows)))

    def place(self, windows: TokenWindows) -> dict[str, Any]:
        """Return the affine of the cells' centres to RAS mm; see `VectorLayout`."""
        sides = np.array(self._sides(windows), np.float64)
        change = np.diag([*sides, 1.0])
        change[:3, 3] = (sides - 1) / 2
        affine = np.asarray(self.prepared.affine, np.float64) @ change
        return {"affine": tuple(tuple(float(v) for v in row) for row in affine)}

    def read(self, windows: TokenWindows, box: Sequence[slice]) -> Batch:
        """Return the voxels of some cells; those beyond the exam are zero and not valid."""
        sides = self._sides(windows)
        voxels = [slice(s.start * n, s.stop * n) for s, n in zip(box, sides, strict=True)]
        inside = tuple(
            slice(s.start, min(s.stop, n)) for s, n in zip(voxels, self.prepared.shape, strict=True)
        )
        batch = volume_batch(self.prepared, inside)
        margins: list[int] = []
        for wanted, part in zip(voxels, inside, strict=True):
            margins[:0] = [0, wanted.stop - part.stop]
        if any(margins):
            for name in self.prepared.values:
                batch[name] = pad(batch[name], margins)
                batch[key(name, "valid")] = pad(batch[key(name, "valid")], margins)
        return batch

    def narrowed(self, windows: TokenWindows, batch: Batch, box: Sequence[slice]) -> Batch:
        """Return some cells of what `read` gave, counted from its first ones."""
        sides = self._sides(windows)
        place = tuple(slice(s.start * n, s.stop * n) for s, n in zip(box, sides, strict=True))
        laid_out = {n for name in self.prepared.values for n in (name, key(name, "valid"))}
        return {n: v[(..., *place)] if n in laid_out else v for n, v in batch.items()}


@dataclass(kw_only=True)
class VolumeEmbedding:
    """Vectors of exams: entries that are made one by one (`pieces.Buildable`).

    Attributes:
        root: Where outputs go.
        exams: The exams.
        ids: Their ids, which name the outputs.
        inputs: How scans are read.
        backbone: What computes.
        options: How.
        feature: See `tokens.feature_name`.
        window: Side of a window in voxels; None is that of the card.
        writer: Makes the final file; None leaves the Zarr store.
        target: The output of the only exam, where it has a name of its own.
    """

    root: Path
    exams: Sequence[Exam]
    ids: Sequence[str]
    inputs: VolumeInput
    backbone: Backbone
    options: DenseOptions
    feature: str | None = None
    window: int | None = None
    writer: Writer | None = None
    target: Path | None = None
    _restart: bool = field(default=False, init=False)

    @property
    def keys(self) -> Sequence[str]:
        """Ids of the exams."""
        return self.ids

    @property
    def folder(self) -> Path:
        """Where processes claim their part."""
        return self.root / (".embed" if self.target is None else f".{self.target.name}.exams")

    @property
    def outputs(self) -> list[Path]:
        """Final files or folders of all exams."""
        return [self._target(key) for key in self.ids]

    def _target(self, key: str) -> Path:
        if self.target is not None:
            return self.target
        return self.root / f"{key}{'.zarr' if self.writer is None else self.writer.ending}"

    @cached_property
    def _request(self) -> dict[str, Any]:
        return {
            "weights_sha256": weights_digest(self.backbone),
            "feature": self.feature,
            "window": self.window,
            "halo": self.options.halo,
            "dtype": self.options.dtype,
            "computed_in": self.options.autocast or "float32",
        }

    def _asked(self, exam: Exam) -> dict[str, Any]:
        """Return what the vectors of an exam are made from."""
        files = file_states(exam.scans.values())
        return {**self._request, **self.inputs.facts, "files": files}

    def _record(self, key: str) -> Path:
        return beside(self._target(key), "json")

    def claim(self, *, restart: bool = False) -> None:
        """Compare the complete outputs with what is asked for, or remove them.

        Raises:
            ConfigError: One was made from something else.
            DataError: Nothing can be written there.
        """
        for name, exam in zip(self.ids, self.exams, strict=True):
            if restart or not self._record(name).is_file():
                continue
            known = read_record(self._record(name)).get("asked", {})
            refuse_other(self._target(name), known, self._asked(exam))
        self._restart = restart
        make_folder(self.folder, self.root)

    def release(self) -> None:
        """Remove the folder of claims, where nothing is at work any more."""
        try:
            self.folder.rmdir()
        except OSError:
            return

    def is_ready(self, key: str) -> bool:
        """Tell whether the vectors of an exam are there."""
        target, record = self._target(key), self._record(key)
        is_there = not self._restart and record.is_file() and target.exists()
        return is_there and not lost_shards(target, read_record(record))

    def make(self, key: str) -> None:
        """Compute the vectors of an exam.

        Raises:
            DataError: A scan cannot be read, or the vectors not written.
        """
        exam = self.exams[list(self.ids).index(key)]
        prepared = prepare(exam, self.inputs.contrasts, self.inputs.preparation)
        item = VolumeItem(key, prepared, file_states(exam.scans.values()))
        windows = token_windows(
            self.backbone, list(prepared.values), feature=self.feature, size=self.window,
            shape=prepared.shape,
        )  # fmt: skip
        work = DenseEmbedding(
            root=self.root,
            items=[item],
            windows=[windows],
            backbone=self.backbone,
            options=self.options,
            facts={"backbone": type(self.backbone).__name__, "asked": self._asked(exam)},
            targets=[self._target(key)],
            writer=self.writer,
            preview=_slice_preview,
        )
        work.claim(restart=self._restart)
        try:
            build(work, Plan(jobs=0), noun="shards")
        finally:
            work.release()


def volume_embedding(
    backbone: Backbone,
    source: str,
    output: Path,
    *,
    modality: str | None,
    ids: str,
    id_table: Path | None = None,
    scan: Mapping[str, Any] | None = None,
    **more: Any,
) -> VolumeEmbedding:
    """Find the exams of an input and how they are read.

    Args:
        backbone: Its modalities tell unit, channels and voxel size.
        source: A scan, a folder with a DICOM series, or a folder of exams.
        output: File where its name ends like one, otherwise a folder.
        modality: What a single scan is.
        ids: `hashed` or `plain`.
        id_table: Where to write which id is which exam; None writes none.
        scan: What the user says of files that leave it open: fields of `Reading`.
        more: Further fields of `VolumeEmbedding`.

    Raises:
        ConfigError: Several exams are to go into one file, or ids repeat.
        DataError: There is no scan.
    """
    refuse_results_among(source, output)
    inputs = scans_for(backbone, scan)
    exams = find_volumes(source, inputs, modality)
    names = [exam.id for exam in exams]
    known = [file_name(name) for name in ids_of(names, ids)]
    if id_table is not None:
        write_ids(id_table, known, names, "exam")
    is_file = output.name.lower().endswith((".nii.gz", ".zarr"))
    if is_file:
        refuse_one_file(output, len(exams), "exams")
    return VolumeEmbedding(
        root=output.parent if is_file else output,
        exams=exams,
        ids=known,
        inputs=inputs,
        backbone=backbone,
        target=output if is_file else None,
        **more,
    )


def _slice_preview(store: VectorStore, layout: VectorLayout, path: Path) -> None:
    """Draw the middle axial slice: front at the top, the patient's right on the left."""
    x, y, z = layout.shape
    middle = store.read((slice(0, x), slice(0, y), slice(z // 2, z // 2 + 1)))[..., 0]
    picture = middle.transpose(0, 2, 1)[:, ::-1, ::-1]  # (E, x, y) -> (E, y, x)
    write_map_preview(path, (y, x), y, lambda rows: picture[:, rows])
