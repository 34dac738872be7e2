"""Small tile folders whose pixels say where they are: red the column, green the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["place_picture", "write_tiles"]


def place_picture(side: int = 16, blue: int = 0) -> np.ndarray[Any, Any]:
    """Return (side, side, 3) uint8 with red = column, green = row."""
    rows, columns = np.mgrid[:side, :side]
    return np.stack([columns, rows, np.full_like(rows, blue)], -1).astype(np.uint8)


def write_tiles(root: Path, names: list[str], side: int = 16) -> None:
    """Write pictures below a folder; their blue is their position in the list."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(place_picture(side, number)).save(path)
