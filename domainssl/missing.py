"""Numbers that stand for missing values though nothing declares them, such as -9999 or -32768.

Where a unit is known, a number beyond what any instrument measures is no measurement (`beyond`).
Files of any writer may be in another unit than is thought: there only numbers that files are known
to use for missing values count, and only beyond those limits (`marks`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = ["MARKS", "beyond", "marks", "tell", "told", "unmarked_value"]

Array = np.ndarray[Any, Any]

# Lowest and highest number of each unit that can be a measurement, offsets of 1000 included
_MEASURABLE = {
    "dn": (-5000.0, 60_000.0),
    "reflectance": (-0.5, 6.0),
    "db": (-900.0, 900.0),
    "index": (-900.0, 900.0),
    "m": (-1000.0, 10_000.0),
}
MARKS = (
    -9999.0, -99999.0, -999.0, -32768.0, -32767.0, -9999999.0, -10_000.0, -1e20, 1e20,
    9999.0, 99999.0, 32767.0, 65535.0,
)  # fmt: skip
_MISSING = (-9999.0, -99999.0, -999.0, -32768.0, -32767.0, -9999999.0, -10_000.0, -1e20)
_HUGE = 1e30  # beyond it lie GDAL's and netCDF's default fill values of floats
_UNMARKED_SHARE = 1e-3
_log = logging.getLogger(__name__)
_SAID: set[tuple[str, float]] = set()
_EARS: list[dict[tuple[str, float], str]] = []


def beyond(values: Array, unit: str) -> Array | None:
    """Return True where a number of a known unit can be no measurement, or is not finite.

    Args:
        values: Values in that unit.
        unit: `dn`, `reflectance`, `db`, `index` or `m`; of others every finite number is one.

    Returns:
        Bool of the same shape; None where all are measurements.
    """
    if unit not in _MEASURABLE:
        found = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(1, bool)
        return found if found.any() else None
    low, high = _MEASURABLE[unit]
    bits: Any = {2: np.uint16, 4: np.uint32}.get(values.dtype.itemsize)
    if values.dtype.kind == "f" and low == -high and bits is not None:
        # by the bits of the absolute number: those of infinite ones and NaN are larger still
        sign = np.array(np.iinfo(bits).max >> 1, bits)
        found = (values.view(bits) & sign) > np.array(high, values.dtype).view(bits)
    elif values.dtype.kind == "f":
        found = ~((values >= low) & (values <= high))
    elif values.min(initial=0) < low or values.max(initial=0) > high:
        found = (values < low) | (values > high)
    else:
        return None
    return found if found.any() else None


def marks(stored: Array, factor: float, offset: float, unit: str) -> Array | None:
    """Return True where a stored number is one that files use for missing values.

    Args:
        stored: Numbers as stored.
        factor: With `offset`, what makes them values of the unit: factor · stored + offset.
        offset: See `factor`.
        unit: What batches carry; of a unit that is not known no number is taken for missing.

    Returns:
        Bool of the same shape; None where there is none.
    """
    if unit not in _MEASURABLE or not stored.size or stored.dtype.kind not in "iuf":
        return None
    ends = [(v - offset) / factor for v in _MEASURABLE[unit]]
    low, high = min(ends), max(ends)
    least, most = _extremes(stored)
    if not (least < low or most > high):
        return None
    outside = (stored < low) | (stored > high)
    numbers = np.unique(stored[outside])
    known = [n for n in numbers.tolist() if _is_mark(n, stored.dtype)]
    return outside & np.isin(stored, known) if known else None


def _extremes(stored: Array) -> tuple[float, float]:
    """Return the lowest and the highest number but NaN, which is looked for only if it is there."""
    low, high = float(stored.min()), float(stored.max())
    if low != low:
        flat = stored.reshape(-1)
        return float(np.fmin.reduce(flat)), float(np.fmax.reduce(flat))
    return low, high


def _is_mark(number: float, dtype: np.dtype[Any]) -> bool:
    if dtype.kind != "f":
        return number in MARKS
    with np.errstate(over="ignore"):
        return abs(number) > _HUGE or number in np.array(MARKS, dtype).tolist()


def tell(what: str, numbers: Array) -> None:
    """Say, once per number in a process, that pixels are not valid because they hold it.

    Args:
        what: The product or file.
        numbers: Numbers that were hidden, any shape; those that are not finite are not told.
    """
    for number in np.unique(numbers[np.isfinite(numbers)])[:4].tolist():
        text = (
            f"{what}: some pixels hold {number:g}, which nothing declares as missing and no "
            "instrument measures; they are taken as not valid"
        )
        for ear in _EARS:
            ear.setdefault((what, number), text)
        if (what, number) not in _SAID:
            _SAID.add((what, number))
            if not _EARS:
                _log.warning("%s", text)


@contextmanager
def told() -> Iterator[dict[tuple[str, float], str]]:
    """Collect what `tell` says in this block, also what was said before."""
    ear: dict[tuple[str, float], str] = {}
    _EARS.append(ear)
    try:
        yield ear
    finally:
        _EARS.remove(ear)


def unmarked_value(values: Array, known: Collection[float] = _MISSING) -> float | None:
    """Return a number that files use for missing values and that lies apart from all others.

    Args:
        values: Values that are taken for valid, any shape.
        known: Numbers that count; those of `MARKS` besides may also be saturated values.

    Returns:
        -9999, -32768 or their like, or a number beyond 1e30; in at least 0.1 % of the values, and
        at least twice as far from the others as they are from each other. None without one.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return None
    for number in (finite.min(), finite.max()):
        rest = finite[finite != number]
        is_known = number in known or abs(number) > _HUGE
        if not is_known or not rest.size or finite.size - rest.size < _UNMARKED_SHARE * finite.size:
            continue
        low, high = rest.min(), rest.max()
        if min(abs(number - low), abs(number - high)) > 2 * (high - low):
            return float(number)
    return None
