"""Exams of a patient over time as one item: the same window of every visit, as a series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from domainssl.errors import DataError
from domainssl.io.series.tile import even_dates
from domainssl.io.volume.exam import Exam
from domainssl.io.volume.geometry import TOLERANCE, displacement
from domainssl.loading.memory import empty
from domainssl.loading.plan import Piece
from domainssl.loading.source import Rows
from domainssl.modality import key
from domainssl.sources.items import companions
from domainssl.sources.volumes import Drawn, VolumeSource

__all__ = ["VisitSource", "visits_of"]


def visits_of(exams: Sequence[Exam], most: int | None) -> dict[str, list[int]]:
    """Return the positions of the exams of each patient, by day; at most so many, evenly spread."""
    found: dict[str, list[int]] = {}
    for number in sorted(range(len(exams)), key=lambda n: (exams[n].day, exams[n].id)):
        found.setdefault(exams[number].patient, []).append(number)
    if most is None:
        return dict(sorted(found.items()))
    return {
        patient: [own[int(i)] for i in even_dates(len(own), most)]
        for patient, own in sorted(found.items())
    }


@dataclass(kw_only=True)
class VisitSource(VolumeSource):
    """Reads the visits of a patient and cuts the same windows out of all; a block is a patient.

    `ids` and `labels` are those of patients. Values are (T, C, X, Y, Z); a visit without a contrast
    is no frame of it, and limits are the means over the visits, so that changes between them stay.

    Attributes:
        visits: Positions of the exams of each patient, in the order of their days.
    """

    visits: Sequence[Sequence[int]] = ()

    @property
    def sizes(self) -> list[int]:
        """Windows per patient."""
        return [self.per_exam] * len(self.visits)

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Read the visits of one patient and cut the windows asked for."""
        numbers = self.visits[piece.block]
        exams = [self.exams[number] for number in numbers]
        found = [self._volume(number) for number in numbers]
        volumes = [volume for volume, _ in found]
        for volume, exam in zip(volumes[1:], exams[1:], strict=True):
            _check_grid(volumes[0], volume, exams[0], exam)
        epoch = epoch if self.is_training else 0
        count = len(piece)
        data = self._series(exams, count)
        rows = Rows(data=data, count=count, bytes_decoded=sum(decoded for _, decoded in found))
        for row, number in enumerate(range(piece.start, piece.stop)):
            index = piece.block * self.per_exam + number
            drawn = self._drawn(volumes[0], index, epoch)
            limits: dict[str, list[Any]] = {}
            for visit, volume in enumerate(volumes):
                box, shown = (drawn.box, drawn.shown)
                if visit:
                    box, shown = self._shown(volume, drawn.window, drawn.cut)
                box, cut = self._changed(box, _of_visit(drawn, visit))
                for name, values in box.values.items():
                    cut.write(values, data[name][row, visit])
                    if shown > 0:
                        cut.write_valid(box.valid[name], data[key(name, "valid")][row, visit])
                    limits.setdefault(name, []).append(box.limits[name])
                    data[key(name, "affine")][row] = (box.affine @ cut.to_source()).tolist()
                    rows.bytes_needed += values.nbytes
            for name, each in limits.items():
                data[key(name, "window")][row] = np.mean(each, axis=0)
        first, name, many = piece.block * self.per_exam, self.ids[piece.block], self.per_exam > 1
        data["index"] = np.arange(first + piece.start, first + piece.stop)
        data["id"] = [f"{name}_{i}" if many else name for i in range(piece.start, piece.stop)]
        if self.labels is not None:
            data["label"] = np.full(count, self.labels[piece.block], np.int64)
        return rows

    def _series(self, exams: Sequence[Exam], count: int) -> dict[str, Any]:
        """Return what the windows of the visits are written into."""
        size = self.window.shape
        data: dict[str, Any] = {}
        for name, modality in self.modalities.items():
            has = np.array([name in exam.scans for exam in exams])
            limits = np.zeros((count, modality.num_channels, 2), np.float32)
            limits[..., 1] = 1
            shape = (count, len(exams), modality.num_channels, *size)
            data |= companions(
                name,
                empty(shape, torch.float32).zero_(),
                empty((count, len(exams), *size), torch.bool).zero_(),
                count=count,
                frames=len(exams),
                present=bool(has.any()),
                dates=[exam.day for exam in exams],
                frame_mask=has,
                window=limits,
                affine=[np.eye(4).tolist() for _ in range(count)],
            )
        return data


def _of_visit(drawn: Drawn, visit: int) -> Drawn:
    """Return the same window with noise and bias field of another scan."""
    if drawn.change is None:
        return drawn
    seed = (drawn.change.seed + visit) % 2**32
    return replace(drawn, change=replace(drawn.change, seed=seed))


def _check_grid(first: Any, other: Any, exam: Exam, later: Exam) -> None:
    """Refuse visits that do not lie on one grid: a window of both would show two places.

    Raises:
        DataError: Names the exams and how far corners are apart.
    """
    if tuple(first.shape) != tuple(other.shape):
        found = f"has {list(other.shape)} voxels instead of {list(first.shape)}"
    else:
        distance, voxels = displacement(first.affine, other.affine, first.shape)
        if voxels <= TOLERANCE:
            return
        found = f"lies up to {distance:.4g} mm ({voxels:.3g} voxels) off"
    raise DataError(
        f"{later.id}: {found}, compared with the first visit, {exam.id}. Visits of a patient need "
        "one grid: register and resample them before, or set data.init_args.exams.dates: ''."
    )
