"""Times of plain units, decoded without xarray, are those that xarray decodes."""

from __future__ import annotations

import numpy as np
import pytest
import xarray

from domainssl.io.raster import time
from domainssl.io.raster.time import _plain_times, decode_times

UNITS = [
    "days since 2019-12-15",
    "days since 2020-02-28 12:30:00",
    "hours since 1970-01-01T06:00:00",
    "minutes since 1999-12-31 23:59:59",
    "seconds since 2021-01-01T00:00:00",
]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("calendar", [None, "standard", "proleptic_gregorian"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.int64])
def test_whole_numbers_since_a_date(units, calendar, dtype):
    values = np.array([0, 1, 59, 400, 30_000], dtype)
    attrs = {"units": units, **({"calendar": calendar} if calendar else {})}
    decoded = xarray.conventions.decode_cf_variable("t", xarray.Variable("t", values, attrs))
    plain = _plain_times(values, {"units": units})
    assert plain is not None
    assert np.array_equal(plain, decoded.values.astype("datetime64[s]"))
    assert np.array_equal(decode_times(values, attrs, "t"), plain)


@pytest.mark.parametrize(
    ("values", "attrs"),
    [
        (np.array([1.5]), {"units": "days since 2020-01-01"}),
        (np.array([1]), {"units": "days since 2020-01-01", "_FillValue": 1}),
        (np.array([1]), {"units": "days since 2020-01-01", "scale_factor": 2}),
        (np.array([1]), {"units": "days since 2020-01-01", "calendar": "noleap"}),
        (np.array([1]), {"units": "days since 2020-1-1"}),
        (np.array([1]), {"units": "days since 2020-13-41"}),
        (np.array([1]), {"units": "days since 2020-01-01 00:00:00 +02:00"}),
        (np.array([2**62]), {"units": "seconds since 2020-01-01"}),
        (np.array([-50_000]), {"units": "days since 2020-01-01"}),
    ],
)
def test_anything_else_is_left_to_xarray(values, attrs):
    assert _plain_times(values, attrs) is None


def test_calendars_count_in_any_letter_case():
    attrs = {"units": "days since 2018-01-01", "calendar": "NoLeap"}
    assert str(decode_times(np.array([790]), attrs, "t")[0])[:10] == "2020-03-02"


def test_missing_times_stay_missing():
    attrs = {"units": "days since 2020-01-01", "_FillValue": -1}
    assert np.isnat(decode_times(np.array([-1, 3]), attrs, "t")).tolist() == [True, False]


def test_nanoseconds_in_a_usual_calendar_are_decoded_without_xarray(monkeypatch):
    monkeypatch.setattr(time, "require", None)
    attrs = {"units": "nanoseconds since 1970-01-01", "calendar": "proleptic_gregorian"}
    stamps = np.array(["2020-03-01T10:11:12", "2024-02-29"], "datetime64[ns]")
    assert (
        decode_times(stamps.view(np.int64), attrs, "t").tolist() == stamps.astype("M8[s]").tolist()
    )
