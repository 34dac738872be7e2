"""Items that hold one value throughout, such as files of zeros: they teach nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["blank_items"]

Array = np.ndarray[Any, Any]
_SAMPLE = 64  # values that tell most items from blank ones


def blank_items(values: Array, valid: Array, names: Sequence[str]) -> list[str]:
    """Return the names of blank items with what they hold.

    Args:
        values: (C, n, ...).
        valid: (n, ...).
        names: One per entry of the second axis, or one for all; empty where it is not asked for.
    """
    if len(names) == len(valid):
        parts = [(name, values[:, n], valid[n]) for n, name in enumerate(names)]
    else:
        parts = [(names[0], values, valid)] if names else []
    found = []
    for name, item, mask in parts:
        if name and (text := _held(item, mask)):
            found.append(f"{name}: {text}")
    return found


def _held(item: Array, mask: Array) -> str:
    """Return the values of a blank item in words, an empty text for any other."""
    step = max(1, mask.size // _SAMPLE)
    some = mask.reshape(-1)[::step]
    if any(len(np.unique(band.reshape(-1)[::step][some])) > 1 for band in item):
        return ""
    if not mask.any():
        return "nothing valid"
    ends = [(band[mask].min(), band[mask].max()) for band in item]
    if any(low != high for low, high in ends):
        return ""
    shown = sorted({f"{float(low):g}" for low, _ in ends})
    return f"all {', '.join(shown[:4])}"
