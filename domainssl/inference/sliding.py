"""Sliding windows whose results go to files: complete slabs along the first axis, in order.

    windows = Windows(shape, size=(96, 96, 96), overlap=0.5)
    sink = Slabs(windows.shape, write)            # write(row, values): a memory map, Zarr, a file
    slide_over(read, predict, windows, sink, finish=class_map)

The windows themselves are in `nn/sliding.py`: training needs them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from domainssl.nn.sliding import Blend, Blending, Box, Windows, class_map, slide_over

__all__ = ["Blend", "Blending", "Box", "Slabs", "Windows", "class_map", "slide_over"]

Array = np.ndarray[Any, Any]


class Slabs:
    """A sink that gathers complete cells to slabs along the first axis.

    Args:
        shape: Cells of the grid along each axis.
        write: Takes the first row of a slab and its values, ([C,] rows, *other axes); called in
            the order of rows. The array is the receiver's to keep.
    """

    def __init__(self, shape: Sequence[int], write: Callable[[int, Array], None]) -> None:
        self._others, self._write = tuple(shape[1:]), write
        self._open: dict[int, Array] = {}
        self._left: dict[int, int] = {}

    def __call__(self, box: Box, values: Tensor) -> None:
        """Take the values of a box, ([C,] *cell)."""
        cells = values.cpu().numpy()
        row, axes = box[0].start, len(box)
        if row not in self._open:
            lead = cells.shape[: cells.ndim - axes]
            shape = (*lead, box[0].stop - row, *self._others)
            self._open[row] = np.empty(shape, cells.dtype)
            self._left[row] = math.prod(self._others)
        place: tuple[Any, ...] = (..., slice(None), *box[1:])
        self._open[row][place] = cells
        self._left[row] -= math.prod(s.stop - s.start for s in box[1:])
        if not self._left[row]:
            del self._left[row]
            self._write(row, self._open.pop(row))
