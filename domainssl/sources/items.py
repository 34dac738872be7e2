"""What a modality of a batch consists of: its values and their companions, for every source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainssl.modality import Batch, key

__all__ = ["companions"]

Array = np.ndarray[Any, Any]


def companions(
    name: str,
    values: Array | Tensor,
    valid: Array | Tensor,
    *,
    count: int | None = None,
    frames: int | None = None,
    present: bool | Array = True,
    dates: Any = None,
    frame_mask: Array | None = None,
    **others: Any,
) -> Batch:
    """Return a modality with all that hangs on it, of one item or of many.

    Args:
        name: Name of the modality.
        values: (C, *S), (T, C, *S) of a series; after the axis of items where there are many.
        valid: bool, the shape of `values` without C; True = valid.
        count: Number of items; None for one without an axis of items.
        frames: Number of dates T; None where the modality is no series.
        present: True where the item has the modality: one answer for all, or bool (count,).
        dates: Days since 1970-01-01: one number, or what fits (count, T); None for none.
        frame_mask: bool (T,) or (count, T), False on padded dates; all True where left out.
        others: Any of `geo`, `affine`, `window`, `source`, `coords`; None is left out. `geo` and
            `affine` are lists where there are many items.

    Returns:
        `name` and its companions. Companions of many items are arrays and lists that may be
        written to; those of one item are tensors and plain values, as `collate` joins them.
    """
    lead = () if count is None else (count,)
    time = () if frames is None else (frames,)
    data: Batch = {name: values, key(name, "valid"): valid}
    data[key(name, "present")] = _filled(present, lead, np.bool_)
    if dates is not None:
        data[key(name, "dates")] = _filled(dates, (*lead, *time), np.int32)
    if time:
        known = True if frame_mask is None else frame_mask
        data[key(name, "frames")] = _filled(known, (*lead, *time), np.bool_)
    data |= {key(name, kind): value for kind, value in others.items() if value is not None}
    if lead:
        return data
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in data.items()}


def _filled(value: Any, shape: Sequence[int], kind: type[np.generic]) -> Array:
    """Return an array of its own, (shape), that holds `value` everywhere."""
    out: Array = np.empty(tuple(shape), kind)
    out[...] = value
    return out
