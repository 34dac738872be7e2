"""Acquisition dates: CF time variables, dates in Sentinel product names, days since 1970."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from domainssl.errors import DataError

__all__ = ["UNKNOWN", "cf_days", "days", "product_time"]

UNKNOWN = np.datetime64("NaT", "s")
_SECONDS = {
    "nanosecond": 1e-9, "microsecond": 1e-6, "millisecond": 1e-3, "second": 1.0, "minute": 60.0,
    "hour": 3600.0, "day": 86400.0, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0,
}  # fmt: skip
_STAMP = re.compile(r"(?<!\d)(\d{4})(\d{2})(\d{2})T(\d{2})(\d{2})(\d{2})(?!\d)")


def cf_days(values: np.ndarray[Any, Any], attrs: Mapping[str, Any], where: str) -> Any:
    """Convert a CF time variable to seconds-precise datetimes.

    Args:
        values: Stored numbers, any shape.
        attrs: The variable's attributes; `units` such as `days since 2019-12-15`. Without
            units, nanoseconds since 1970 are assumed.
        where: How errors call the variable.

    Returns:
        datetime64[s], same shape; NaT where the stored value is not after 1970-01-01.
    """
    units = str(attrs.get("units", "nanoseconds since 1970-01-01"))
    found = re.fullmatch(r"\s*(\w+?)s?\s+since\s+(\S+?)(?:[ T](\S+))?\s*", units)
    scale = _SECONDS.get(found.group(1).lower()) if found else None
    if found is None or scale is None:
        raise DataError(
            f"{where}: time units {units!r} are not understood, expected e.g. "
            "'nanoseconds since 1970-01-01'"
        )
    clock = re.match(r"\d{2}:\d{2}:\d{2}", found.group(3) or "")
    start = np.datetime64(f"{found.group(2)}T{clock.group() if clock else '00:00:00'}", "s")
    if scale == 1e-9:  # whole division: float64 cannot hold nanoseconds of 2020
        steps = (values // 1_000_000_000).astype("timedelta64[s]")
    else:
        steps = np.floor(values * scale).astype("int64").astype("timedelta64[s]")
    times = start + steps
    return np.where(times > np.datetime64("1970-01-01", "s"), times, UNKNOWN)


def product_time(names: Sequence[str]) -> Any:
    """Return the first acquisition time in each Sentinel product name, datetime64[s] or NaT.

    Works on Sentinel-2 names (`20201116T023001_…`) and on full Sentinel-1 product names.
    """
    out = []
    for name in names:
        found = _STAMP.search(str(name))
        try:
            out.append(
                np.datetime64("{}-{}-{}T{}:{}:{}".format(*found.groups()), "s")
                if found
                else UNKNOWN
            )
        except ValueError:
            out.append(UNKNOWN)
    return np.array(out, dtype="datetime64[s]")


def days(times: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return days since 1970-01-01 as int32; unknown dates (NaT) become 0."""
    known = ~np.isnat(times)
    whole = np.where(known, times, np.datetime64(0, "s")).astype("datetime64[D]").astype(np.int64)
    return np.where(known, whole, 0).astype(np.int32)
