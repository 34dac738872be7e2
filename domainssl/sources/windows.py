"""What is read of a scene, a cube or a volume: a `Window` as users ask for it, a `Cut` as drawn.

One cut per item serves all its modalities, so they stay co-registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from domainssl._torch import resize_into
from domainssl.errors import ConfigError, nearest

__all__ = ["Cut", "Window"]

_METRES = {"px": None, "m": 1.0, "mm": 1e-3, "um": 1e-6}
_WHERE = "data.init_args.window"


@dataclass(frozen=True, kw_only=True)
class Window:
    """The part of a scene, cube or volume that an item shows, the same for all its modalities.

    Training draws its place; held-out items show the middle, or lie side by side. Windows without
    `min_size` and `max_size` are never resized.

    Attributes:
        size: Side of what is delivered, or one per axis (rows and columns; x, y and z). None is
            the DataModule's own size.
        unit: Of all sizes: `px` (pixels or voxels of the finest modality), `m`, `mm` or `um`.
        min_size: Smallest side read in training, resized to `size`; None means `size`. Of the
            first axis; the others keep their proportion.
        max_size: Largest side read in training; clipped to the scene.
        flips: Mirror at random along every axis, or one answer per axis.
        quarter_turns: Turn at random by 0, 90, 180 or 270 degrees in the plane of the first two
            axes; by 0 or 180 where their sizes differ.
        jitter: Draw the place. Windows of a cube move by up to half their size.
        per_block: Most windows of a cube along the side of a block; a larger chunk is read several
            times.
    """

    size: float | tuple[float, ...] | None = None
    unit: Literal["px", "m", "mm", "um"] = "px"
    min_size: float | None = None
    max_size: float | None = None
    flips: bool | tuple[bool, ...] = True
    quarter_turns: bool = True
    jitter: bool = True
    per_block: int = 8

    def __post_init__(self) -> None:
        if self.unit not in _METRES:
            raise ConfigError(
                f"{_WHERE}.unit: got {self.unit!r}, expected one of {', '.join(_METRES)}."
                f"{nearest(self.unit, _METRES)}"
            )
        if self.per_block < 1:
            raise ConfigError(f"{_WHERE}.per_block: got {self.per_block!r}, expected at least 1.")
        for name in ("size", "flips"):
            if isinstance(getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = (self.size or (0,)) if isinstance(self.size, tuple) else (self.size,)
        least = sizes[0] if self.min_size is None else self.min_size
        most = sizes[0] if self.max_size is None else self.max_size
        if any(s is not None and s <= 0 for s in (*sizes, least)) or (
            least is not None and (most is None or least > most)
        ):
            raise ConfigError(
                f"{_WHERE}: got size={self.size!r}, min_size={self.min_size!r}, "
                f"max_size={self.max_size!r}; expected sizes above 0 and min_size <= max_size."
            )

    def sized(self, default: Window) -> Window:
        """Return the window with the sizes of a DataModule where it has none of its own."""
        if self.size is not None:
            return self
        sizes = ("size", "unit", "min_size", "max_size")
        return replace(self, **{name: getattr(default, name) for name in sizes})

    def on_grid(
        self,
        cell_m: float,
        *,
        px_m: float | None = None,
        whole: Sequence[int] = (),
        axes: int = 2,
        name: str = "pixels",
    ) -> Window:
        """Return the same window in whole cells of a grid: `unit` is `px`, `size` a tuple.

        Args:
            cell_m: Size of a cell in metres.
            px_m: Size of a pixel of the finest modality in metres; None means of a cell.
            whole: Cells of a whole item, which a window without size takes.
            axes: Number of axes.
            name: What the cells are called in errors.

        Raises:
            ConfigError: A size is not a whole number of cells, or there are more or fewer than
                axes.
        """
        metres = _METRES[self.unit]
        scale = ((px_m or cell_m) if metres is None else metres) / cell_m

        def cells(value: float) -> int:
            count = value * scale
            if abs(count - round(count)) > 1e-6 or round(count) < 1:
                raise ConfigError(
                    f"{_WHERE}.size: {value:g} {self.unit} is no multiple of {1 / scale:g} "
                    f"{self.unit}, one of the {name}; use {max(1, round(count)) / scale:g}."
                )
            return round(count)

        sizes = self.size if isinstance(self.size, tuple) else (self.size,) * axes
        if len(sizes) != axes or (None in sizes and not whole):
            raise ConfigError(
                f"{_WHERE}.size: got {self.size!r}, expected a number, or a list of {axes}."
            )
        size = tuple(whole) if None in sizes else tuple(cells(float(s or 0)) for s in sizes)
        ends = (None if s is None else cells(s) for s in (self.min_size, self.max_size))
        least, most = ends
        if isinstance(self.flips, tuple) and len(self.flips) != axes:
            raise ConfigError(
                f"{_WHERE}.flips: got {list(self.flips)!r}, expected true, false, or a list of "
                f"{axes}, one answer per axis."
            )
        return replace(self, size=size, unit="px", min_size=least, max_size=most)

    def must_not_resize(self) -> None:
        """Refuse `min_size` and `max_size` where modalities keep their pixels.

        Raises:
            ConfigError: One of them is set.
        """
        if (self.min_size, self.max_size) != (None, None):
            raise ConfigError(
                f"{_WHERE}: min_size={self.min_size!r}, max_size={self.max_size!r}, but windows "
                "of these data keep their pixels. Leave both out."
            )

    # Below, sizes are whole numbers of cells, as `on_grid` gives them. ------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells delivered along each axis."""
        assert isinstance(self.size, tuple)
        return tuple(int(s) for s in self.size)

    @property
    def least(self) -> int:
        """Cells of the smallest training window along the first axis."""
        return self.shape[0] if self.min_size is None else int(self.min_size)

    @property
    def most(self) -> int:
        """Cells of the largest training window along the first axis."""
        return self.shape[0] if self.max_size is None else int(self.max_size)

    @property
    def is_fixed(self) -> bool:
        """True when windows are cut out and never resized."""
        return self.least == self.most == self.shape[0]

    def fitting(self, room: Sequence[int]) -> int:
        """Return the cells along the first axis of the largest window that fits."""
        return min(r * self.shape[0] // s for r, s in zip(room, self.shape, strict=True))

    def check(self, room: Sequence[int], where: str) -> None:
        """Refuse scenes that are smaller than the smallest training window.

        Raises:
            ConfigError: Names both sizes.
        """
        if self.least > self.fitting(room):
            raise ConfigError(
                f"{where}: there are {' x '.join(map(str, room))} px, but the smallest training "
                f"window takes {self.least}. Lower {_WHERE}.min_size (that is size, where it is "
                f"not set) to at most {self.fitting(room)}; windows are resized to size."
            )

    def _extent(self, first: int) -> tuple[int, ...]:
        return tuple(round(first * s / self.shape[0]) for s in self.shape)

    def middle(self, room: Sequence[int]) -> Cut:
        """Return the cut of evaluation: `size` cells in the middle, neither turned nor flipped;
        the largest part of that shape where the room is smaller.
        """
        extent = self._extent(min(self.shape[0], self.fitting(room)))
        begin = tuple((r - e) // 2 for r, e in zip(room, extent, strict=True))
        return Cut(begin=begin, extent=extent, size=self.shape)

    def draw(
        self, rng: np.random.Generator, room: Sequence[int], home: Sequence[int] | None = None
    ) -> Cut:
        """Draw the cut of one training item: extent, place, flips and turns.

        Everything is drawn even if unused, so that one option moves no other choice.

        Args:
            rng: Of the item and epoch.
            room: Cells there are along each axis.
            home: Where the window lies without jitter, which then moves it by up to half its size;
                None lets it lie anywhere.
        """
        extent = self._extent(int(rng.integers(self.least, min(self.most, self.fitting(room)) + 1)))
        free = [r - e for r, e in zip(room, extent, strict=True)]
        if home is None:
            begin = [int(rng.integers(0, f + 1)) for f in free]
            if not self.jitter:
                begin = [f // 2 for f in free]
        else:  # drawn from the last axis to the first, whose number grows against the world's
            shifts = [int(rng.integers(-(e // 2), e // 2 + 1)) for e in reversed(extent)][::-1]
            shifts[0] = -shifts[0]
            begin = [
                min(max(h + s * self.jitter, 0), f)
                for h, s, f in zip(home, shifts, free, strict=True)
            ]
        flips = rng.integers(0, 2, len(extent))
        may_flip = self.flips if isinstance(self.flips, tuple) else (self.flips,) * len(extent)
        turns = int(rng.integers(0, 4))
        if not self.quarter_turns:
            turns = 0
        elif self.shape[0] != self.shape[1]:
            turns &= 2
        return Cut(
            begin=tuple(begin),
            extent=extent,
            size=self.shape,
            flips=tuple(bool(f) and may for f, may in zip(flips, may_flip, strict=True)),
            turns=turns,
        )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A box of a scene or volume and the way it is laid down; flips come before turns.

    Attributes:
        begin: First cell along each axis.
        extent: Cells taken along each axis.
        size: Cells delivered along each axis.
        flips: Axes that are reversed; empty for none.
        turns: Quarter turns from the second axis towards the first (counter-clockwise in images).
    """

    begin: tuple[int, ...]
    extent: tuple[int, ...]
    size: tuple[int, ...]
    flips: tuple[bool, ...] = ()
    turns: int = 0

    @property
    def slices(self) -> tuple[slice, ...]:
        """The cells that are taken, per axis."""
        return tuple(slice(b, b + e) for b, e in zip(self.begin, self.extent, strict=True))

    @property
    def is_resized(self) -> bool:
        """True where more or fewer cells are delivered than taken."""
        return self.extent != self.size

    def to_source(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the matrix from delivered cells to those of the source, not resized.

        Returns:
            (n + 1, n + 1): index in the source = matrix @ (delivered index, 1).
        """
        axes = len(self.begin)
        matrix = np.eye(axes + 1)
        for axis, is_reversed in enumerate(self._reversed()):
            if is_reversed:
                matrix[axis, axis] = -1
            matrix[axis, axes] = self.begin[axis] + (self.extent[axis] - 1) * is_reversed
        if self.turns % 2:
            matrix[:, [0, 1]] = matrix[:, [1, 0]]
        return matrix

    def of_part(self) -> Cut:
        """Return the same cut for arrays that hold its cells only."""
        return replace(self, begin=(0,) * len(self.begin))

    def scaled(self, times: int, margin: int = 0) -> Cut:
        """Return the same cut on a grid with `times` as many cells, after a margin."""
        return replace(
            self,
            begin=tuple(margin + b * times for b in self.begin),
            extent=tuple(e * times for e in self.extent),
            size=tuple(s * times for s in self.size),
        )

    def _reversed(self) -> list[bool]:
        """Return which axes are reversed, turns included; odd ones then exchange the first two."""
        flips = list(self.flips or (False,) * len(self.begin))
        flips[0] ^= self.turns in (2, 3)
        flips[1] ^= self.turns in (1, 2)
        return flips

    def view(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the cut of `array` (..., *axes) as a view (..., *extent)."""
        index: tuple[Any, ...] = (..., *self.slices)
        out = array[index]
        if any(steps := self._reversed()):
            index = (..., *(slice(None, None, -1 if s else 1) for s in steps))
            out = out[index]
        axes = len(self.begin)
        return out.swapaxes(-axes, 1 - axes) if self.turns % 2 else out

    def write(
        self,
        array: np.ndarray[Any, Any],
        out: Tensor,
        offset: int = 0,
        scratch: np.ndarray[Any, Any] | None = None,
    ) -> None:
        """Write the cut of `array` (..., *axes) into `out` (..., *size).

        A resized window is antialiased and bilinear (trilinear in 3D).

        Args:
            array: Stored values.
            out: Written in place, contiguous.
            offset: Subtracted from all values but 0, which stands for no data.
            scratch: Memory to convert in, float32 (large enough for the window,); fresh pages
                for every window would cost more than all the arithmetic.
        """
        view = self.view(array)
        if self.is_resized:
            if scratch is None:
                scratch = np.empty(view.size, np.float32)
            stored = np.ascontiguousarray(view)  # straightened before it gets larger
            values = scratch[: view.size].reshape(view.shape)
            np.copyto(values, stored)
            if offset:
                values -= np.float32(offset)
                values[stored == 0] = 0
            _resize(values, out, len(self.size))
            return
        target = out.numpy()
        np.copyto(target, view, casting="same_kind")
        _subtract(target, offset)

    def write_valid(self, valid: np.ndarray[Any, Any], out: Tensor) -> None:
        """Write the mask (..., *axes), True = valid, into `out` (..., *size).

        A pixel is valid only if every pixel that it was interpolated from is.
        """
        view = self.view(valid)
        if not self.is_resized:
            np.copyto(out.numpy(), view)
        elif view.all():
            out.fill_(True)
        else:
            hidden = torch.empty(out.shape)
            _resize((~view).astype(np.float32, order="C"), hidden, len(self.size))
            torch.le(hidden, 1e-6, out=out)

    def write_classes(self, classes: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Write the cut of a map of classes (*axes) into `out` (*size), nearest neighbour."""
        view = self.view(classes)
        if self.is_resized:
            nearest_cells = [
                ((np.arange(into) + 0.5) * cells / into).astype(np.int64)
                for cells, into in zip(view.shape, out.shape, strict=True)
            ]
            view = view[np.ix_(*nearest_cells)]
        np.copyto(out, view)

    def geo(self, x0: float, y0: float, step: float) -> dict[str, float]:
        """Return where an image lies: its affine map from (column, row) to CRS coordinates.

        Args:
            x0: CRS coordinate of the outer edge of the scene's first column.
            y0: The same of its first row; rows go south.
            step: Size of a scene pixel in CRS units.

        Returns:
            `a b c d e f` with x = a·column + b·row + c, y = d·column + e·row + f, where column
            and row count from the outer corner of the delivered window.
        """
        is_turned = self.turns % 2
        maps = []  # along x and y: weights of column and row, and the beginning
        for axis, is_reversed in zip((1, 0), self._reversed()[::-1], strict=True):
            scale = step * self.extent[axis] / self.size[axis]
            weights = [0.0, 0.0]
            weights[1 - axis if is_turned else axis] = -scale if is_reversed else scale
            far = scale * self.size[axis] if is_reversed else 0.0
            maps.append((weights[1], weights[0], step * self.begin[axis] + far))
        (a, b, x), (d, e, y) = maps
        return {"a": a, "b": b, "c": x0 + x, "d": -d, "e": -e, "f": y0 - y}


def _subtract(values: np.ndarray[Any, Any], offset: int) -> np.ndarray[Any, Any]:
    """Subtract the offset in place from what is not 0."""
    if offset:
        is_zero = values == 0
        values -= values.dtype.type(offset)
        if is_zero.any():
            values[is_zero] = 0
    return values


def _resize(values: np.ndarray[Any, Any], out: Tensor, axes: int) -> None:
    """Resize float32 (..., *extent) into `out` (..., *size), both contiguous."""
    x = torch.from_numpy(values)
    size = list(out.shape[-axes:])
    x = x.view(1, -1, *x.shape[-axes:])  # (..., h, w) -> (1, all channels, h, w)
    out = out.view(1, -1, *size)
    if axes == 3:
        out.copy_(torch.nn.functional.interpolate(x, size, mode="trilinear"))
    else:
        resize_into(x, out)
