"""Windows of prepared exams as a source of the block stream; a block is an exam."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from domainssl.io.volume.exams import Exam
from domainssl.io.volume.prepared import Prepared
from domainssl.loading.memory import empty
from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows
from domainssl.modality import Modality, key
from domainssl.sources.preparation import prepare
from domainssl.sources.volume_options import Contrast, ExamWindow, Preparation
from domainssl.sources.windows import Cut

__all__ = ["VolumeSource"]

_WINDOW = 51  # tag that keeps the stream of random numbers apart
_UNPACKED = 3  # bytes that a byte of a packed scan holds, roughly
Array = np.ndarray[Any, Any]


class _Volumes(Protocol):
    """A prepared exam, in memory or on disk."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along X, Y, Z."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""

    def crop(self, start: Sequence[int], size: Sequence[int]) -> Prepared:
        """Return a box."""


@dataclass
class VolumeSource:
    """Reads exams and cuts the same windows out of every contrast.

    Attributes:
        exams: The exams, a block each.
        ids: Their ids in batches.
        modalities: What batches hold.
        contrasts: What is read, by modality key.
        window: In voxels.
        preparation: What is done to a whole exam.
        labels: Class per exam, -1 where unknown; None where batches carry none.
        has_masks: Whether batches carry the class of every voxel.
        seed: Seed of windows.
        is_training: Draw windows anew in every epoch.
    """

    exams: Sequence[Exam]
    ids: Sequence[str]
    modalities: Mapping[str, Modality]
    contrasts: Mapping[str, Contrast]
    window: ExamWindow
    preparation: Preparation
    labels: Sequence[int] | None
    has_masks: bool
    seed: int
    is_training: bool
    _kept: OrderedDict[int, Prepared] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept volumes behind: every process reads its own."""
        return {**self.__dict__, "_kept": OrderedDict()}

    @property
    def per_exam(self) -> int:
        """Windows of an exam: as many as asked for in training, else the one in the middle."""
        return self.window.per_exam if self.is_training else 1

    @property
    def sizes(self) -> list[int]:
        """Windows per exam."""
        return [self.per_exam] * len(self.exams)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes decoded in an epoch, roughly."""
        files = [path for exam in self.exams for path in exam.scans.values()]
        return _UNPACKED * sum(_size_of(path) for path in files)

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Read one exam and cut the windows asked for."""
        exam = self.exams[piece.block]
        found, decoded = self._volume(piece.block)
        epoch = epoch if self.is_training else 0
        count = len(piece)
        rows = Rows(self._empty(exam, count), count, bytes_decoded=decoded)
        for row, number in enumerate(range(piece.start, piece.stop)):
            index = piece.block * self.per_exam + number
            cut, part, shown = self._window(found, index, epoch)
            self._write(rows, row, exam, cut, part, is_air=shown == 0)
        first = piece.block * self.per_exam
        name = self.ids[piece.block]
        many = self.per_exam > 1
        rows.data["index"] = np.arange(first + piece.start, first + piece.stop)
        rows.data["id"] = [f"{name}_{i}" if many else name for i in range(piece.start, piece.stop)]
        if self.labels is not None:
            rows.data["label"] = np.full(count, self.labels[piece.block], np.int64)
        return rows

    # Volumes --------------------------------------------------------------------------------

    def _volume(self, number: int) -> tuple[_Volumes, int]:
        """Return a prepared exam, and the bytes decoded for it now."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number], 0
        done = prepare(
            self.exams[number], self.contrasts, self.preparation, with_mask=self.has_masks
        )
        self._kept[number] = done
        limit = self.preparation.keep_mb * 1e6
        while self._kept and sum(v.num_bytes for v in self._kept.values()) > limit:
            self._kept.popitem(last=False)
        return done, done.num_bytes

    # Windows --------------------------------------------------------------------------------

    def _window(self, found: _Volumes, index: int, epoch: int) -> tuple[Cut, Prepared, float]:
        """Return the cut of a window, the box that it shows, and how much of it is not air.

        The cut counts from the first voxel of the volume, and may begin before it.
        """
        room = [max(a, b) for a, b in zip(found.shape, self.window.shape, strict=True)]
        if not self.is_training:
            cut = self.window.middle(room)
            return self._shown(found, cut, room)
        rng = generator(self.seed, epoch, _WINDOW, index)
        best: tuple[Cut, Prepared, float] | None = None
        for _ in range(self.window.tries):
            tried = self._shown(found, self.window.draw(rng, room), room)
            if best is None or tried[2] > best[2]:
                best = tried
            if best[2] >= self.window.min_foreground:
                break
        assert best is not None  # one is tried at least
        return best

    def _shown(self, found: _Volumes, cut: Cut, room: Sequence[int]) -> tuple[Cut, Prepared, float]:
        """Read the part of a window that lies in the volume, which lies in the middle of `room`."""
        before = [(r - s) // 2 for r, s in zip(room, found.shape, strict=True)]
        begin = [b - p for b, p in zip(cut.begin, before, strict=True)]
        start = [max(0, b) for b in begin]
        stops = [min(s, b + e) for s, b, e in zip(found.shape, begin, cut.extent, strict=True)]
        part = found.crop(start, [b - a for a, b in zip(start, stops, strict=True)])
        cut = Cut(tuple(begin), cut.extent, cut.size, cut.flips, cut.turns)
        seen = np.zeros(part.shape, bool)
        for name, values in part.values.items():
            seen |= part.valid[name] & (values[0] >= part.facts["air_below"][name])
        return cut, part, float(np.count_nonzero(seen)) / float(np.prod(cut.extent))

    def _empty(self, exam: Exam, count: int) -> dict[str, Any]:
        """Return what the windows of an exam are written into; absent modalities are complete."""
        size = self.window.shape
        data: dict[str, Any] = {}
        for name, modality in self.modalities.items():
            shape = (count, modality.num_channels, *size)
            data[name] = empty(shape, torch.float32).zero_()
            data[key(name, "valid")] = empty((count, *size), torch.bool).zero_()
            data[key(name, "present")] = np.full(count, name in exam.scans)
            limits = np.zeros((count, modality.num_channels, 2), np.float32)
            limits[..., 1] = 1
            data[key(name, "window")] = limits
            data[key(name, "affine")] = [np.eye(4).tolist() for _ in range(count)]
            if self.contrasts[name].sources:
                data[key(name, "source")] = np.full(count, -1, np.int64)
        if self.has_masks:
            data["mask"] = torch.full((count, *size), -1, dtype=torch.int64)
        return data

    def _write(
        self, rows: Rows, row: int, exam: Exam, cut: Cut, part: Prepared, *, is_air: bool
    ) -> None:
        """Write one window of every contrast and its companions."""
        local = cut.of_part()
        inside = tuple(
            slice(max(0, -b), max(0, -b) + n) for b, n in zip(cut.begin, part.shape, strict=True)
        )
        # the affine of the box is that of its first voxel, which may lie inside of the window
        affine = np.array(part.affine)
        affine[:3, 3] -= affine[:3, :3] @ [float(s.start) for s in inside]
        affine = affine @ local.to_source()
        data = rows.data
        for name, values in part.values.items():
            whole = _padded(values, (len(values), *cut.extent), inside)
            local.write(whole, data[name][row])
            if not is_air:
                local.write_valid(
                    _padded(part.valid[name], cut.extent, inside), data[key(name, "valid")][row]
                )
            data[key(name, "window")][row] = part.limits[name]
            data[key(name, "affine")][row] = affine.tolist()
            if key(name, "source") in data:
                data[key(name, "source")][row] = part.facts["source"][name]
            rows.bytes_needed += whole.nbytes
        if part.mask is not None and self.has_masks:
            classes = _padded(part.mask.astype(np.int64), cut.extent, inside, -1)
            data["mask"][row] = torch.from_numpy(np.ascontiguousarray(local.view(classes)))


def _padded(
    array: Array, shape: Sequence[int], inside: tuple[slice, ...], filler: int = 0
) -> Array:
    """Return the array (..., x, y, z) inside of a larger one, of which the rest is filler."""
    if array.shape == tuple(shape):
        return array
    out = np.full(shape, filler, array.dtype)
    index: tuple[Any, ...] = (..., *inside)
    out[index] = array
    return out


def _size_of(path: str) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(f, n)) for f, _, names in os.walk(path) for n in names)
