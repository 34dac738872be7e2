"""Acquisition dates: time variables, dates in Sentinel product names, days since 1970."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from domainssl.errors import DataError, require
from domainssl.io.raster.zarr import ArrayInfo, Cube

__all__ = [
    "TIME_NAMES",
    "UNKNOWN",
    "baselines_of",
    "day_in_name",
    "days",
    "decode_times",
    "parse_date",
    "product_time",
    "stored_baselines",
    "times_of",
]

TIME_NAMES = ("time", "t", "date", "datetime")
UNKNOWN = np.datetime64("NaT", "s")
_SECONDS = {"days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}
_SINCE = re.compile(
    r"(days|hours|minutes|seconds) since ((?:19|20)\d{2}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2}:\d{2}))?"
)
_CALENDARS = ("standard", "gregorian", "proleptic_gregorian")
_OTHERS = ("noleap", "365_day", "360_day", "all_leap", "366_day", "julian")
_YEARS = ("1900", "2200")
_NANOSECONDS = "nanoseconds since 1970-01-01"
_BASELINE = re.compile(r"S2[A-D]_MSIL(?:1C|2A)_\d{8}T\d{6}_N(\d\d)(\d\d)_")
_VERSION = re.compile(r"(\d{1,2})\.(\d{1,2})")
_BASELINE_NAMES = ("s2:processing_baseline", "processing_baseline", "processing:version")
_DAY = re.compile(r"(?<![^\W_])((?:19|20)\d{2})(-?)(\d{2})\2(\d{2})(?![^\W_]|-\d)")
_STAMP = re.compile(r"(?<!\d)(\d{4})(\d{2})(\d{2})T(\d{2})(\d{2})(\d{2})(?!\d)")


def decode_times(values: np.ndarray[Any, Any], attrs: Mapping[str, Any], where: str) -> Any:
    """Decode a time variable as CF and xarray do, or as text, to seconds-precise datetimes.

    Args:
        values: Stored numbers, datetimes or texts (ISO 8601), any shape.
        attrs: The variable's attributes: `units` such as `days since 2019-12-15`, `calendar`,
            `_FillValue`, `missing_value`. Without units, nanoseconds since 1970 are assumed.
        where: How errors call the variable.

    Returns:
        datetime64[s], same shape; NaT where the time is missing or not after 1970-01-01.

    Raises:
        DataError: The units, the calendar or a text are not understood.
    """
    if values.dtype.kind in "USTO":
        times = _text_times(values, where)
    elif values.dtype.kind == "M":
        times = values
    else:
        times = _cf_times(values, attrs, where)
    times = times.astype("datetime64[s]")
    return np.where(times > np.datetime64("1970-01-01", "s"), times, UNKNOWN)


def _plain_times(values: np.ndarray[Any, Any], stated: Mapping[str, Any]) -> Any:
    """Decode whole numbers since a date of the last century or this one, as xarray would.

    The import of xarray takes a second of processor time in every process. None where anything
    else is stated, or a date lies outside of 1900 to 2200.
    """
    found = _SINCE.fullmatch(str(stated["units"]).strip())
    if found is None or values.dtype.kind not in "iu" or set(stated) != {"units"}:
        return None
    seconds = _SECONDS[found[1]]
    try:
        first = np.datetime64(f"{found[2]}T{found[3] or '00:00:00'}", "s")
    except ValueError:
        return None
    low, high = ((np.datetime64(year, "s") - first).astype(np.int64) for year in _YEARS)
    if values.size and (int(values.min()) * seconds < low or int(values.max()) * seconds > high):
        return None
    return first + values.astype(np.int64) * np.timedelta64(seconds, "s")


def _cf_times(values: np.ndarray[Any, Any], attrs: Mapping[str, Any], where: str) -> Any:
    names = ("units", "calendar", "_FillValue", "missing_value", "scale_factor", "add_offset")
    stated = {"units": _NANOSECONDS, **{n: attrs[n] for n in names if attrs.get(n) is not None}}
    if isinstance(stated.get("calendar"), str):  # CF: in any letter case
        stated["calendar"] = stated["calendar"].lower()
    if stated.get("calendar") in _CALENDARS:  # they differ before 1582 only
        del stated["calendar"]
    if stated == {"units": _NANOSECONDS} and values.dtype.kind in "iu":
        return values.astype("datetime64[ns]")  # most files; spares the import of xarray
    plain = _plain_times(values, stated)
    if plain is not None:
        return plain
    if stated.get("calendar") in _OTHERS:
        return _dates_of_calendar(values, stated, where)
    xarray = require("xarray", "geo")
    variable = xarray.Variable([f"axis{i}" for i in range(values.ndim)], values, stated)
    found = f"{where}: time units {stated['units']!r}"
    if "calendar" in stated:
        found += f" with calendar {stated['calendar']!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fill values and calendars; decoded all the same
            decoded = xarray.conventions.decode_cf_variable("time", variable).values
    except (ValueError, TypeError, OverflowError, AttributeError, ImportError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(
            f"{found} are not understood ({reason}). Expected e.g. 'days since 1970-01-01', in "
            f"the standard calendar or one of {', '.join(_OTHERS)}."
        ) from error
    if decoded.dtype.kind != "M":
        raise DataError(f"{found} are not understood, expected e.g. 'days since 1970-01-01'")
    return decoded


def _dates_of_calendar(values: np.ndarray[Any, Any], stated: Mapping[str, Any], where: str) -> Any:
    """Decode times of a model calendar, datetime64[s].

    A date of `noleap`, `all_leap` and `360_day` is the day of the same name; one of `julian` the
    day on which it was, as that calendar counts real days.

    Raises:
        DataError: The units are not understood, or a date does not exist, such as 30 February.
    """
    cftime = require("cftime", "geo")
    units, calendar = str(stated["units"]), str(stated["calendar"])
    known = np.ones(values.shape, bool)
    for name in ("_FillValue", "missing_value"):
        if name in stated:
            known &= ~np.isin(values, stated[name])
    numbers = values.astype(np.float64)
    known &= np.isfinite(numbers)
    numbers = numbers * stated.get("scale_factor", 1) + stated.get("add_offset", 0)
    times = np.full(values.shape, UNKNOWN)
    try:
        dates = cftime.num2date(numbers[known], units, calendar, only_use_cftime_datetimes=True)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{where}: time units {units!r} with calendar {calendar!r} are not understood "
            f"({error}). Expected e.g. 'days since 2020-01-01'."
        ) from error
    try:
        if calendar == "julian":
            dates = [date.change_calendar("proleptic_gregorian") for date in dates]
        times[known] = [np.datetime64(date.isoformat()[:19], "s") for date in dates]
    except ValueError as error:
        raise DataError(
            f"{where}: the calendar {calendar!r} has dates that do not exist ({error}); "
            "samples cannot be dated by them. Write the times in the standard calendar, such as "
            "with xarray's convert_calendar('standard', align_on='year')."
        ) from error
    return times


def _text_times(values: np.ndarray[Any, Any], where: str) -> Any:
    pandas = require("pandas", "geo")
    texts = [v.decode() if isinstance(v, bytes) else str(v) for v in values.reshape(-1)]
    try:
        found = pandas.to_datetime(texts, format="ISO8601", utc=True).tz_localize(None)
    except ValueError as error:
        raise DataError(
            f"{where}: times {texts[:3]} are not understood, expected e.g. '2020-02-29', "
            "'20200229' or '2020-02-29T10:11:12Z'"
        ) from error
    return found.values.reshape(values.shape)


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


def day_in_name(name: str) -> Any:
    """Return the only day that a name holds, such as `x_20200501.tif`, datetime64[s]; else NaT.

    A day stands by itself, as `20200501` or `2020-05-01`; of two different ones neither counts.
    """
    found = {f"{year}-{month}-{day}" for year, _, month, day in _DAY.findall(name)}
    return parse_date(found.pop()) if len(found) == 1 else UNKNOWN


def baselines_of(names: Sequence[str]) -> tuple[float | None, ...]:
    """Return the processing baseline in each Sentinel-2 product name or text such as `04.00`."""
    found = [_BASELINE.search(name) or _VERSION.fullmatch(name.strip()) for name in names]
    return tuple(float(f"{f[1]}.{f[2]}") if f else None for f in found)


def stored_baselines(cube: Cube, array: str, dim: str | None, count: int) -> Any:
    """Return the processing baseline of each date of an array, from coordinates or its name."""
    folder = array.rpartition("/")[0]
    for prefix in dict.fromkeys((f"{folder}/" if folder else "", "")):
        for name in _BASELINE_NAMES:
            info = cube.arrays.get(prefix + name)
            if (
                info is None
                or info.shape not in ((), (1,), (count,))
                or info.dims not in ((), (dim,))
            ):
                continue
            is_text = info.dtype.kind in "USTO"
            raw = cube.read_text(info.name) if is_text else cube.read(info.name)
            texts = [str(v) for v in np.ravel(np.asarray(raw))]
            return baselines_of(texts * (1 if len(texts) == count else count))
    return baselines_of([cube.name]) * count


def days(times: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return days since 1970-01-01 as int32; unknown dates (NaT) become 0."""
    known = ~np.isnat(times)
    whole = np.where(known, times, np.datetime64(0, "s")).astype("datetime64[D]").astype(np.int64)
    return np.where(known, whole, 0).astype(np.int32)


def times_of(cube: Cube, array: str, dim: str | None, date: str = "") -> Any:
    """Return the acquisition times of an array's dates, datetime64[s]; NaT where unknown.

    Args:
        cube: The store.
        array: Path of the array.
        dim: Its dimension of dates; None where it has none.
        date: Date in the file's name, used where the store says nothing.

    Raises:
        DataError: No coordinate says when the dates are, or it is not understood.
    """
    if dim is None:
        return np.array([_single_time(cube, array, date)], "datetime64[s]")
    info = cube.arrays[array]
    size = info.shape[info.dims.index(dim)]
    for theirs in _time_arrays(cube, array, dim):
        if theirs.shape == (size,):
            return _stored_times(cube, theirs)
    raise DataError(f"{cube.name}: no coordinate array says when the {size} dates of {dim!r} are.")


def _time_arrays(cube: Cube, array: str, dim: str | None) -> list[ArrayInfo]:
    """Return the arrays beside an array and above it that may say when it was measured."""
    parts = array.split("/")[:-1]
    dims = () if dim is None else (dim,)
    found = []
    for depth in range(len(parts), -1, -1):
        prefix = "/".join(parts[:depth])
        inside = {
            name.rpartition("/")[2]: info
            for name, info in cube.arrays.items()
            if name.rpartition("/")[0] == prefix
        }
        found += [inside[n] for n in (dim, *TIME_NAMES) if n in inside and n is not None]
        found += [
            info
            for info in inside.values()
            if info.dims == dims
            and (info.attrs.get("standard_name") == "time" or " since " in _units(info))
        ]
    return found


def _units(info: ArrayInfo) -> str:
    return str(info.attrs.get("units", ""))


def _stored_times(cube: Cube, info: ArrayInfo) -> Any:
    where = f"{cube.name}: {info.name}"
    if info.dtype.kind in "USTO":
        return decode_times(np.array(cube.read_text(info.name)), info.attrs, where)
    values = cube.read(info.name)
    if info.dtype.kind in "iuf" and "units" not in info.attrs and values.size:
        known = abs(values[np.isfinite(values)].astype(np.float64))
        if known.size and known.max() < 1e17:  # nanoseconds of 1973
            raise DataError(
                f"{where} has no CF units, such as 'days since 2020-01-01'; it holds "
                f"{values.ravel()[0]}. Write dates as xarray does (datetime64), or as ISO text."
            )
    return decode_times(values, info.attrs, where)


def _single_time(cube: Cube, array: str, date: str) -> Any:
    """Return the time of an array without a time axis: coordinate, STAC, attributes, name."""
    for theirs in _time_arrays(cube, array, None):
        if math.prod(theirs.shape) == 1:
            [time] = _stored_times(cube, theirs).reshape(-1)
            if not np.isnat(time):
                return time
    item = cube.group_attrs("").get("stac_discovery")
    properties = item.get("properties", {}) if isinstance(item, Mapping) else {}
    texts = [properties.get("start_datetime"), properties.get("datetime")]
    folder = array.rpartition("/")[0]
    for attrs in (cube.arrays[array].attrs, cube.group_attrs(folder), cube.group_attrs("")):
        texts += [attrs.get(name) for name in ("datetime", "time_coverage_start", "date")]
    for text in texts:
        if text and str(text) != "null":
            with suppress(DataError):
                [time] = decode_times(np.array([str(text)]), {}, cube.name)
                if not np.isnat(time):
                    return time
    return parse_date(date) if date else product_time([cube.name.rpartition("/")[2]])[0]


def parse_date(text: str) -> Any:
    """Read `20200503`, `2020-05-03` or `20200503T101031` as datetime64[s]; NaT if it is neither."""
    digits = text.replace("-", "").replace(":", "").replace("_", "T")
    try:
        day = f"{digits[:4]}-{digits[4:6]}-{digits[6:8]}"
        clock = digits[9:15]
        if len(clock) == 6:
            return np.datetime64(f"{day}T{clock[:2]}:{clock[2:4]}:{clock[4:6]}", "s")
        return np.datetime64(day, "s")
    except ValueError:
        return UNKNOWN
