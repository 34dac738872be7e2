"""What other tools leave in stores: packed places, names beside numbers, gaps in shards."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import zarr
from cube_files import LEFT, TOP, write_cube, write_geotiff

from domainssl.errors import DataError
from domainssl.io.raster.bands import describe_zarr, open_store
from domainssl.io.raster.grid import Bounds, plain_crs
from domainssl.io.raster.read import MaskRule, Target, read_pixels
from domainssl.io.raster.sites import find_files
from domainssl.io.raster.zarr import open_cube

SIDE = 16
AROUND = Bounds(LEFT, TOP - SIDE * 10, LEFT + SIDE * 10, TOP)
VALUES = np.arange(1000, 1000 + SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
STEPS = (np.arange(SIDE) + 0.5) * 10
MAP = {"crs_wkt": "EPSG:32632"}
Entry = tuple[Any, list[str], dict[str, Any]]


def _store(path: Path, places: dict[str, Entry] | None = None, **more: Entry) -> str:
    """Write B02 (y, x) over a map, with other coordinates or further arrays."""
    entries: dict[str, Entry] = {
        "x": (LEFT + STEPS, ["x"], {}), "y": (TOP - STEPS, ["y"], {}),
        "spatial_ref": (np.array(0), [], MAP), "B02": (VALUES, ["y", "x"], {}),
        **(places or {}), **more,
    }  # fmt: skip
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    for name, (values, dims, attrs) in entries.items():
        dtype = str if values.dtype.kind == "U" else values.dtype
        made = group.create_array(
            name, shape=values.shape, dtype=dtype, dimension_names=dims, attributes=attrs
        )
        made[...] = values
    return str(path)


def _pixels(path: str, bands: tuple[str, ...] = ("B02",), mask: str | None = None) -> Any:
    target = Target("dn", "dn", 10.0, MaskRule((9,)) if mask else MaskRule())
    return read_pixels(describe_zarr(path, bands, mask=mask), [0], AROUND, target)


PACKED = {
    "x": (np.arange(SIDE, dtype="i2"), ["x"], {"scale_factor": 10.0, "add_offset": LEFT + 5}),
    "y": (np.arange(SIDE, dtype="i2"), ["y"], {"scale_factor": -10.0, "add_offset": TOP - 5}),
}
KILOMETRES = {
    "x": ((LEFT + STEPS) / 1000, ["x"], {"units": "km"}),
    "y": ((TOP - STEPS) / 1000, ["y"], {"units": "kilometers"}),
}


@pytest.mark.parametrize("places", [PACKED, KILOMETRES])
def test_packed_coordinates_and_kilometres_are_metres(tmp_path: Path, places: Any) -> None:
    found = _pixels(_store(tmp_path / "a.zarr", places))
    assert found.valid.all() and np.array_equal(found.values[0, 0], VALUES)


def test_kilometres_of_a_system_in_kilometres_stay(tmp_path: Path) -> None:
    mapping = {"spatial_ref": (np.array(0), [], {"crs_wkt": "+proj=utm +zone=32 +units=km"})}
    [band] = describe_zarr(_store(tmp_path / "a.zarr", KILOMETRES | mapping), ["B02"]).bands
    assert band.grid.left == pytest.approx(LEFT / 1000) and band.grid.step == pytest.approx(0.01)


def test_scan_angles_are_refused(tmp_path: Path) -> None:
    places = {"x": (1e-5 * np.arange(SIDE), ["x"], {"units": "rad"})}
    with pytest.raises(DataError, match="scan angles of geostationary .*perspective_point_height"):
        describe_zarr(_store(tmp_path / "a.zarr", places), ["B02"])


@pytest.mark.parametrize(
    "attrs",
    [
        {"spatial:transform": [10, 0, LEFT + 5, 0, -10, TOP - 5], "spatial:registration": "node"},
        {"spatial:transform": [10, 0, LEFT, 0, -10, TOP], "spatial:registration": "pixel"},
        {"transform": f"10 0 {LEFT} 0 -10 {TOP}"},
    ],
)
@pytest.mark.parametrize("with_coordinates", [False, True])
def test_transforms_say_what_they_stand_for(tmp_path: Path, attrs: Any, with_coordinates) -> None:
    path = _store(tmp_path / "a.zarr", B02=(VALUES, ["y", "x"], attrs))
    if not with_coordinates:
        for name in ("x", "y"):
            del zarr.open_group(path)[name]
    grid = describe_zarr(path, ["B02"]).bands[0].grid
    assert (grid.left, grid.top) == (LEFT, TOP)


@pytest.mark.parametrize("value", [[LEFT, 10, 0, TOP, 0, -10], f"{LEFT}, 10, 0, {TOP}, 0, -10"])
def test_geotransforms_are_lists_or_texts(tmp_path: Path, value: Any) -> None:
    mapping = {"spatial_ref": (np.array(0), [], {**MAP, "GeoTransform": value})}
    path = _store(tmp_path / "a.zarr", mapping)
    for name in ("x", "y"):
        del zarr.open_group(path)[name]
    grid = describe_zarr(path, ["B02"]).bands[0].grid
    assert (grid.left, grid.top, grid.step) == (LEFT, TOP, 10.0)


UTM = pyproj.CRS(32632)


@pytest.mark.parametrize(
    "attrs",
    [
        {"_CRS": {"wkt": UTM.to_wkt()}},
        {"_CRS": {"url": "http://www.opengis.net/def/crs/EPSG/0/32632"}},
        {"proj:projjson": UTM.to_json_dict()},
    ],
)
def test_reference_systems_of_gdal_and_projjson(tmp_path: Path, attrs: Any) -> None:
    path = _store(
        tmp_path / "a.zarr",
        {"spatial_ref": (np.array(0), [], {})},
        B02=(VALUES, ["y", "x"], attrs),
    )
    assert describe_zarr(path, ["B02"]).crs == "EPSG:32632"


def test_heights_do_not_part_reference_systems() -> None:
    for text in ("EPSG:32632+5773", UTM.to_3d().to_wkt(), UTM.to_wkt()):
        assert plain_crs(text, "a") == "EPSG:32632"
    assert plain_crs("OGC:CRS84", "a") == plain_crs("EPSG:4326", "a") == "EPSG:4326"


@pytest.mark.parametrize("name", ["NoDataValue", "NODATA", "no_data_value", "FillValue"])
def test_nodata_is_known_in_every_spelling(tmp_path: Path, name: str) -> None:
    found = _pixels(_store(tmp_path / "a.zarr", B02=(VALUES, ["y", "x"], {name: 1003})))
    assert np.array_equal(found.valid[0], VALUES != 1003)


NAMES = ["B08", "B04", "B02"]


@pytest.mark.parametrize("beside", ["long_name", "coordinate"])
def test_names_beside_numbered_bands_count(tmp_path: Path, beside: str) -> None:
    stack = np.stack([VALUES + 1000 * i for i in range(3)])
    attrs = {"long_name": NAMES} if beside == "long_name" else {}
    more: dict[str, Entry] = {"band": (np.arange(1, 4), ["band"], {})}
    if beside == "coordinate":
        more["title"] = (np.array(NAMES), ["band"], {})
    path = _store(tmp_path / "a.zarr", stack=(stack, ["band", "y", "x"], attrs), **more)
    del zarr.open_group(path)["B02"]
    found = _pixels(path, ("B02", "B08", "B04"))
    assert found.values[0, :, 0, 0].tolist() == [3000, 1000, 2000]


def test_polarisations_are_bands_and_other_dimensions_are_named(tmp_path: Path) -> None:
    pair = np.stack([VALUES, VALUES])
    axis = {"polarisation": (np.array(["VV", "VH"]), ["polarisation"], {})}
    path = _store(tmp_path / "a.zarr", sigma=(pair, ["polarisation", "y", "x"], {}), **axis)
    assert [b.name for b in describe_zarr(path, ["VV", "VH"]).bands] == ["VV", "VH"]
    odd = _store(tmp_path / "b.zarr", B02=(VALUES, ["yc", "xc"], {}))
    with pytest.raises(DataError, match=r"dimensions y and x, but B02 \(yc, xc\)"):
        describe_zarr(odd, ["B02"])


@pytest.mark.parametrize("fill", [0, 7])
def test_chunks_that_a_shard_lacks_are_missing(tmp_path: Path, fill: int) -> None:
    path = _store(tmp_path / "a.zarr")
    group = zarr.open_group(path)
    made = group.create_array(
        "B03", shape=(20, 20), dtype="uint16", chunks=(8, 8), shards=(16, 16), fill_value=fill,
        dimension_names=["y", "x"],
    )  # fmt: skip
    made[:8, :16], made[8:16, 8:16], made[0, 0] = 900, 900, fill
    made[16:], made[:16, 16:] = 900, 900
    cube = open_cube(path)
    values = cube.read("B03")
    gaps = cube.unwritten("B03", [slice(None), slice(None)], values)
    expected = np.zeros((20, 20), bool)
    expected[8:16, :8] = True
    assert gaps is not None and np.array_equal(gaps, expected)
    assert cube.missing_chunks("B03") == 1


def test_a_mask_hides_its_own_fill_value(tmp_path: Path) -> None:
    classes = np.full((SIDE, SIDE), 4, np.uint8)
    classes[0], classes[1], classes[2] = 255, 9, 0
    fill = {"_FillValue": 255, "missing_value": 0}
    found = _pixels(_store(tmp_path / "a.zarr", scl=(classes, ["y", "x"], fill)), mask="scl")
    assert np.array_equal(found.valid[0], (classes != 255) & (classes != 9))
    packed = _store(tmp_path / "b.zarr", scl=(classes, ["y", "x"], {"scale_factor": 0.1}))
    with pytest.raises(DataError, match="class numbers are compared as stored"):
        _pixels(packed, mask="scl")


@pytest.mark.parametrize("date", ["01052020", "20201399", "00010101"])
def test_what_is_no_date_in_a_name_is_refused(tmp_path: Path, date: str) -> None:
    write_geotiff(tmp_path / f"a_{date}.tif", VALUES[None], ["B02"])
    with pytest.raises(DataError, match=f"'{date}' stands for {{date}} .* is no date"):
        find_files(str(tmp_path), "{site}_{date}.tif", "")


def test_stores_that_are_none_are_told(tmp_path: Path, caplog: Any) -> None:
    _store(tmp_path / "s2" / "a.zarr")
    (tmp_path / "s2" / "b.zarr").mkdir()
    with caplog.at_level(logging.WARNING):
        assert list(find_files(str(tmp_path), "s2", "")) == ["a"]
    assert "b.zarr" in caplog.text and "passed over" in caplog.text
    (tmp_path / "s1" / "c.tif").mkdir(parents=True)
    with pytest.raises(DataError, match="s1 holds: c.tif"):
        find_files(str(tmp_path), "s1", "")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_consolidated_metadata_that_are_stale_give_way(
    tmp_path: Path, caplog: Any, zarr_format: int
) -> None:
    """Arrays that were written anew or grew, of which the consolidated copy was not told."""
    path = write_cube(
        tmp_path / "a.zarr", VALUES[None, None].astype(np.int32), ["B02"], times=None,
        zarr_format=zarr_format, as_variables=True,
    )  # fmt: skip
    zarr.consolidate_metadata(str(path), zarr_format=zarr_format)
    meta = path / "B02" / ("zarr.json" if zarr_format == 3 else ".zattrs")
    facts = json.loads(meta.read_text())
    (facts["attributes"] if zarr_format == 3 else facts)["add_offset"] = 5.0
    meta.write_text(json.dumps(facts))
    with caplog.at_level(logging.WARNING):
        assert open_store(str(path)).info("B02").attrs["add_offset"] == 5.0
    assert "consolidated metadata" in caplog.text
