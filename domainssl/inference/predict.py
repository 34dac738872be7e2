"""What predictions of every domain share: the task, the windows, the map, the folder it goes to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone
from domainssl.backbones.card import weights_digest
from domainssl.errors import ConfigError, DataError, unwritable
from domainssl.files import PART, read_json, write_json
from domainssl.inference.outputs import read_record
from domainssl.inference.sliding import Slabs
from domainssl.inference.tokens import fitting_sides
from domainssl.modality import Batch, key
from domainssl.nn.sliding import Blending, Box, Windows, class_map, slide_over

__all__ = [
    "LabelMap",
    "NumberMap",
    "PredictOptions",
    "Predictor",
    "claim_folder",
    "predict_map",
    "record_of",
    "sides_for",
]

Array = np.ndarray[Any, Any]
_RECORD = "predict.json"
_DEFAULT_SIDE = 96  # of windows, where neither task nor data say
_NOTHING = 1e30  # stands for certainty that nothing was measured


class Predictor(Protocol):
    """What prediction asks of a task of dense classes."""

    backbone: Backbone
    classes: tuple[str, ...]
    context_size: int | tuple[int, ...] | None

    def logits(self, batch: Batch) -> Tensor:
        """Return float32 (B, K, *S)."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How inputs larger than a window are predicted.

    Attributes:
        window: Side of a window in pixels or voxels, one number or one per axis; None is what the
            task was trained on.
        overlap: Share of a window that the next one covers again.
        blending: How overlapping windows are joined; see `nn.sliding.Blend`.
        batch_size: Windows at once.
        device: Where to compute.
    """

    window: tuple[int, ...] | None = None
    overlap: float = 0.25
    blending: Blending = "gaussian"
    batch_size: int = 1
    device: str = "cpu"
    progress: Callable[[int, int], None] | None = field(default=None, compare=False)

    def facts(self) -> dict[str, Any]:
        """Return what the result depends on, as plain data."""
        window = None if self.window is None else list(self.window)
        return {"window": window, "overlap": self.overlap, "blending": self.blending}


def sides_for(task: Predictor, options: PredictOptions, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sides of a window: as asked for, else the size that the task was trained on.

    A window asked for that is larger than the input becomes what is needed for it.

    Args:
        task: The task.
        options: What is asked for.
        shape: Pixels or voxels of the input along each axis.

    Raises:
        ConfigError: There are numbers for another number of axes.
    """
    axes = len(shape)
    sizes = [m.size for m in task.backbone.modalities.values() if len(m.size) == axes]
    trained = _per_axis(task.context_size or (sizes[0] if sizes else _DEFAULT_SIDE), axes)
    if options.window is None:
        return trained
    return fitting_sides(_per_axis(options.window, axes), trained, shape)


def _per_axis(found: int | Sequence[int], axes: int) -> tuple[int, ...]:
    sides = (found,) * axes if isinstance(found, int) else tuple(found)
    if len(sides) == 1:
        sides *= axes
    if len(sides) != axes or min(sides) < 1:
        raise ConfigError(
            f"--window: got {list(sides)}, expected one number, or {axes}: one per axis."
        )
    return sides


def record_of(folder: Path) -> Path:
    """Return the file that says what the predictions of a folder are made from."""
    return folder / _RECORD


def claim_folder(
    folder: Path,
    task: Predictor,
    facts: Mapping[str, Any],
    *,
    restart: bool,
    outputs: Iterable[Path] = (),
) -> None:
    """Write what predictions of a folder are made from, or compare it: results never mix.

    Args:
        folder: Made where it is not there.
        task: Whose predictions they are; known by its weights.
        facts: What else they depend on, plain data.
        restart: Forget what lies there.
        outputs: What is to be written; in a folder without a record it is somebody else's.

    Raises:
        ConfigError: Predictions of another task or with other options lie there, or files that
            are none.
    """
    weights = weights_digest(task if isinstance(task, nn.Module) else task.backbone)
    named = "numbers" if getattr(task, "kind", "") == "regression" else "classes"
    wanted = {"weights": weights, named: list(task.classes), **facts}
    path = record_of(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not restart:
        found = read_record(path)
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        is_empty = all(entry.name == _RECORD for entry in folder.iterdir())
        if differing and not is_empty:  # of a call that was refused nothing else is there
            raise ConfigError(
                f"{folder}: holds predictions made otherwise ({', '.join(differing)} differ, see "
                f"{_RECORD}). Choose another --output, or add --restart to make them again."
            )
    foreign = [] if path.is_file() else [output for output in outputs if output.exists()]
    if foreign:
        raise ConfigError(
            f"{foreign[0]}: lies there already and was not written by predict ({_RECORD} is not "
            "beside it). Choose another --output, or move it away."
        )
    if not path.is_file() or read_json(path) != json.loads(json.dumps(wanted)):
        write_json(path, wanted)


class _GridFile:
    """Values of a grid in a file that grows by complete slabs; a killed call goes on there.

    Attributes:
        begin: Rows along the first axis that are complete.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], kind: Any, facts: dict[str, Any]
    ) -> None:
        stem = f".{path.name}{PART}"
        self._file, self._rows = path.with_name(f"{stem}map"), path.with_name(f"{stem}rows")
        self._facts, self.begin = facts, 0
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        if self._rows.is_file() and self._file.is_file() and self._file.stat().st_size == size:
            found = read_json(self._rows)
            if {name: found.get(name) for name in facts} == facts:
                self.begin = int(found["rows"])
        if not self.begin:
            _reserve(self._file, size)
        self._values: Any = np.memmap(self._file, kind, "r+", shape=shape)

    def _write(self, place: Any, values: Array, rows: int) -> None:
        self._values[place] = values
        self._values.flush()
        write_json(self._rows, {**self._facts, "rows": rows})

    def remove(self) -> None:
        """Delete the hidden files, once the result is there."""
        self._values = None
        for path in (self._rows, self._file):
            with suppress(OSError):
                path.unlink()


def _reserve(path: Path, size: int) -> None:
    """Make a file of zeros that has its place on the disk: a full one ends whoever writes to a map.

    Raises:
        StorageError: There is no place.
    """
    try:
        with path.open("wb") as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return  # the file system promises no place
        with suppress(OSError):
            path.unlink()
        raise unwritable(f"{path.parent}: {size / 1e6:,.1f} MB for a map", error) from error


class LabelMap(_GridFile):
    """The classes of a grid, in a file that grows.

    Args:
        path: Final name of the result that is made from it; hidden files lie beside it.
        shape: Cells of the grid.
        classes: Number of classes.
        source: What tells the input from another one, plain data.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], classes: int, source: Any) -> None:
        kind = np.uint8 if classes <= 255 else np.int16
        facts = {"shape": list(shape), "classes": classes, "source": source}
        super().__init__(path, shape, kind, facts)

    @property
    def labels(self) -> Any:
        """Classes, uint8, or int16 above 255 of them, memory-mapped, of the grid's shape."""
        return self._values

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells of the grid."""
        return tuple(self._values.shape)

    def write(self, row: int, values: Array) -> None:
        """Take a complete slab from a row on, (rows, *other axes)."""
        self._write(slice(row, row + len(values)), values, row + len(values))


class NumberMap(_GridFile):
    """The predicted numbers of a grid, in a file that grows; NaN where nothing was measured.

    Args:
        path: See `LabelMap`.
        shape: Cells of the grid.
        targets: Numbers of a cell.
        source: See `LabelMap`.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], targets: int, source: Any) -> None:
        facts = {"shape": list(shape), "targets": targets, "source": source}
        super().__init__(path, (targets, *shape), np.float32, facts)

    @property
    def numbers(self) -> Any:
        """Float32 (K, *shape), memory-mapped."""
        return self._values

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells of the grid."""
        return tuple(self._values.shape[1:])

    def write(self, row: int, values: Array) -> None:
        """Take a complete slab from a row on, (K, rows, *other axes)."""
        rows = row + values.shape[1]
        self._write((slice(None), slice(row, rows)), values, rows)


def predict_map(
    task: Predictor,
    read: Callable[[Box], Batch],
    out: LabelMap | NumberMap,
    options: PredictOptions,
    nothing: int = 0,
) -> None:
    """Fill a map with the most likely class of every cell, or with its numbers.

    Args:
        task: In evaluation mode, on the device of the options.
        read: Returns the batch of a box, of one item; see `slide_over`.
        out: Where classes or numbers go.
        options: Windows and blending.
        nothing: Class where no modality was measured; numbers are NaN there.

    Raises:
        DataError: The task gives numbers that are not finite.
    """
    shape, classes = out.shape, len(task.classes)
    are_numbers = isinstance(out, NumberMap)

    def predict(batch: Batch) -> Tensor:
        logits = task.logits(batch).float()
        if not torch.isfinite(logits).all():
            raise DataError(
                "The task gives numbers that are not finite: its weights are damaged, or values of "
                "the input lie far outside of what it was trained on (see `inspect`)."
            )
        seen = _seen(task, batch, tuple(logits.shape[2:])).to(logits.device).unsqueeze(1)
        last = seen.float() if are_numbers else torch.where(seen, -_NOTHING, _NOTHING)
        return torch.cat([logits, last], 1)

    def finish(values: Tensor) -> Tensor:
        if are_numbers:
            return torch.where(values[-1] > 0.5, values[:-1], torch.nan)
        found = class_map(values).to(torch.int16)
        return torch.where(found == classes, nothing, found)

    slide_over(
        read,
        predict,
        Windows(shape, sides_for(task, options, shape), options.overlap),
        Slabs(shape, out.write),
        mode=options.blending,
        finish=finish,
        batch_size=options.batch_size,
        device=options.device,
        begin=out.begin,
        progress=options.progress,
    )


def _seen(task: Predictor, batch: Batch, size: tuple[int, ...]) -> Tensor:
    """Return where some modality of the grid's resolution was measured, bool (B, *size).

    Of a series on any date; of images of two dates, which are compared, on both.
    """
    masks = []
    for name, modality in task.backbone.modalities.items():
        valid = batch.get(key(name, "valid"))
        if name in batch and valid is not None and tuple(valid.shape[-len(size) :]) == size:
            if valid.ndim > len(size) + 1:
                valid = valid.any(1) if modality.kind == "series" else valid.all(1)
            masks.append(valid)
    if not masks:
        count = next(len(batch[name]) for name in task.backbone.modalities if name in batch)
        return torch.ones(count, *size, dtype=torch.bool)
    return torch.stack(masks).any(0)
