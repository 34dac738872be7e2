"""Image time series as files hold them: units, missing pixels, days seen twice, choice of dates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from domainssl.missing import beyond, tell

__all__ = ["Image", "Series", "Tile", "even_dates", "join_days", "measured", "typical_dates"]

Array = np.ndarray[Any, Any]
Unit = Literal["dn", "db", "linear"]


@dataclass(frozen=True)
class Image:
    """One acquisition of a tile.

    Attributes:
        values: Stored values, (C, H, W).
        day: Days since 1970-01-01, 0 where unknown.
        corner: CRS coordinates of the outer corner of the first pixel, (x, y).
        crs: EPSG code, or WKT where there is none.
    """

    values: Array
    day: int = 0
    corner: tuple[float, float] | None = None
    crs: int | str = ""


@dataclass(frozen=True)
class Series:
    """All acquisitions of a tile by one sensor, as stored.

    Attributes:
        values: Stored values, possibly mapped from a file, (T, C, H, W).
        days: Days since 1970-01-01, (T,).
        unit: `dn` Sentinel-2 digital numbers, `db`, or `linear` backscatter.
        cloud: Probability of cloud or snow in percent, (T, H, W).
    """

    values: Array
    days: Array
    unit: Unit
    cloud: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What the files hold of one place.

    Attributes:
        id: Name of the place.
        images: Single acquisitions by modality.
        series: Time series by modality; a sensor that never saw the place is missing.
        classes: Class per pixel of the series, (H, W).
        bytes_decoded: Bytes that were read; those of mapped arrays are counted when cut out.
    """

    id: str
    images: dict[str, Image]
    series: dict[str, Series]
    classes: Array | None = None
    bytes_decoded: int = 0


def measured(values: Array, unit: Unit) -> tuple[Array, Array]:
    """Return finite values in the unit of a batch, and where something was measured.

    Linear backscatter becomes dB; its zeros and NaN, dB that are zero in every channel, and
    digital numbers that are zero in every band stand for no data, and so do numbers that no
    instrument measures, such as -9999.

    Args:
        values: Stored values, (T, C, H, W).
        unit: Their unit.

    Returns:
        float32 (T, C, H, W), 0 where nothing was measured, and bool (T, H, W), True = valid.
    """
    x: Array = values.astype(np.float32)
    valid: Array
    if unit == "linear":
        good = np.isfinite(x) & (x > 0)
        x = 10 * np.log10(x, out=np.zeros_like(x), where=good)
        valid = np.asarray(good.all(1))
    else:
        valid = np.asarray(np.isfinite(x).all(1) & (x != 0).any(1))
    hidden = beyond(x, "dn" if unit == "dn" else "db")
    if hidden is not None:
        tell(f"series of {unit}", x[hidden])
        valid &= ~hidden.any(1)
        x[hidden] = 0
    x *= valid[:, None]
    return x, valid


def join_days(
    values: Array, valid: Array, days: Array, cloudy: Array
) -> tuple[Array, Array, Array, Array]:
    """Sort by day and lay the acquisitions of one day over each other.

    Neighbouring slices of one pass hold the same pixels, or each a part of them; the first
    valid value of a pixel is taken.

    Args:
        values: (T, C, H, W).
        valid: True = measured, (T, H, W).
        days: (T,), in any order.
        cloudy: True = cloud or snow, (T, H, W).

    Returns:
        The same with one entry per day, days ascending.
    """
    order = np.argsort(days, kind="stable")
    unique, starts, counts = np.unique(days[order], return_index=True, return_counts=True)
    first = order[starts]
    out, is_valid, is_cloudy = values[first], valid[first], cloudy[first]  # copies
    for t in np.flatnonzero(counts > 1):
        for other in order[starts[t] + 1 : starts[t] + counts[t]]:
            new = valid[other] & ~is_valid[t]
            out[t][:, new] = values[other][:, new]
            is_cloudy[t][new] = cloudy[other][new]
            is_valid[t] |= new
    return out, is_valid, unique, is_cloudy


def even_dates(available: int, most: int) -> Array:
    """Return at most `most` positions, evenly spread, first and last included, int64."""
    if most == 1:
        return np.array([available // 2])
    return np.linspace(0, available - 1, min(most, available)).round().astype(np.int64)


def typical_dates(values: Array, masked: Array, count: int, offset: int) -> Array:
    """Return the most typical clear acquisition of each of `count` equally long runs.

    Args:
        values: (T, C, H, W), T >= count.
        masked: True = not to be looked at, (T, H, W).
        count: Number of runs N; each holds T // N acquisitions.
        offset: Acquisitions left out at the beginning, 0 .. T mod N.

    Returns:
        One position per run, (N,) int64.

    Source: MAESTRO (temporal binning): the frame whose mean distance to the median over the run
    is smallest; frames with masked pixels take no part unless all frames of the run have some.
    """
    if len(values) == count:
        return np.arange(count)
    length = len(values) // count
    x = values[offset : offset + count * length].astype(np.float64)
    x = x.reshape(count, length, *values.shape[1:])  # (N*K, C, H, W) -> (N, K, C, H, W)
    hidden = masked[offset : offset + count * length].reshape(count, length, *masked.shape[1:])
    touched: Array = np.any(hidden, (2, 3))  # (N, K)
    has_clear: Array = ~np.all(touched, 1)
    hidden = hidden & has_clear[:, None, None, None]
    x = np.where(hidden[:, :, None], np.nan, x)
    # Every run has a whole frame, so no pixel is NaN in all of them.
    score = np.abs(x - np.nanmedian(x, 1, keepdims=True)).mean((2, 3, 4))
    return np.asarray(np.nanargmin(score, 1) + offset + length * np.arange(count))
