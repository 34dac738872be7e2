"""Attributes as tools and people write them, and as they should not: a value, or one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from cube_files import LEFT, TOP, write_cube, write_geotiff
from rasterio.enums import ColorInterp

from domainssl.errors import DataError
from domainssl.inspection.recognise import inspect_path
from domainssl.io.raster.band_names import titles_or_none
from domainssl.io.raster.bands import describe_zarr
from domainssl.io.raster.geotiff import describe_geotiff
from domainssl.io.raster.grid import Bounds
from domainssl.io.raster.read import Target, read_pixels
from domainssl.io.raster.time import decode_times
from domainssl.missing import unmarked_value

SIDE = 16
AROUND = Bounds(LEFT, TOP - SIDE * 10, LEFT + SIDE * 10, TOP)
VALUES = np.arange(100, 100 + 2 * SIDE * SIDE).reshape(2, SIDE, SIDE).astype(np.uint16)


def cube(tmp_path: Path, **attrs: Any) -> str:
    path = write_cube(tmp_path / "a.zarr", VALUES[None], ["B02", "B03"], times=None, attrs=attrs)
    return str(path)


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        ({"valid_range": [0]}, "valid_range is [0], expected two numbers"),
        ({"valid_range": {"a": 1}}, "expected two numbers"),
        ({"valid_range": 5}, "valid_range is 5, expected two numbers"),
        ({"valid_range": [10, 0]}, "no value is valid between 10 and 0"),
        ({"valid_max": [1, 2]}, "[1, 2] are several numbers"),
        ({"valid_min": "low"}, "'low' is no number"),
        ({"scale_factor": 0}, "scale 0 and offset 0 give no values"),
        ({"scale_factor": "nan"}, "scale nan"),
        ({"add_offset": "inf"}, "offset inf"),
        ({"transform": ["a"] * 6}, "the attributes cannot be read (ValueError"),
    ],
)
def test_attributes_that_give_no_values_are_named_in_training_and_in_inspect(
    tmp_path, attrs, words
):
    path = cube(tmp_path, **attrs)
    with pytest.raises(DataError) as refusal:
        describe_zarr(path, ["B02"])
    assert words in str(refusal.value) and path in str(refusal.value)
    assert any(words in text for text in inspect_path(path)["problems"])


@pytest.mark.parametrize("stated", [[100, 300], "100, 300", ["100", "300"], "[100 300]"])
def test_limits_are_read_in_every_spelling(tmp_path, stated):
    file = describe_zarr(cube(tmp_path, valid_range=stated), ["B02", "B03"])
    found = read_pixels(file, [0], AROUND, Target("dn", "dn", 10.0))
    assert np.array_equal(found.valid[0], (VALUES <= 300).all(0))


def test_inspect_tells_of_bands_without_a_valid_pixel_and_of_what_is_not_understood(tmp_path):
    problems = inspect_path(cube(tmp_path, valid_max=1))["problems"]
    assert any("no valid pixel of B02 B03 in the middle" in text for text in problems)
    path = write_cube(tmp_path / "b.zarr", VALUES[None], ["B02", "B03"], crs=None)
    assert any("no coordinate reference system" in t for t in inspect_path(str(path))["problems"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20200501", "2020-05-01T00:00:00"),
        ("2020-05-01T10:00:00+05:00", "2020-05-01T05:00:00"),
        ("2020-05-01 10:00", "2020-05-01T10:00:00"),
        (20200501, "2020-05-01T00:00:00"),
        ("yesterday", "NaT"),
        (["2020-05-01"], "NaT"),
    ],
)
def test_a_date_in_the_attributes_is_read_as_text(tmp_path, text, expected):
    path = write_cube(
        tmp_path / "a.zarr", VALUES[None], ["B02", "B03"], times=None, attrs={"datetime": text}
    )
    [found] = describe_zarr(str(path), ["B02"]).times
    assert str(found) == expected


@pytest.mark.parametrize(
    ("calendar", "expected"),
    [("noleap", "2020-03-02"), ("360_day", "2020-03-11"), ("all_leap", "2020-02-28"),
     ("julian", "2020-03-14")],
)  # fmt: skip
def test_dates_of_model_calendars_are_the_days_of_that_name_and_julian_ones_real_days(
    calendar, expected
):
    attrs = {"units": "days since 2018-01-01", "calendar": calendar, "_FillValue": -1}
    found = decode_times(np.array([[790, -1]]), attrs, "time")
    assert found.shape == (1, 2) and [str(t)[:10] for t in found[0]] == [expected, "NaT"]
    half = decode_times(np.array([790.5, np.nan]), attrs, "time")
    assert [str(t) for t in half] == [f"{expected}T12:00:00", "NaT"]


@pytest.mark.parametrize(
    ("calendar", "day", "reason"),
    [("360_day", 59, "2018-02-30"), ("all_leap", 59, "2018-02-29"), (5, 1, "calendar 5")],
)
def test_dates_that_do_not_exist_are_refused_with_the_remedy(calendar, day, reason):
    attrs = {"units": "days since 2018-01-01", "calendar": calendar}
    with pytest.raises(DataError, match=rf"a.zarr: time.*{reason}.*standard"):
        decode_times(np.array([day]), attrs, "a.zarr: time")


@pytest.mark.parametrize(
    ("titles", "names"),
    [
        (["Band 2", "Band 4"], ["B02", "B04"]),
        (["band02", "band08"], ["B02", "B08"]),
        (["490", "665"], ["490", "665"]),
        (["0", "1"], None),
        (["Band 01", "Band 02"], None),
        (["layer_1", "layer_2"], None),
    ],
)
def test_numbers_that_do_not_count_the_bands_are_names(titles, names):
    assert titles_or_none(titles) == names


BYTES = np.arange(4 * SIDE * SIDE).reshape(4, SIDE, SIDE).astype(np.uint8)


def rgba(path: Path, titles: list[str] | None) -> str:
    write_geotiff(path, BYTES, titles, block=16)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [*(ColorInterp.red, ColorInterp.green, ColorInterp.blue),
                            ColorInterp.alpha]  # fmt: skip
    return str(path)


@pytest.mark.parametrize("titles", [["red", "green", "blue", "nir"], None])
def test_a_fourth_band_that_is_only_called_alpha_is_a_band(tmp_path, titles):
    path = rgba(tmp_path / "a.tif", titles)
    bands = ["B04", "B03", "B02", "B08"]
    file = describe_geotiff(path, bands)
    found = read_pixels(file, [0], AROUND, Target("arbitrary", "arbitrary", 10.0))
    assert found.valid.all() and np.array_equal(found.values[0], BYTES)


def test_a_band_that_is_alpha_hides_pixels_in_inspect_as_in_training(tmp_path):
    path = rgba(tmp_path / "a.tif", ["red", "green", "blue", "Alpha"])
    file = describe_geotiff(path, ["B04", "B03", "B02"])
    found = read_pixels(file, [0], AROUND, Target("arbitrary", "arbitrary", 10.0))
    assert np.array_equal(found.valid[0], BYTES[3] > 0)
    [facts] = inspect_path(path)["files"]
    assert facts["mask"] and facts["valid_share"] == pytest.approx(float(found.valid.mean()))
    assert [row["band"] for row in facts["values"]] == ["B04", "B03", "B02"]


def test_inspect_of_a_geotiff_decodes_and_masks_as_training_does(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", VALUES, ["B02", "B03"], nodata=100, block=16)
    mask = np.full((SIDE, SIDE), 255, np.uint8)
    mask[8:] = 0
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (1e-4, 1e-4), (-0.1, -0.1)
        file.write_mask(mask)
    [facts] = inspect_path(str(path))["files"]
    assert facts["valid_share"] == pytest.approx(127 / 256)
    assert facts["values"][0]["min"] == pytest.approx(101e-4 - 0.1)
    described = describe_geotiff(str(path), ["B02", "B03"])
    found = read_pixels(described, [0], AROUND, Target("reflectance", "auto", 10.0))
    assert found.valid.mean() == pytest.approx(127 / 256)
    assert found.values[0, 0][found.valid[0]].min() == pytest.approx(101e-4 - 0.1)


def test_complex_numbers_are_refused_not_cut(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", VALUES.astype(np.complex64), ["VV", "VH"], block=16)
    with pytest.raises(DataError, match="complex64 numbers.*amplitude or power"):
        describe_geotiff(str(path), ["VV"])
    assert any("complex64" in text for text in inspect_path(str(path))["problems"])


@pytest.mark.parametrize("number", [-9999.0, -32768.0, -3.4028234663852886e38, 9.96921e36])
def test_a_number_of_missing_values_that_nothing_declares_is_told(tmp_path, number):
    values = np.random.default_rng(0).normal(-12, 3, (2, SIDE, SIDE)).astype(np.float32)
    values[:, :, :5] = number
    path = write_geotiff(tmp_path / "a.tif", values, ["VV", "VH"], block=16)
    [problem] = inspect_path(str(path))["problems"]
    assert "VV VH hold " in problem and f"nodata: {number:g}" in problem
    write_geotiff(path, values, ["VV", "VH"], block=16, nodata=number)
    assert inspect_path(str(path))["problems"] == []
    stored = write_cube(tmp_path / "a.zarr", values[None], ["VV", "VH"])
    assert any(f"nodata: {number:g}" in t for t in inspect_path(str(stored))["problems"])


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(-10000, -9000, 2000),  # below sea level in some unit: values around it
        np.r_[np.full(500, -1000.0), np.full(500, 3000.0)],
        np.r_[np.zeros(500), np.linspace(200, 3000, 500)],
        np.full(100, -9999.0),  # nothing else: validity tells
        np.r_[-9999.0, np.linspace(0, 1, 5000)],  # one of 5000
        np.array([]),
    ],
)
def test_numbers_that_may_be_values_are_not_told(values):
    assert unmarked_value(values) is None
