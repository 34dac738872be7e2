"""Where to look into a raster that is too large to be looked at as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

__all__ = ["stages"]

_SIDE = 64  # pixels along the sides of a part that is looked at
_PARTS = 4  # parts along each axis
_ALL = 1024  # the same, where none of those shows a measured pixel


def stages(shape: Sequence[int], largest: int = _ALL) -> Iterator[Iterator[tuple[int, int, int]]]:
    """Yield row, column and side of parts: a few evenly spread, then all of the raster.

    Args:
        shape: Rows and columns of the raster; parts may reach beyond them.
        largest: Side of the parts that cover all of it.
    """
    rows, columns = (_starts(size) for size in shape)
    yield ((row, column, _SIDE) for row, column in product(rows, columns))
    rows, columns = (list(range(0, size, largest)) for size in shape)
    yield ((row, column, largest) for row, column in product(rows, columns))


def _starts(size: int) -> list[int]:
    """Return where parts begin, evenly spread; side by side where they cover all."""
    count = min(_PARTS, -(-size // _SIDE))
    if count * _SIDE >= size:
        return [i * _SIDE for i in range(count)]
    return [round(i * (size - _SIDE) / (count - 1)) for i in range(count)]
