"""Windows of prepared exams as a source of the block stream; a block is an exam."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from domainssl.io.volume.cache import Exams
from domainssl.io.volume.exam import Exam
from domainssl.io.volume.prepared import Prepared, shifted
from domainssl.loading.memory import empty
from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows
from domainssl.modality import Modality, key
from domainssl.sources.augmentation import Change
from domainssl.sources.items import companions
from domainssl.sources.preparation import prepare
from domainssl.sources.volume_options import Contrast, ExamWindow, Preparation
from domainssl.sources.windows import Cut

__all__ = ["Drawn", "VolumeSource", "size_of"]

_WINDOW, _CHANGE = 51, 52  # tags that keep the streams of random numbers apart
_UNPACKED = 3  # bytes that a byte of a packed scan holds, roughly
Array = np.ndarray[Any, Any]


class _Volume(Protocol):
    """A prepared exam, in memory or on disk."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along X, Y, Z."""

    @property
    def affine(self) -> Array:
        """Voxel to RAS mm, (4, 4)."""

    def crop(self, start: Sequence[int], size: Sequence[int]) -> Prepared:
        """Return a box."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A window of an exam: what it holds, the share that is not air, where it lies, what changes.

    `change` is None where nothing does, as in held-out exams.
    """

    box: Prepared
    shown: float
    cut: Cut
    window: ExamWindow
    change: Change | None


@dataclass(kw_only=True)
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
        prepared: Where prepared exams are kept on disk; None keeps the last ones in memory.
        keys: Their keys there.
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
    prepared: Exams[Exam] | None = None
    keys: Sequence[str] = ()
    _kept: OrderedDict[int, Prepared] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept volumes behind: every process reads its own."""
        return {**self.__dict__, "_kept": OrderedDict()}

    @property
    def per_exam(self) -> int:
        """Windows of an exam: as many as asked for in training, else the one in the middle."""
        return self.window.per_exam if self.is_training else 1

    @property
    def items_per_unit(self) -> int:
        """Windows of an exam."""
        return self.per_exam

    @property
    def unit_labels(self) -> Sequence[int] | None:
        """Class per exam, -1 where unknown; None without labels."""
        return self.labels

    @property
    def sizes(self) -> list[int]:
        """Windows per exam."""
        return [self.per_exam] * len(self.exams)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes decoded in an epoch, roughly."""
        files = [path for exam in self.exams for path in exam.scans.values()]
        return _UNPACKED * sum(size_of(path) for path in files)

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Read one exam and cut the windows asked for."""
        exam = self.exams[piece.block]
        found, decoded = self._volume(piece.block)
        epoch = epoch if self.is_training else 0
        count = len(piece)
        rows = Rows(data=self._empty(exam, count), count=count, bytes_decoded=decoded)
        for row, number in enumerate(range(piece.start, piece.stop)):
            index = piece.block * self.per_exam + number
            box, cut, shown = self._window(found, index, epoch)
            self._write(rows, row, box, cut, is_air=shown == 0)
        first = piece.block * self.per_exam
        name = self.ids[piece.block]
        many = self.per_exam > 1
        rows.data["index"] = np.arange(first + piece.start, first + piece.stop)
        rows.data["id"] = [f"{name}_{i}" if many else name for i in range(piece.start, piece.stop)]
        if self.labels is not None:
            rows.data["label"] = np.full(count, self.labels[piece.block], np.int64)
        return rows

    def _volume(self, number: int) -> tuple[_Volume, int]:
        """Return a prepared exam, and the bytes decoded for it now."""
        exam = self.exams[number]
        if self.prepared is not None:
            return self.prepared.fetch(exam, self.keys[number]), 0
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number], 0
        done = prepare(exam, self.contrasts, self.preparation, with_mask=self.has_masks)
        self._kept[number] = done
        limit = self.preparation.keep_mb * 1e6
        while self._kept and sum(v.num_bytes for v in self._kept.values()) > limit:
            self._kept.popitem(last=False)
        return done, done.num_bytes

    # Windows --------------------------------------------------------------------------------

    def _window(self, found: _Volume, index: int, epoch: int) -> tuple[Prepared, Cut, float]:
        """Return a box of the exam, the window in it, and how much of the window is not air."""
        drawn = self._drawn(found, index, epoch)
        return *self._changed(drawn.box, drawn), drawn.shown

    def _drawn(self, found: _Volume, index: int, epoch: int) -> Drawn:
        """Draw the place of a window until enough of it is not air, and what is changed there."""
        if not self.is_training:
            cut = self.window.middle(_room(found, self.window))
            box, shown = self._shown(found, self.window, cut)
            return Drawn(box=box, shown=shown, cut=cut, window=self.window, change=None)
        rng = generator(self.seed, epoch, _WINDOW, index)
        change = self.window.augmentation.draw(generator(self.seed, epoch, _CHANGE, index))
        window = replace(self.window, size=change.extent(self.window.shape, found.affine))
        best: Drawn | None = None
        for _ in range(self.window.tries):
            cut = window.draw(rng, _room(found, window))
            box, shown = self._shown(found, window, cut)
            if best is None or shown > best.shown:
                best = Drawn(box=box, shown=shown, cut=cut, window=window, change=change)
            if best.shown >= self.window.min_foreground:
                break
        assert best is not None  # one is tried at least
        return best

    def _changed(self, box: Prepared, drawn: Drawn) -> tuple[Prepared, Cut]:
        """Return a box of the place drawn as it is delivered, and the window in it."""
        cut, change = drawn.cut.of_part(), drawn.change
        if change is None:
            return box, cut
        box = change.move(box, self.window.shape)
        source = self.contrasts
        names = [n for n in box.values if not source[n].is_hu(_word(box.facts, source[n], n))]
        cut = replace(cut, extent=box.shape, size=box.shape)
        return change.shade(box, names), cut

    def _shown(self, found: _Volume, window: ExamWindow, cut: Cut) -> tuple[Prepared, float]:
        """Read a window, and tell how much of it is not air; beyond the exam it is not valid.

        An exam that is smaller than the window lies in its middle.
        """
        room = _room(found, window)
        before = [(r - s) // 2 for r, s in zip(room, found.shape, strict=True)]
        begin = [b - p for b, p in zip(cut.begin, before, strict=True)]
        start = [max(0, b) for b in begin]
        stops = [min(s, b + e) for s, b, e in zip(found.shape, begin, cut.extent, strict=True)]
        part = found.crop(start, [b - a for a, b in zip(start, stops, strict=True)])
        seen = np.zeros(part.shape, bool)
        for name, values in part.values.items():
            seen |= part.valid[name] & (values[0] >= part.facts["air_below"][name])
        inside = [s - b for s, b in zip(start, begin, strict=True)]
        shown = float(np.count_nonzero(seen)) / math.prod(cut.extent)
        return _padded(part, inside, cut.extent), shown

    def _empty(self, exam: Exam, count: int) -> dict[str, Any]:
        """Return what the windows of an exam are written into; absent modalities are complete."""
        size = self.window.shape
        data: dict[str, Any] = {}
        for name, modality in self.modalities.items():
            limits = np.zeros((count, modality.num_channels, 2), np.float32)
            limits[..., 1] = 1
            words = np.full(count, -1, np.int64) if self.contrasts[name].sources else None
            data |= companions(
                name,
                empty((count, modality.num_channels, *size), torch.float32).zero_(),
                empty((count, *size), torch.bool).zero_(),
                count=count,
                present=name in exam.scans,
                window=limits,
                affine=[np.eye(4).tolist() for _ in range(count)],
                source=words,
            )
        if self.has_masks:
            data["mask"] = torch.full((count, *size), -1, dtype=torch.int64)
        return data

    def _write(self, rows: Rows, row: int, box: Prepared, cut: Cut, *, is_air: bool) -> None:
        """Write one window of every contrast and its companions."""
        affine = (box.affine @ cut.to_source()).tolist()
        data = rows.data
        for name, values in box.values.items():
            cut.write(values, data[name][row])
            if not is_air:
                cut.write_valid(box.valid[name], data[key(name, "valid")][row])
            data[key(name, "window")][row] = box.limits[name]
            data[key(name, "affine")][row] = affine
            if key(name, "source") in data:
                data[key(name, "source")][row] = box.facts["source"][name]
            rows.bytes_needed += values.nbytes
        if box.mask is not None and self.has_masks:
            data["mask"][row] = torch.from_numpy(np.ascontiguousarray(cut.view(box.mask)))


def _room(found: _Volume, window: ExamWindow) -> list[int]:
    """Return the sides of an exam, at least those of the window."""
    return [max(a, b) for a, b in zip(found.shape, window.shape, strict=True)]


def _word(facts: Mapping[str, Any], contrast: Contrast, name: str) -> str:
    """Return what kind of scan a modality of an exam is."""
    return contrast.sources[facts["source"][name]] if contrast.sources else ""


def _padded(part: Prepared, start: Sequence[int], shape: Sequence[int]) -> Prepared:
    """Return a larger box with `part` from `start` on; the rest is 0, not valid, of no class."""
    sides = [(s, n - s - m) for s, n, m in zip(start, shape, part.shape, strict=True)]
    mask = None if part.mask is None else part.mask.astype(np.int64)
    if any(map(any, sides)):
        values = {n: np.pad(v, [(0, 0), *sides]) for n, v in part.values.items()}
        valid = {n: np.pad(v, sides) for n, v in part.valid.items()}
        mask = None if mask is None else np.pad(mask, sides, constant_values=-1)
    else:
        values, valid = dict(part.values), dict(part.valid)
    affine = shifted(part.affine, [-s for s in start])
    return replace(part, values=values, valid=valid, mask=mask, affine=affine)


def size_of(path: str) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(f, n)) for f, _, names in os.walk(path) for n in names)
