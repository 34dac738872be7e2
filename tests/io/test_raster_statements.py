"""What stores and files state in less usual ways: scaling, reference system, grid, names, masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from cube_files import LEFT, TOP, write_geotiff

from domainssl.errors import DataError
from domainssl.inspection.recognise import inspect_path
from domainssl.io.raster.bands import describe_zarr
from domainssl.io.raster.geotiff import describe_geotiff
from domainssl.io.raster.grid import Bounds
from domainssl.io.raster.read import MaskRule, Target, read_pixels
from domainssl.sensors import canonical_band

SIDE = 16
AROUND = Bounds(LEFT, TOP - SIDE * 10, LEFT + SIDE * 10, TOP)
WKT = rasterio.crs.CRS.from_epsg(32632).to_wkt()
UTM = {
    "grid_mapping_name": "transverse_mercator", "longitude_of_central_meridian": 9.0,
    "false_easting": 5e5, "false_northing": 0.0, "latitude_of_projection_origin": 0.0,
    "scale_factor_at_central_meridian": 0.9996, "semi_major_axis": 6378137.0,
    "inverse_flattening": 298.257223563,
}  # fmt: skip
VALUES = np.arange(2000, 2000 + SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)


def _store(
    path: Path,
    values: np.ndarray[Any, Any] = VALUES,
    attrs: dict[str, Any] | None = None,
    beside: dict[str, tuple[Any, dict[str, Any]]] | None = None,
    along: np.ndarray[Any, Any] | None = None,
) -> str:
    import zarr

    steps = (np.arange(SIDE) + 0.5) * 10
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    entries = [("x", LEFT + steps if along is None else along, ["x"], {}),
               ("y", TOP - steps if along is None else along, ["y"], {}),
               ("B02", values, ["y", "x"], {} if attrs is None else attrs)]  # fmt: skip
    entries += [(name, np.array(v), [], more) for name, (v, more) in (beside or {}).items()]
    for name, part, dims, more in entries:
        array = group.create_array(
            name, shape=part.shape, dtype=part.dtype, dimension_names=dims, attributes=more
        )
        array[...] = part
    return str(path)


@pytest.mark.parametrize(
    ("attrs", "beside"),
    [
        ({}, {"epsg": (32632, {})}), ({}, {"proj:epsg": (32632, {})}),
        ({}, {"proj:code": ("EPSG:32632", {})}),
        ({"grid_mapping": "utm: x y"}, {"utm": (0, {"crs_wkt": WKT})}),
        ({"grid_mapping": "utm"}, {"utm": (0, UTM)}),
    ],
    ids=["epsg", "proj:epsg", "proj:code", "CF long form", "CF parameters"],
)  # fmt: skip
def test_reference_systems_of_stackstac_and_cf(tmp_path: Path, attrs: Any, beside: Any) -> None:
    file = describe_zarr(_store(tmp_path / "a.zarr", attrs=attrs, beside=beside), ["B02"])
    assert rasterio.crs.CRS.from_string(file.crs).to_dict()["proj"] in ("utm", "tmerc")
    assert "32632" in file.crs or "9" in file.crs
    assert file.bands[0].grid.bounds == AROUND


def test_a_grid_mapping_that_makes_no_reference_system_is_named(tmp_path: Path) -> None:
    path = _store(tmp_path / "a.zarr", attrs={"grid_mapping": "utm"},
                  beside={"utm": (0, {"grid_mapping_name": "flat_earth"})})  # fmt: skip
    with pytest.raises(DataError, match="utm: the grid mapping 'flat_earth' makes no coordinate"):
        describe_zarr(path, ["B02"])


@pytest.mark.parametrize(
    "attrs",
    [
        {"raster:bands": [{"scale": 1e-4, "offset": -0.1, "nodata": 2000}]},
        {"raster:scale": 1e-4, "raster:offset": -0.1, "raster:nodata": 2000},
        {"scale": 1e-4, "offset": -0.1, "nodata": 2000},
    ],
    ids=["raster:bands", "raster", "plain"],
)
def test_scaling_of_stac_counts_for_integers(tmp_path: Path, attrs: dict[str, Any]) -> None:
    attrs = {"crs": "EPSG:32632", **attrs}
    file = describe_zarr(_store(tmp_path / "a.zarr", attrs=attrs), ["B02"])
    found = read_pixels(file, [0], AROUND, Target("dn", "auto", 10.0))
    assert not found.valid[0, 0, 0] and found.valid.sum() == SIDE * SIDE - 1
    assert found.values[0, 0, 0, 1] == 1001 and found.values[0, 0, -1, -1] == VALUES[-1, -1] - 1000
    # floats are scaled already, and a scale of 10 is a pixel size
    whole = describe_zarr(_store(tmp_path / "b.zarr", VALUES * 1e-4, attrs), ["B02"]).bands[0]
    assert (whole.scale, whole.offset, whole.nodata) == (1.0, 0.0, (2000.0,))
    attrs = {"crs": "EPSG:32632", "scale": 10}
    assert describe_zarr(_store(tmp_path / "c.zarr", attrs=attrs), ["B02"]).bands[0].scale == 1.0


def test_coordinates_that_count_pixels_say_no_place(tmp_path: Path) -> None:
    count = np.arange(SIDE)
    path = _store(tmp_path / "a.zarr", attrs={"crs": "EPSG:32632"}, along=count)
    with pytest.raises(DataError, match=r"count pixels \(0, 1, 2"):
        describe_zarr(path, ["B02"])
    attrs = {"crs": "EPSG:32632", "transform": [10, 0, LEFT, 0, -10, TOP]}
    found = describe_zarr(_store(tmp_path / "b.zarr", attrs=attrs, along=count), ["B02"])
    assert found.bands[0].grid.bounds == AROUND


def test_numbers_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = _store(tmp_path / "a.zarr", VALUES.astype(np.complex64), {"crs": "EPSG:32632"})
    with pytest.raises(DataError, match="B02 holds complex64 numbers; whole and real ones"):
        describe_zarr(path, ["B02"])
    assert any("complex64 numbers are not read" in t for t in inspect_path(path)["problems"])


@pytest.mark.parametrize("control_points", [False, True])
def test_a_geotiff_without_transform_is_refused_and_told(
    tmp_path: Path, control_points: bool
) -> None:
    path, points = tmp_path / "a.tif", {}
    if control_points:
        point = rasterio.control.GroundControlPoint
        points = {"gcps": [point(0, 0, LEFT, TOP), point(0, 16, LEFT + 160, TOP),
                           point(16, 0, LEFT, TOP - 160)]}  # fmt: skip
    with rasterio.open(path, "w", driver="GTiff", height=SIDE, width=SIDE, count=1, dtype="uint16",
                       crs="EPSG:32632", **points) as file:  # fmt: skip
        file.write(VALUES[None])
    text = "no transform but ground control points" if control_points else "no transform, so"
    with pytest.raises(DataError, match=text):
        describe_geotiff(str(path), ["B02"], crs="EPSG:32632")
    if not control_points:
        assert any(text in problem for problem in inspect_path(str(path))["problems"])


def test_inspect_tells_turned_pixels(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.tif", VALUES[None], ("B02",), block=16)
    with rasterio.open(path, "r+") as file:
        file.transform = rasterio.Affine(9, 1, LEFT, 1, -9, TOP)
    [problem] = inspect_path(str(path))["problems"]
    assert "is turned, mirrored or has pixels that are not square" in problem


@pytest.mark.parametrize(
    ("name", "band"),
    [
        ("B02_10m", "B02"), ("b8a 20m", "B8A"), ("B1-60m", "B01"), ("t2m", "T2M"),
        ("B4, central wavelength 665 nm", "B04"), ("wind_10m", "WIND_10M"),
    ],
)  # fmt: skip
def test_bands_named_with_their_pixel_size_or_wavelength(name: str, band: str) -> None:
    assert canonical_band(name) == band


def test_masks_of_floats_hide_what_is_no_class() -> None:
    mask = np.array([np.nan, 4, 9, np.inf], np.float32)
    assert MaskRule((0, 9)).hides(mask).tolist() == [True, False, True, True]
    assert MaskRule((1, 8), is_bits=True).hides(mask).tolist() == [True, False, True, True]
