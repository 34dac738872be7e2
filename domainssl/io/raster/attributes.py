"""Numbers in the attributes of a stored array: fill values, scale, offset, limits."""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.io.raster.zarr import ArrayInfo

__all__ = ["check_scaling", "limits_of", "number_of"]


def number_of(value: Any, info: ArrayInfo, where: str) -> float:
    """Read a fill value, also as xarray writes it into format 3: base64 of a little-endian one."""
    if isinstance(value, list) and value:
        if any(other != value[0] for other in value):
            raise DataError(
                f"{where}: {value!r:.100} are several numbers where scale, offset and fill "
                "value are one each. Apply them to the values first, or write a file per date."
            )
        value = value[0]
    if isinstance(value, int | float | np.generic):
        return float(value)
    value = str(value)
    try:
        return float(value)
    except ValueError:
        pass
    try:
        raw = base64.standard_b64decode(value)
        if info.dtype.kind == "f":
            return float(struct.unpack("<d", raw)[0])
        return float(np.frombuffer(raw, info.dtype.newbyteorder("<"))[0])
    except (binascii.Error, struct.error, ValueError, IndexError) as error:
        raise DataError(
            f"{where}: {value!r} is no number, as fill value, scale and offset must be"
        ) from error


def check_scaling(where: str, scale: float, offset: float) -> None:
    """Refuse a scale that makes all values equal, and one that makes none.

    Args:
        where: How the error calls the array.
        scale: Factor from stored to decoded values.
        offset: Added after scaling.

    Raises:
        DataError: The scale is 0, or one of the two is not finite.
    """
    if not scale or not math.isfinite(scale) or not math.isfinite(offset):
        raise DataError(
            f"{where}: scale {scale:g} and offset {offset:g} give no values; expected finite "
            "numbers, and a scale other than 0. Correct or remove scale_factor and add_offset."
        )


def limits_of(info: ArrayInfo, where: str) -> tuple[float, float] | None:
    """Return the lowest and highest valid stored value that the attributes state, if any.

    Raises:
        DataError: They are no numbers, or nothing lies between them.
    """
    attrs = info.attrs
    stated = attrs.get("valid_range")
    if isinstance(stated, str):
        stated = [part for part in re.split(r"[,;\s]+", stated.strip("[]() ")) if part]
    if stated is None:
        stated = [attrs.get("valid_min"), attrs.get("valid_max")]
    if not isinstance(stated, Sequence) or len(stated) != 2:
        raise DataError(f"{where}: valid_range is {stated!r:.100}, expected two numbers.")
    if stated[0] is None and stated[1] is None:
        return None
    low, high = (
        default if value is None else number_of(value, info, where)
        for value, default in zip(stated, (-math.inf, math.inf), strict=True)
    )
    if not low < high:
        raise DataError(
            f"{where}: no value is valid between {low:g} and {high:g}, which valid_range or "
            "valid_min and valid_max state. Correct or remove them."
        )
    return low, high
