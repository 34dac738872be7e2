"""Windows of co-registered images: drawn once per location, applied to every product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainssl.errors import ConfigError

__all__ = ["Crop", "Window"]


@dataclass(frozen=True)
class Crop:
    """Which window of a scene is read, and how large it comes out.

    With `min_px == max_px == size` nothing is resized and the stored dtype is kept.

    Attributes:
        min_px: Smallest side of a training window, in pixels of the scene.
        max_px: Largest side; clipped to the scene.
        size: Side of what is delivered.
        flips: Mirror at random along both axes.
        quarter_turns: Turn at random by 0, 90, 180 or 270 degrees.
    """

    min_px: int = 60
    max_px: int = 180
    size: int = 120
    flips: bool = True
    quarter_turns: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_px <= self.max_px or self.size < 1:
            raise ConfigError(
                f"data.init_args.crop: got min_px={self.min_px}, max_px={self.max_px}, "
                f"size={self.size}; expected 1 <= min_px <= max_px and size >= 1."
            )

    def check(self, height: int, width: int, where: str) -> None:
        """Refuse scenes that are smaller than the smallest window.

        Raises:
            ConfigError: Names both sizes.
        """
        if self.min_px > min(height, width):
            raise ConfigError(
                f"{where}: scenes have {height} x {width} px, but data.init_args.crop.min_px is "
                f"{self.min_px}. Lower min_px to at most {min(height, width)}; windows are "
                "resized to crop.size."
            )

    @property
    def is_fixed(self) -> bool:
        """True when windows are cut out and never resized."""
        return self.min_px == self.max_px == self.size

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Window:
        """Draw a training window: side, place, flips and turns."""
        side = int(rng.integers(self.min_px, min(self.max_px, height, width) + 1))
        top = int(rng.integers(0, height - side + 1))
        left = int(rng.integers(0, width - side + 1))
        flips = rng.integers(0, 2, 2)  # drawn even if unused: one option moves no other choice
        turns = int(rng.integers(0, 4))
        return Window(
            top,
            left,
            side,
            self.size,
            bool(flips[0]) and self.flips,
            bool(flips[1]) and self.flips,
            turns if self.quarter_turns else 0,
        )

    def centre(self, height: int, width: int) -> Window:
        """Return the window of evaluation: `size` pixels in the middle, neither turned nor
        flipped; the largest square where the scene is smaller.
        """
        side = min(self.size, height, width)
        return Window((height - side) // 2, (width - side) // 2, side, self.size)


@dataclass(frozen=True)
class Window:
    """A square of a scene and the way it is laid down; flips come before turns.

    Attributes:
        top: First row.
        left: First column.
        side: Rows and columns taken.
        size: Rows and columns delivered.
        is_flipped_y: Rows are reversed.
        is_flipped_x: Columns are reversed.
        turns: Quarter turns counter-clockwise.
    """

    top: int
    left: int
    side: int
    size: int
    is_flipped_y: bool = False
    is_flipped_x: bool = False
    turns: int = 0

    @property
    def rows(self) -> slice:
        """The rows of the scene that are taken."""
        return slice(self.top, self.top + self.side)

    @property
    def columns(self) -> slice:
        """The columns of the scene that are taken."""
        return slice(self.left, self.left + self.side)

    def of_part(self) -> Window:
        """Return the same window for arrays that hold its rows and columns only."""
        return replace(self, top=0, left=0)

    def view(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the window of `array` (..., H, W) as a view (..., side, side)."""
        out = array[..., self.rows, self.columns]
        if self.is_flipped_y:
            out = out[..., ::-1, :]
        if self.is_flipped_x:
            out = out[..., ::-1]
        # np.rot90, without its cost per call
        if self.turns == 1:
            return out.swapaxes(-1, -2)[..., ::-1, :]
        if self.turns == 2:
            return out[..., ::-1, ::-1]
        return out.swapaxes(-1, -2)[..., ::-1] if self.turns == 3 else out

    def write(
        self,
        array: np.ndarray[Any, Any],
        out: Tensor,
        offset: int = 0,
        scratch: np.ndarray[Any, Any] | None = None,
    ) -> None:
        """Write the window of `array` (..., H, W) into `out` (..., size, size).

        A resized window is antialiased and bilinear.

        Args:
            array: Stored values.
            out: Written in place, contiguous.
            offset: Subtracted from all values but 0, which stands for no data.
            scratch: Memory to convert in, float32 (large enough for the window,); fresh pages
                for every window would cost more than all the arithmetic.
        """
        view = self.view(array)
        if self.side != self.size:
            if scratch is None:
                scratch = np.empty(view.size, np.float32)
            stored = np.ascontiguousarray(view)  # straightened before it gets larger
            values = scratch[: view.size].reshape(view.shape)
            np.copyto(values, stored)
            if offset:
                values -= np.float32(offset)
                values[stored == 0] = 0
            _resize(values, out)
            return
        target = out.numpy()
        np.copyto(target, view, casting="same_kind")
        _subtract(target, offset)

    def write_valid(self, valid: np.ndarray[Any, Any], out: Tensor) -> None:
        """Write the mask (..., H, W), True = valid, into `out` (..., size, size).

        A pixel is valid only if every pixel that it was interpolated from is.
        """
        view = self.view(valid)
        if self.side == self.size:
            np.copyto(out.numpy(), view)
        elif view.all():
            out.fill_(True)
        else:
            share = torch.empty(out.shape)
            _resize((~view).astype(np.float32, order="C"), share)
            torch.le(share, 1e-6, out=out)

    def geo(self, x0: float, y0: float, step: float) -> dict[str, float]:
        """Return where the window lies: its affine map from (column, row) to CRS coordinates.

        Args:
            x0: CRS coordinate of the outer edge of the scene's first column.
            y0: The same of its first row; rows go south.
            step: Size of a scene pixel in CRS units.

        Returns:
            `a b c d e f` with x = a·column + b·row + c, y = d·column + e·row + f, where column
            and row count from the outer corner of the delivered window.
        """
        back = _undo(self.is_flipped_y, self.is_flipped_x, self.turns)
        scale = step * self.side / self.size
        a, b, c = back[0]
        d, e, f = back[1]
        return {
            "a": scale * a,
            "b": scale * b,
            "c": x0 + step * self.left + scale * c * self.size,
            "d": -scale * d,
            "e": -scale * e,
            "f": y0 - step * self.top - scale * f * self.size,
        }


@cache
def _undo(flip_y: bool, flip_x: bool, turns: int) -> list[list[float]]:
    """Return the map from (column, row) after flips and turns to before, on the unit square."""
    back = np.eye(3)
    for _ in range(turns):
        back = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) @ back
    if flip_x:
        back = np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) @ back
    if flip_y:
        back = np.array([[1.0, 0.0, 0.0], [0.0, -1.0, 1.0], [0.0, 0.0, 1.0]]) @ back
    return back.tolist()


def _subtract(values: np.ndarray[Any, Any], offset: int) -> np.ndarray[Any, Any]:
    """Subtract the offset in place from what is not 0."""
    if offset:
        is_zero = values == 0
        values -= values.dtype.type(offset)
        if is_zero.any():
            values[is_zero] = 0
    return values


def _resize(values: np.ndarray[Any, Any], out: Tensor) -> None:
    """Resize float32 (..., h, w) into `out` (..., size, size), both contiguous."""
    x = torch.from_numpy(values)
    size = list(out.shape[-2:])
    # What F.interpolate(mode="bilinear", antialias=True) calls, but into memory that is there:
    # (..., h, w) -> (1, all channels, h, w)
    torch.ops.aten._upsample_bilinear2d_aa.out(
        x.view(1, -1, *x.shape[-2:]), size, False, None, None, out=out.view(1, -1, *size)
    )
