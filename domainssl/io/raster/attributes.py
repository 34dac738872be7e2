"""Numbers in the attributes of a stored array: fill values, scale, offset, limits."""

from __future__ import annotations

import base64
import binascii
import logging
import math
import re
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.io.raster.zarr import ArrayInfo

__all__ = [
    "check_scaling",
    "check_sign",
    "limits_of",
    "nodata_of",
    "number_of",
    "stac_scaling",
]

_log = logging.getLogger(__name__)
# as netCDF, GDAL, rasterio and their like spell it, without capitals and underscores
_NODATA_NAMES = ("fillvalue", "missingvalue", "nodata", "nodatavalue")


def nodata_of(attrs: Mapping[str, Any]) -> list[Any]:
    """Return what attributes of any spelling declare as missing: `_FillValue`, `NoDataValue` ..."""
    found: list[Any] = []
    for name, value in attrs.items():
        if name.replace("_", "").replace(" ", "").lower() in _NODATA_NAMES:
            found += value if isinstance(value, list | tuple) else [value]
    return found


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


def stac_scaling(info: ArrayInfo, band: Any) -> tuple[Any, Any, Any]:
    """Return scale, offset and nodata as STAC names them, which xarray passes on as they are.

    Floats were scaled by what wrote them (stackstac, odc-stac), so of them nodata alone counts.

    Args:
        info: The array; its attributes may hold `raster:scale` and `raster:offset`, or `scale`
            and `offset` (a scale of 1 or more is a pixel size).
        band: The entry of `raster:bands` of this band, if any.

    Returns:
        None for what is not stated.
    """
    stac = band if isinstance(band, Mapping) else {}
    nodata = stac.get("nodata", info.attrs.get("raster:nodata"))
    if info.dtype.kind not in "iu":
        return None, None, nodata
    scale = stac.get("scale", info.attrs.get("raster:scale"))
    offset = stac.get("offset", info.attrs.get("raster:offset"))
    plain = info.attrs.get("scale")
    if scale is None and offset is None and isinstance(plain, int | float) and 0 < plain < 1:
        scale, offset = plain, info.attrs.get("offset")
    if scale is not None or offset is not None:
        _say_stac(str(scale), str(offset))
    return scale, offset, nodata


@cache
def _say_stac(scale: str, offset: str) -> None:
    _log.warning(
        "scale %s and offset %s of STAC's attributes are applied to stored integers, as "
        "scale_factor and add_offset would be",
        scale, offset,
    )  # fmt: skip


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


def check_sign(info: ArrayInfo, where: str) -> None:
    """Refuse integers whose attribute `_Unsigned` (netCDF) says another sign than their type.

    Raises:
        DataError: It does.
    """
    stated = {"true": "u", "false": "i"}.get(str(info.attrs.get("_Unsigned", "")).lower())
    if stated and info.dtype.kind in "iu" and info.dtype.kind != stated:
        raise DataError(
            f"{where}: {info.dtype} numbers, of which _Unsigned is {info.attrs['_Unsigned']!r}. "
            "Write them in the type that is meant, such as with xarray's astype('uint16')."
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
