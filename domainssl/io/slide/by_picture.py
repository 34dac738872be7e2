"""Pictures in PNG or JPEG as slides of one level, read whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from domainssl.io.slide.facts import Region, Stored
from domainssl.io.slide.picture import picture_facts, read_tile_picture

__all__ = ["PicturePyramid"]

Array = np.ndarray[Any, Any]


class PicturePyramid:
    """A picture.

    Args:
        path: The file.

    Raises:
        DataError: It cannot be opened, or is too large to be read whole.
    """

    def __init__(self, path: str) -> None:
        facts = picture_facts(path)
        self._path = path
        self._pixels: tuple[Array, Array] | None = None
        self.stored = Stored(
            path=path,
            backend="picture",
            format=facts.format,
            levels=(facts.size,),
            stated=() if facts.mpp is None else (("resolution of the picture", *facts.mpp),),
            tile_size=facts.size,
            dtype=facts.dtype,
            has_color_profile=facts.has_color_profile,
        )

    def close(self) -> None:
        """Forget the pixels."""
        self._pixels = None

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        """Read a box that lies inside the picture.

        Raises:
            DataError: The picture is damaged.
        """
        if self._pixels is None:
            self._pixels = read_tile_picture(self._path)
        values, valid = self._pixels
        box = np.s_[y : y + height, x : x + width]
        seen = valid[box]
        return Region(
            values=values[box],
            valid=None if seen.all() else seen,
            origin=(float(x), float(y)),
        )
