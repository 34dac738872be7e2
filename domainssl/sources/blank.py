"""Items that hold one value throughout, such as files of zeros: they teach nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["only_values", "say_only"]

Array = np.ndarray[Any, Any]
_SAMPLE = 64  # values that tell most items from blank ones, so that the rest is not looked at


def only_values(item: Array, valid: Array | None = None) -> list[float] | None:
    """Return the value that every channel of a blank item holds.

    Args:
        item: (C, ...).
        valid: (...), True where something was measured; None where it was everywhere.

    Returns:
        A value per channel, none where nothing is valid; None of an item with several values.
    """
    shape = item.shape[1:]
    if not shape:  # one number per channel
        return only_values(item[:, None], None if valid is None else np.reshape(valid, 1))
    size = int(np.prod(shape))
    places = np.unravel_index(np.arange(0, size, max(1, size // _SAMPLE)), shape)
    some = slice(None) if valid is None else valid[places]
    if any(len(np.unique(band[places][some])) > 1 for band in item):
        return None
    if not (size if valid is None else valid.any()):
        return []
    parts = [band if valid is None else band[valid] for band in item]
    ends = [(part.min(), part.max()) for part in parts]
    return None if any(low != high for low, high in ends) else [float(low) for low, _ in ends]


def say_only(values: Sequence[float]) -> str:
    """Return in words what `only_values` has found of a blank scan."""
    shown = sorted({f"{value:g}" for value in values})
    return f"all valid voxels are {', '.join(shown)}" if shown else "no voxel is valid"
