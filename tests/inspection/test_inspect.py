"""What `inspect` reports of SSL4EO-S12, cubes, tars and GeoTIFF."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from cube_files import write_cube
from rich.console import Console
from ssl4eo_files import DATES, SIDE, tile_table, write_split

from domainssl.errors import DataError
from domainssl.inspection.following import following
from domainssl.inspection.recognise import inspect_path, render
from domainssl.io.ssl4eo.write import write_release_a

IDS = [[0, 1, 2], [3, 4]]


def text_of(report: dict) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(report))
    return console.export_text()


@pytest.fixture(params=["A", "B"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_split(tmp_path, "train", IDS, request.param)
    write_split(tmp_path, "val", IDS[:1], request.param)
    return tmp_path


def test_both_releases_are_described_as_plain_data(root: Path) -> None:
    report = inspect_path(str(root))
    json.dumps(report)
    assert report["kind"] == "ssl4eo" and report["problems"] == []
    assert {s: e["locations"] for s, e in report["splits"].items()} == {"train": 5, "val": 3}
    found = report["splits"]["train"]["products"]["S2L2A"]
    assert found["bands"][8] == "B8A" and found["dtype"] == "<i2"
    assert found["codec"] == "blosc(lz4, 5, shuffle 1)"
    assert found["crs"] == {"32632": 3} and found["valid_share"] == 1.0
    assert found["offset"] == {("1000" if report["release"] == "A" else "0"): 3}
    first = np.datetime64("2020-01-05")  # of every location; the others are 80 days apart
    assert found["dates"] == [str(first), str(first + 80 * (DATES - 1))]
    assert found["measured_dates"] == [str(first), str(first)]
    values = {row["band"]: row for row in found["values"]}
    assert values["B02"]["min"] == 1.0 and values["B02"]["max"] == 1004.0


def test_tables_show_release_values_and_problems(root: Path) -> None:
    text = text_of(inspect_path(str(root)))
    for part in ("dates per location", "dates, first to last", "dates of the measured values"):
        assert part in text
    for part in ("SSL4EO-S12 v1.1, release", "S1GRD", "blosc(lz4, 5, shuffle 1)", "B8A", "32632"):
        assert part in text
    assert "no problems found" in text


def test_missing_partner_and_damage_are_listed_as_problems(tmp_path: Path) -> None:
    write_split(tmp_path, "train", IDS)
    (tmp_path / "train" / "S1GRD" / "ssl4eos12_train_seasonal_data_000002.zarr.zip").unlink()
    path = tmp_path / "train" / "S2L2A" / "ssl4eos12_train_seasonal_data_000001.zarr.zip"
    path.write_bytes(path.read_bytes()[:-100])
    report = inspect_path(str(tmp_path))
    assert any("missing partner file" in text for text in report["problems"])
    assert any("not a complete zip" in text for text in report["problems"])
    assert "problems" in text_of(report)


def test_nan_share_and_unequal_ids_are_reported(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [[0, 1]])
    values = np.full((2, DATES, 2, SIDE, SIDE), -10, np.float16)
    values[0, 0, :, : SIDE // 2] = np.nan
    values[1, 0, 0, :2] = -32768
    path = tmp_path / "train" / "S1GRD" / "ssl4eos12_train_seasonal_data_000001.zarr.zip"
    write_release_a(path, "S1GRD", values, tile_table([0, 7], s1=True))
    report = inspect_path(str(tmp_path))
    assert report["splits"]["train"]["products"]["S1GRD"]["nan_share"] == pytest.approx(0.25)
    assert any("'sample', location 1" in text for text in report["problems"])
    assert any("S1GRD" in t and "some pixels hold -32768" in t for t in report["problems"])
    share = report["splits"]["train"]["products"]["S1GRD"]["valid_share"]
    assert share == pytest.approx(0.75 - 1 / SIDE)


def test_one_file_is_described_by_its_arrays(root: Path) -> None:
    folder = root / "val" / "S2L2A"
    report = inspect_path(str(next(folder.iterdir())))
    assert report["kind"] in ("cube", "tar")
    arrays = {array["name"]: array for array in report["arrays"]}
    assert arrays["bands"]["dtype"] == "<i2" and arrays["cloud_mask"]["dtype"] == "|u1"
    assert [row["band"] for row in report["values"]][:2] == ["B01", "B02"]
    assert "cloud_mask" in text_of(report)
    note = "note: values are those in the file, no data (0) included"
    assert (note in text_of(report)) is (report["kind"] == "cube")  # tars are release B


def test_the_folder_of_one_product_is_described_with_its_offset(root: Path) -> None:
    report = inspect_path(str(root / "train" / "S2L2A"))
    assert report["kind"] == "ssl4eo" and report["problems"] == []
    found = report["splits"]["train"]["products"]["S2L2A"]
    assert found["files"] == 2 and found["locations"] == 5
    is_in_file = report["release"] == "A"
    assert found["offset"] == {"1000" if is_in_file else "0": 3}
    assert {row["band"]: row for row in found["values"]}["B02"]["min"] == 1.0
    assert ("after the offset was taken away" in text_of(report)) is is_in_file


def test_a_missing_first_partner_is_one_problem(tmp_path: Path) -> None:
    write_split(tmp_path, "train", IDS)
    (tmp_path / "train" / "S1GRD" / "ssl4eos12_train_seasonal_data_000001.zarr.zip").unlink()
    [problem] = inspect_path(str(tmp_path))["problems"]
    assert "missing partner file" in problem and "000001" in problem


def test_other_formats_in_folders_of_the_same_names_are_named(tmp_path: Path) -> None:
    for product in ("S1GRD", "S2L2A"):
        folder = tmp_path / "train" / product
        folder.mkdir(parents=True)
        (folder / "scene.jp2").write_text("")
    with pytest.raises(DataError) as refusal:
        inspect_path(str(tmp_path))
    text = str(refusal.value)
    assert text.count("scene.jp2") == 2 and text.count("Expected there") == 1
    assert "named like products of SSL4EO-S12 v1.1, but hold no file of its format" in text
    assert "ssl4eos12_*.zarr.zip (release A) or ssl4eos12_shard_*.tar (release B)" in text
    write_tif(tmp_path / "train" / "S2L2A" / "a.tif")
    report = inspect_path(str(tmp_path))
    assert report["kind"] == "geotiff" and "Some folders are named like" in text_of(report)


def test_mixed_archives_leave_the_release_open(tmp_path: Path) -> None:
    write_split(tmp_path, "train", IDS)
    for product in ("S1GRD", "S2L2A"):
        (tmp_path / "train" / product / "ssl4eos12_shard_000001.tar").write_bytes(b"")
    report = inspect_path(str(tmp_path))
    assert report["release"] is None
    assert "whose release cannot be told, see below" in text_of(report)


def write_tif(path: Path) -> None:
    data = np.full((2, 30, 40), 5, np.float32)
    data[:, :10] = -9999
    data[1, 20:] = 8
    profile = {
        "driver": "GTiff", "height": 30, "width": 40, "count": 2, "dtype": "float32",
        "crs": "EPSG:32632", "nodata": -9999.0, "compress": "deflate",
        "transform": rasterio.Affine(10, 0, 717705.5, 0, -10, 5000000),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(data)


def test_geotiff_values_leave_out_no_data(tmp_path: Path) -> None:
    write_tif(tmp_path / "a.tif")
    [found] = inspect_path(str(tmp_path))["files"]
    assert found["crs"] == "EPSG:32632" and found["transform"][:3] == [10.0, 0.0, 717705.5]
    assert found["valid_share"] == pytest.approx(2 / 3)
    assert [row["mean"] for row in found["values"]] == [5.0, 6.5]
    text = text_of(inspect_path(str(tmp_path / "a.tif")))
    assert "deflate" in text and "10 0 717705.5 0 -10 5000000" in text


def test_geotiff_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"II*\0nonsense")
    [problem] = inspect_path(str(tmp_path))["problems"]
    assert "a.tif: the GeoTIFF cannot be read" in problem


def test_no_command_follows_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"II*\0")
    report = inspect_path(str(tmp_path / "a.tif"))
    assert report["problems"] and following(report) == []


def test_path_that_is_not_there_names_the_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing lies there.*'sample'"):
        inspect_path(str(tmp_path / "nothing"))


def test_folder_of_other_things_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"It holds: notes\.txt"):
        inspect_path(str(tmp_path))
    with pytest.raises(DataError, match="kind of file is not understood"):
        inspect_path(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(("value", "count"), [(500, 1), (None, 0)])
def test_a_cube_of_one_value_is_a_problem(tmp_path: Path, value: int | None, count: int) -> None:
    """It passed without a word, where a GeoTIFF did not."""
    values = np.arange(2 * 2 * 32 * 32, dtype=np.int16).reshape(2, 2, 32, 32)
    values = values if value is None else np.full_like(values, value)
    path = write_cube(tmp_path / "c.zarr", values, ("B03", "B04"))
    problems = inspect_path(str(path))["problems"]
    assert sum("every band has one value" in text for text in problems) == count
