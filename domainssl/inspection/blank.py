"""Names of the items that hold one value throughout, for `stats`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from domainssl.sources.blank import only_values

__all__ = ["blank_items"]

Array = np.ndarray[Any, Any]


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
    values = only_values(item, mask)
    if values is None:
        return ""
    shown = sorted({f"{value:g}" for value in values})
    return f"all {', '.join(shown[:4])}" if shown else "nothing valid"
