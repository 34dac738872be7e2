"""Numbers that stand for missing values though nothing declares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cube_files import LEFT, TOP, write_geotiff

from domainssl.inspection.recognise import inspect_path
from domainssl.io.raster.geotiff import describe_geotiff
from domainssl.io.raster.grid import Bounds
from domainssl.io.raster.patches import measured_or_nan
from domainssl.io.raster.read import Pixels, Target, read_pixels
from domainssl.io.series.tile import measured
from domainssl.io.ssl4eo.facts import product
from domainssl.io.ssl4eo.values import Validity
from domainssl.missing import beyond, marks, told
from domainssl.modality import Modality
from domainssl.sources.dataset import Reads, _measured
from domainssl.units import UnitCheck

SIDE = 16
AROUND = Bounds(LEFT, TOP - SIDE * 10, LEFT + SIDE * 10, TOP)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16"])
def test_no_instrument_measures_beyond_its_unit(dtype: str) -> None:
    values = np.array([-899, 0, 899, -999, 901, -9999, -32768], dtype)
    found = beyond(values, "db")
    assert found is not None and found.tolist() == [False] * 3 + [True] * 4
    assert beyond(values[:3], "db") is None and beyond(values, "arbitrary") is None
    if values.dtype.kind == "f":
        spoilt = np.array([np.nan, np.inf, -np.inf, 1], dtype)
        for unit in ("db", "dn", "arbitrary"):
            hidden = beyond(spoilt, unit)
            assert hidden is not None and hidden.tolist() == [True, True, True, False]


def test_marks_are_known_numbers_in_stored_units_only() -> None:
    stored = np.array([-32768, -9999, -6000, 0, 9000], np.int16)
    found = marks(stored, 1e-4, 0.0, "reflectance")  # -6000 is odd, but no mark
    assert found is not None and found.tolist() == [True, True, False, False, False]
    assert marks(stored, 1.0, 0.0, "arbitrary") is None
    assert marks(np.array([-9999.0, -3.4e38, np.nan, 5.0]), 1.0, 0.0, "db").tolist() == [
        True, True, False, False,
    ]  # fmt: skip
    # -9999 in float16 is -10000
    assert marks(np.array([-9999, -12], np.float16), 1.0, 0.0, "db").tolist() == [True, False]
    assert marks(np.array([0, 65535], np.uint16), 1.0, 0.0, "dn").tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "dtype", "number"),
    [
        ("S1GRD", "float16", -9999), ("S1GRD", "float32", -32768), ("S1RTC", "float32", 3e38),
        ("S2L2A", "int16", -9999), ("S2L1C", "int16", -32768), ("DEM", "int16", 32767),
        ("DEM", "float32", -9999), ("NDVI", "float16", -9999),
    ],
)  # fmt: skip
def test_published_sets_hide_what_their_unit_cannot_hold(
    name: str, dtype: str, number: float
) -> None:
    facts = product(name)
    values = np.full((1, len(facts.bands), 2, 2), 1.0, dtype)
    values[0, 0, 0, 1] = number
    with told() as said:
        valid, _ = Validity(facts, file="a.zarr.zip").settle(values, None)
    assert valid[0].tolist() == [[True, False], [True, True]] and values[0, 0, 0, 1] == 0
    [text] = said.values()
    assert text.startswith(f"{name}, a.zarr.zip: some pixels hold ") and "not valid" in text


def _tif(path: Path, values: np.ndarray[Any, Any], unit: str, stored: str = "") -> Pixels:
    names = [f"N{i}" for i in range(len(values))]
    file = describe_geotiff(str(write_geotiff(path, values, None, block=16)), names)
    return read_pixels(file, [0], AROUND, Target(unit, stored or unit, 10.0))


def test_rasters_hide_undeclared_marks_where_the_unit_is_known(tmp_path: Path) -> None:
    values = np.full((2, SIDE, SIDE), -12.5, np.float32)
    values[1, 2] = -9999
    with told() as said:
        found = _tif(tmp_path / "a.tif", values, "db")
    assert np.flatnonzero(~found.valid[0].all(1)).tolist() == [2]
    assert found.values[0, 0, 3, 0] == -12.5 and "a.tif, N1: some pixels hold -9999" in str(said)
    plain = _tif(tmp_path / "b.tif", values, "arbitrary")  # may be anything: a run stops there
    assert plain.valid.all() and plain.values.min() == -9999
    packed = np.full((3, SIDE, SIDE), 3000, np.int16)
    packed[:, 4], packed[0, 5] = -32768, 0
    found = _tif(tmp_path / "c.tif", packed, "dn")
    assert np.flatnonzero(~found.valid[0].all(1)).tolist() == [4] and found.values.max() == 3000


@pytest.mark.parametrize(("unit", "bands"), [("db", 2), ("dn", 3), ("reflectance", 3)])
def test_zero_in_every_band_is_no_data(tmp_path: Path, unit: str, bands: int) -> None:
    values = np.full((bands, SIDE, SIDE), 0.25, np.float32)
    values[:, 1], values[0, 2] = 0, 0
    valid = _tif(tmp_path / "a.tif", values, unit).valid[0]
    assert np.flatnonzero(~valid.all(1)).tolist() == [1]
    assert _tif(tmp_path / "b.tif", values[: bands - 1], unit).valid.all()  # one band may be 0
    assert _tif(tmp_path / "c.tif", values, "arbitrary").valid.all()


@pytest.mark.parametrize("unit", ["db", "dn"])
def test_series_and_patches_hide_them(unit: Any) -> None:
    values = np.full((1, 2, 2, 2), 5.0)
    values[0, 1, 0, 0] = -9999
    found, valid = measured(values, unit)
    assert valid[0].tolist() == [[False, True], [True, True]] and found.min() == 0
    patch = measured_or_nan(values[0], unit)
    assert np.isnan(patch[:, 0, 0]).all() and np.isfinite(patch).sum() == 6


def test_data_sets_hide_them_in_known_units_only() -> None:
    values = torch.full((2, 2, 2), -12.0)
    values[0, 1, 1] = -9999
    for unit, count in (("db", 3), ("arbitrary", 4)):
        modality = Modality(name="s1", kind="image", channels=("VV", "VH"), value_unit=unit)
        _, valid = _measured(values, 0, Reads(), modality, "item 0")
        assert int(valid.sum()) == count


def test_a_run_stops_on_them_in_units_that_files_state_and_in_half_covered_windows() -> None:
    values = torch.linspace(0, 1, 2 * SIDE * SIDE).reshape(1, 2, SIDE, SIDE).clone()
    values[0, :, :3] = -9999
    valid = torch.ones(1, SIDE, SIDE, dtype=torch.bool)
    valid[:, -1] = False
    modality = Modality(name="a", kind="image", channels=("x", "y"), value_unit="arbitrary")
    check = UnitCheck({"a": modality}, stated=("a",))
    said = check.find({"a": values, "a.valid": valid}, "train", "the data")
    assert "a values are -9999 in a part of 1 item(s) of the data" in said
    valid[:, :3] = False
    assert check.find({"a": values, "a.valid": valid}, "other", "the data") == ""


def test_inspect_says_what_undeclared_marks_training_does_with(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(-12, 2, (2, SIDE, SIDE)).astype(np.float32)
    values[:, :4] = -9999
    report = inspect_path(str(write_geotiff(tmp_path / "a.tif", values, ("VV", "VH"), block=16)))
    [problem] = report["problems"]
    assert "VV VH hold -9999" in problem and "leaves such pixels out of dn" in problem
