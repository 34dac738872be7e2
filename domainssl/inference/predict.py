"""What predictions of every domain share: the task, the windows, the map, the folder it goes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone
from domainssl.backbones.card import weights_digest
from domainssl.errors import ConfigError, DataError
from domainssl.files import PART, read_json, write_json
from domainssl.inference.sliding import Slabs
from domainssl.modality import Batch, key
from domainssl.nn.sliding import Blending, Box, Windows, class_map, slide_over

__all__ = ["LabelMap", "PredictOptions", "Predictor", "claim_folder", "predict_map", "sides_for"]

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


def sides_for(task: Predictor, options: PredictOptions, axes: int) -> tuple[int, ...]:
    """Return the sides of a window: as asked for, else the size that the task was trained on.

    Raises:
        ConfigError: There are numbers for another number of axes.
    """
    sizes = [m.size for m in task.backbone.modalities.values() if len(m.size) == axes]
    found = options.window or task.context_size or (sizes[0] if sizes else _DEFAULT_SIDE)
    sides = (found,) * axes if isinstance(found, int) else tuple(found)
    if len(sides) == 1:
        sides *= axes
    if len(sides) != axes or min(sides) < 1:
        raise ConfigError(
            f"--window: got {list(sides)}, expected one number, or {axes}: one per axis."
        )
    return sides


def claim_folder(folder: Path, task: Predictor, facts: Mapping[str, Any], *, restart: bool) -> None:
    """Write what predictions of a folder are made from, or compare it: results never mix.

    Args:
        folder: Made where it is not there.
        task: Whose predictions they are; known by its weights.
        facts: What else they depend on, plain data.
        restart: Forget what lies there.

    Raises:
        ConfigError: Predictions of another task or with other options lie there.
    """
    weights = weights_digest(task if isinstance(task, nn.Module) else task.backbone)
    wanted = {"weights": weights, "classes": list(task.classes), **facts}
    path = folder / _RECORD
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not restart:
        found = read_json(path)
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        if differing:
            raise ConfigError(
                f"{folder}: holds predictions made otherwise ({', '.join(differing)} differ, see "
                f"{_RECORD}). Choose another --output, or add --restart to make them again."
            )
    write_json(path, wanted)


class LabelMap:
    """The classes of a grid in a file that grows by complete slabs; a killed call goes on there.

    Args:
        path: Final name of the result that is made from it; hidden files lie beside it.
        shape: Cells of the grid.
        classes: Number of classes.
        source: What tells the input from another one, plain data.

    Attributes:
        labels: uint8, or int16 above 255 classes, memory-mapped, of the grid's shape.
        begin: Rows along the first axis that are complete.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], classes: int, source: Any) -> None:
        stem = f".{path.name}{PART}"
        self._file, self._rows = path.with_name(f"{stem}map"), path.with_name(f"{stem}rows")
        self._facts = {"shape": list(shape), "classes": classes, "source": source}
        self.begin = 0
        kind = np.uint8 if classes <= 255 else np.int16
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        if self._rows.is_file() and self._file.is_file() and self._file.stat().st_size == size:
            found = read_json(self._rows)
            if {name: found.get(name) for name in self._facts} == self._facts:
                self.begin = int(found["rows"])
        self.labels: Any = np.memmap(self._file, kind, "r+" if self.begin else "w+", shape=shape)

    def write(self, row: int, values: Array) -> None:
        """Take a complete slab from a row on, (rows, *other axes)."""
        self.labels[row : row + len(values)] = values
        self.labels.flush()
        write_json(self._rows, {**self._facts, "rows": row + len(values)})

    def remove(self) -> None:
        """Delete the hidden files, once the result is there."""
        self.labels = None
        for path in (self._rows, self._file):
            with suppress(OSError):
                path.unlink()


def predict_map(
    task: Predictor,
    read: Callable[[Box], Batch],
    out: LabelMap,
    options: PredictOptions,
    nothing: int,
) -> None:
    """Fill a map with the most likely class of every cell.

    Args:
        task: In evaluation mode, on the device of the options.
        read: Returns the batch of a box, of one item; see `slide_over`.
        out: Where the classes go.
        options: Windows and blending.
        nothing: Value where no modality was measured.

    Raises:
        DataError: The task gives numbers that are not finite.
    """
    shape, classes = tuple(out.labels.shape), len(task.classes)

    def predict(batch: Batch) -> Tensor:
        logits = task.logits(batch).float()
        if not torch.isfinite(logits).all():
            raise DataError(
                "The task gives numbers that are not finite: its weights are damaged, or values of "
                "the input lie far outside of what it was trained on (see `inspect`)."
            )
        seen = _seen(task, batch, tuple(logits.shape[2:])).to(logits.device)
        return torch.cat([logits, torch.where(seen, -_NOTHING, _NOTHING).unsqueeze(1)], 1)

    def finish(values: Tensor) -> Tensor:
        found = class_map(values).to(torch.int16)
        return torch.where(found == classes, nothing, found)

    slide_over(
        read,
        predict,
        Windows(shape, sides_for(task, options, len(shape)), options.overlap),
        Slabs(shape, out.write),
        mode=options.blending,
        finish=finish,
        batch_size=options.batch_size,
        device=options.device,
        begin=out.begin,
        progress=options.progress,
    )


def _seen(task: Predictor, batch: Batch, size: tuple[int, ...]) -> Tensor:
    """Return where some modality of the grid's resolution was measured, bool (B, *size)."""
    masks = []
    for name, modality in task.backbone.modalities.items():
        valid = batch.get(key(name, "valid"))
        if name in batch and valid is not None and tuple(valid.shape[-len(size) :]) == size:
            masks.append(valid.any(1) if modality.kind == "series" else valid)
    if not masks:
        count = next(len(batch[name]) for name in task.backbone.modalities if name in batch)
        return torch.ones(count, *size, dtype=torch.bool)
    return torch.stack(masks).any(0)
