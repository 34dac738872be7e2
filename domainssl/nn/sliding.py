"""Sliding windows over grids of any number of axes, blended in memory that does not grow with them.

    windows = Windows((384, 384, 384), size=96, overlap=0.25)
    slide_over(read, predict, windows, sink, finish=class_map)

`read(box)` returns the batch of one window, from memory or from a file, `predict(batch)` its
logits, (B, C, *size), and `sink(box, values)` takes what is complete. Neither input nor output is
held as a whole. Windows of a grid coarser than the pixels, such as that of tokens, work likewise:
the grid is that of the prediction, and `read` knows the pixels of its cells.

The borders of all windows cut the grid into cells. Windows come in the order of the axes, so a
cell is complete with the last window that covers it: it is divided by its weights, finished (say,
reduced to the most likely class), handed to the sink and forgotten. Open are, at any time, the
rows that the next windows along the first axis overlap, and the pillar under work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.modality import Batch, batch_to, key, sides_of

__all__ = ["Blend", "Blending", "Box", "Windows", "class_map", "slide_over", "window_weights"]

Box = tuple[slice, ...]  # cells of a grid, one slice per axis
Index = tuple[int, ...]
Blending = Literal["constant", "gaussian", "halo"]
Sink = Callable[[Box, Tensor], None]

_SIGMA = 0.125  # of the side of a window, as MONAI
_LEAST_WEIGHT = 1e-3


class Windows:
    """Where windows lie on a grid: in order, all of one size, the last ones moved inwards.

    On an axis that is shorter than a window there is one window, in the middle, beyond both ends:
    its box begins below 0. Places equal those of MONAI's `sliding_window_inference`.

    Args:
        shape: Cells of the grid along each axis.
        size: Cells of a window along each axis; one number for all.
        overlap: Share of a window that the next one covers again, from 0 to below 1; one number
            for all axes or one per axis.

    Raises:
        ConfigError: Names the number that cannot be used.
    """

    def __init__(
        self,
        shape: Sequence[int],
        size: int | Sequence[int],
        overlap: float | Sequence[float] = 0.25,
    ) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.size = sides_of(size, len(self.shape), "windows.size")
        shares = (overlap,) * len(shape) if isinstance(overlap, int | float) else tuple(overlap)
        self.overlap = tuple(float(share) for share in shares)
        for name, values in (("shape", self.shape), ("size", self.size)):
            if not values or min(values) < 1:
                raise ConfigError(f"windows.{name}: got {list(values)}, expected at least 1.")
        if len(shares) != len(self.shape) or not all(0 <= share < 1 for share in self.overlap):
            raise ConfigError(
                f"windows.overlap: got {list(shares)}, expected a share of a window from 0 to "
                f"below 1, such as 0.25, or {len(self.shape)} of them: one per axis."
            )

    @cached_property
    def begins(self) -> tuple[tuple[int, ...], ...]:
        """First cells of the windows along each axis; below 0 where the grid is smaller."""
        return tuple(
            _begins(*each) for each in zip(self.shape, self.size, self.overlap, strict=True)
        )

    def __len__(self) -> int:
        return math.prod(len(begins) for begins in self.begins)

    def __iter__(self) -> Iterator[tuple[Index, Box]]:
        """Yield index and box of every window, the last axis fastest."""
        for index in itertools.product(*(range(len(begins)) for begins in self.begins)):
            yield index, self.box(index)

    def box(self, index: Sequence[int]) -> Box:
        """Return the cells of a window, which may begin before the grid and end after it."""
        return tuple(
            slice(begins[i], begins[i] + size)
            for begins, i, size in zip(self.begins, index, self.size, strict=True)
        )

    def inside(self, box: Box) -> tuple[Box, tuple[tuple[int, int], ...]]:
        """Return the part of a box on the grid, and the cells missing before and after it."""
        part = tuple(
            slice(max(s.start, 0), min(s.stop, n)) for s, n in zip(box, self.shape, strict=True)
        )
        missing = tuple(
            (p.start - s.start, s.stop - p.stop) for s, p in zip(box, part, strict=True)
        )
        return part, missing

    def rows(self, mode: Blending = "constant") -> tuple[int, ...]:
        """Return the borders of the slabs along the first axis in which results get complete."""
        return _axes(self, mode)[0].edges


def _times(numbers: Sequence[int]) -> str:
    return " x ".join(str(n) for n in numbers)


def _begins(length: int, size: int, overlap: float) -> tuple[int, ...]:
    if size >= length:
        return (-((size - length) // 2),)
    step = max(1, int(size * (1 - overlap)))
    count = math.ceil((length - size) / step) + 1
    return tuple(min(i * step, length - size) for i in range(count))


def window_weights(size: Sequence[int], mode: Blending) -> Tensor | None:
    """Return how much each cell of a window counts, float32 (*size), as MONAI; None for equally.

    Source: MONAI `compute_importance_map`: exp(-x^2 / (2 sigma^2)) over every axis, with sigma an
    eighth of the side, and no less than the larger of 0.001 and the smallest value.
    """
    if mode != "gaussian":
        return None
    weights = torch.ones(())
    for side in size:
        x = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        weights = weights[..., None] * torch.exp(x**2 / (-2 * (_SIGMA * side) ** 2))
    return weights.clamp_(min=max(float(weights.min()), _LEAST_WEIGHT))


@dataclass(frozen=True)
class _Axis:
    """The cells of one axis.

    Attributes:
        edges: Their borders, in order, from 0 to the end of the grid.
        covering: Numbers of the first and the last window over each cell.
        covered: Range of the cells that each window covers.
    """

    edges: tuple[int, ...]
    covering: tuple[tuple[int, int], ...]
    covered: tuple[range, ...]


def _axes(windows: Windows, mode: Blending) -> list[_Axis]:
    found = []
    for length, size, begins in zip(windows.shape, windows.size, windows.begins, strict=True):
        if mode == "halo":  # every cell is taken from the window whose middle is next to it
            cuts = [(a + size + b) // 2 for a, b in itertools.pairwise(begins)]
            spans = list(itertools.pairwise([0, *cuts, length]))
        else:
            spans = [(max(b, 0), min(b + size, length)) for b in begins]
        edges = sorted({edge for span in spans for edge in span})
        at = {edge: i for i, edge in enumerate(edges)}
        covered = tuple(range(at[a], at[b]) for a, b in spans)
        covering = []
        for cell in range(len(edges) - 1):
            over = [number for number, cells in enumerate(covered) if cell in cells]
            covering.append((over[0], over[-1]))
        found.append(_Axis(tuple(edges), tuple(covering), covered))
    return found


class Blend:
    """The weighted mean of what windows say about each cell, handed on as soon as it is complete.

    Args:
        windows: Where they lie; `add` wants all of them, in their order.
        sink: Takes the box of a cell on the grid and its values, (C, *cell) or what `finish` makes
            of them. The values may be overwritten after the call.
        mode: Weights of a window: `constant`, `gaussian`, or `halo`: no blending, every cell is
            taken from the window in whose middle it lies most.
        finish: Applied to the mean of complete cells, such as `class_map`.
        begin: Rows along the first axis that an earlier call has handed on; one of
            `windows.rows(mode)`. Windows that end there need not be added.

    Attributes:
        held: Cells times channels that are open now.

    Raises:
        ConfigError: `mode` or `begin` cannot be used.
    """

    def __init__(
        self,
        windows: Windows,
        sink: Sink,
        *,
        mode: Blending = "gaussian",
        finish: Callable[[Tensor], Tensor] | None = None,
        begin: int = 0,
    ) -> None:
        if mode not in get_args(Blending):
            raise ConfigError(
                f"blending: got {mode!r}, expected one of {', '.join(get_args(Blending))}."
                f"{nearest(mode, get_args(Blending))}"
            )
        self.windows, self._sink, self._finish = windows, sink, finish
        self._axes = _axes(windows, mode)
        if begin not in self._axes[0].edges:
            raise ConfigError(
                f"begin: got row {begin}, expected the end of a slab: "
                f"{', '.join(map(str, self._axes[0].edges[:8]))}, ..."
            )
        self._first = self._axes[0].edges.index(begin)
        self._weights = window_weights(windows.size, mode)
        self._open: dict[Index, Tensor] = {}
        self._sums: dict[Index, Tensor] = {}

    @property
    def held(self) -> int:
        """Cells times channels that are open now."""
        return sum(values.numel() for values in self._open.values())

    def needs(self, index: Sequence[int]) -> bool:
        """Tell whether a window covers a row that is not done yet."""
        return self._axes[0].covered[index[0]].stop > self._first

    def add(self, index: Index, values: Tensor) -> None:
        """Take what one window says, float (C, *size); it is not changed.

        Raises:
            DataError: The values are not those of a window.
        """
        if tuple(values.shape[1:]) != self.windows.size or not values.is_floating_point():
            raise DataError(
                f"sliding window {index}: the prediction has the shape {tuple(values.shape)} and "
                f"type {str(values.dtype).removeprefix('torch.')}, expected a channel axis and "
                f"{_times(self.windows.size)} cells, in float."
            )
        box, values = self.windows.box(index), values.float()
        ranges = [axis.covered[i] for axis, i in zip(self._axes, index, strict=True)]
        for cell in itertools.product(*ranges):
            if cell[0] < self._first:
                continue
            place = tuple(
                slice(axis.edges[c], axis.edges[c + 1])
                for axis, c in zip(self._axes, cell, strict=True)
            )
            part = tuple(
                slice(p.start - b.start, p.stop - b.start) for p, b in zip(place, box, strict=True)
            )
            self._add_to_cell(index, cell, place, part, values[(slice(None), *part)])

    def _add_to_cell(
        self, index: Index, cell: Index, place: Box, part: Box, values: Tensor
    ) -> None:
        over = [axis.covering[c] for axis, c in zip(self._axes, cell, strict=True)]
        count = math.prod(last - first + 1 for first, last in over)
        if count > 1:
            weights = self._weights
            if weights is not None:
                weights = weights.to(values.device)[part]
            if cell not in self._open:
                self._open[cell] = values.clone() if weights is None else values * weights
                if weights is not None:
                    self._sums[cell] = weights.clone()
            elif weights is None:
                self._open[cell] += values
            else:
                self._open[cell].addcmul_(values, weights)
                self._sums[cell] += weights
        if index != tuple(last for _, last in over):
            return
        if count > 1:
            values = self._open.pop(cell)
            values /= count if self._weights is None else self._sums.pop(cell)
        self._sink(place, values if self._finish is None else self._finish(values))


def class_map(values: Tensor) -> Tensor:
    """Return the channel with the largest value, (C, *S) -> uint8 (*S); int16 above 256 classes."""
    found = values.max(0).indices  # several times faster than `argmax` over the first axis
    return found.to(torch.uint8 if len(values) <= 256 else torch.int16)


def slide_over(
    read: Callable[[Box], Batch],
    predict: Callable[[Batch], Tensor],
    windows: Windows,
    sink: Sink,
    *,
    mode: Blending = "gaussian",
    finish: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    begin: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Predict all windows and hand what is complete to the sink.

    The next batch is read in a thread while one is predicted.

    Args:
        read: Returns the batch, of one item, of a box that lies on the grid. The last axes of
            modalities and their `valid` are those of the grid, in the same or in another
            resolution. Where a grid is smaller than a window, batches are filled up to the window
            with zeros and `<m>.valid` False.
        predict: Returns float (B, C, *size) for B windows; called without gradients.
        windows: Which windows.
        sink: Takes boxes of the grid with their values, (C, *cell) or what `finish` makes of them,
            on the device of the prediction.
        mode: See `Blend`.
        finish: Applied to complete cells, such as `class_map`.
        batch_size: Windows that are predicted at once.
        device: Where batches are moved; None leaves them where they are.
        begin: Rows along the first axis that an earlier call has completed; see `Blend`.
        progress: Called with the windows done and their number.

    Raises:
        ConfigError: An option cannot be used.
        DataError: Batches or predictions do not fit the windows.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: got {batch_size!r}, expected at least 1.")
    blend = Blend(windows, sink, mode=mode, finish=finish, begin=begin)
    todo = [index for index, _ in windows if blend.needs(index)]
    parts = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    done = len(windows) - len(todo)
    with ThreadPoolExecutor(1, "sliding-windows") as pool, torch.inference_mode():
        coming = pool.submit(_read_windows, read, windows, parts[0]) if parts else None
        for number, part in enumerate(parts, 1):
            assert coming is not None
            batch = coming.result()
            if number < len(parts):
                coming = pool.submit(_read_windows, read, windows, parts[number])
            if device is not None:
                batch = batch_to(batch, device)
            found = predict(batch)
            if len(found) != len(part):
                raise DataError(
                    f"sliding windows: {len(found)} predictions for a batch of {len(part)}."
                )
            for index, values in zip(part, found, strict=True):
                blend.add(index, values)
            done += len(part)
            if progress is not None:
                progress(done, len(windows))


def _read_windows(read: Callable[[Box], Batch], windows: Windows, part: Sequence[Index]) -> Batch:
    """Return some windows as one batch, those at small grids filled up."""
    batches = []
    for index in part:
        box, missing = windows.inside(windows.box(index))
        batches.append(_filled(read(box), box, missing))
    first = batches[0]
    for batch in batches[1:]:
        if batch.keys() != first.keys():
            odd = sorted(batch.keys() ^ first.keys())
            raise DataError(f"sliding windows: only some of them have {', '.join(odd)}.")
    out: Batch = {}
    for name, value in first.items():
        values = [batch[name] for batch in batches]
        if isinstance(value, Tensor):
            out[name] = torch.cat(values) if len(values) > 1 else value
        else:
            out[name] = [one for each in values for one in each]
    return out


def _filled(batch: Batch, box: Box, missing: Sequence[tuple[int, int]]) -> Batch:
    """Return the batch of a box with the cells that are missing, and where values are valid."""
    if not any(map(any, missing)):
        return batch
    axes, out = len(box), dict(batch)
    for name, values in batch.items():
        if "." in name or not isinstance(values, Tensor) or values.ndim < 2 + axes:
            continue
        margins: list[int] = []
        for side, cells, ends in zip(values.shape[-axes:], box, missing, strict=True):
            scale = Fraction(side, cells.stop - cells.start)
            if any((end * scale).denominator > 1 for end in ends):
                raise DataError(
                    f"sliding windows: {name} has {side} pixels for {cells.stop - cells.start} "
                    f"cells of the grid, which cannot be filled up to a window of "
                    f"{cells.stop - cells.start + sum(ends)} cells in whole pixels. Choose a "
                    "smaller window."
                )
            margins[:0] = [int(end * scale) for end in ends]
        valid = batch.get(key(name, "valid"))
        if valid is None:
            valid = torch.ones_like(values.select(-axes - 1, 0), dtype=torch.bool)
        out[name], out[key(name, "valid")] = pad(values, margins), pad(valid, margins)
    return out
