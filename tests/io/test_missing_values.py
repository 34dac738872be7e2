"""Every way in which a raster says that nothing was measured, and values that must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from cube_files import LEFT, TOP, write_cube, write_geotiff

from domainssl.io.raster import bands
from domainssl.io.raster.bands import describe_zarr
from domainssl.io.raster.geotiff import describe_geotiff
from domainssl.io.raster.grid import Bounds
from domainssl.io.raster.read import Target, read_pixels
from domainssl.io.ssl4eo.facts import product
from domainssl.io.ssl4eo.values import Validity, remove_offset

SIDE = 16
AROUND = Bounds(LEFT, TOP - SIDE * 10, LEFT + SIDE * 10, TOP)


def _pixels(file: Any, unit: str = "arbitrary") -> Any:
    return read_pixels(file, [0], AROUND, Target(unit, unit, 10.0))


def _values(dtype: str = "float32", bands: int = 2) -> np.ndarray[Any, Any]:
    return np.arange(1, 1 + bands * SIDE * SIDE).reshape(bands, SIDE, SIDE).astype(dtype)


def _tif(path: Path, values: np.ndarray[Any, Any], *bands: str) -> Any:
    return describe_geotiff(str(path), bands or [f"N{i}" for i in range(len(values))])


def test_nodata_number_of_geotiff_is_missing(tmp_path: Path) -> None:
    values = _values()
    values[:, 0] = -9999
    path = write_geotiff(tmp_path / "a.tif", values, None, nodata=-9999, block=16)
    found = _pixels(_tif(path, values))
    assert not found.valid[0, 0].any() and found.valid[0, 1:].all()
    assert np.array_equal(found.values[0, :, 1:], values[:, 1:])


@pytest.mark.parametrize("internal", [True, False], ids=["internal", "msk"])
def test_mask_of_geotiff_is_missing(tmp_path: Path, internal: bool) -> None:
    values = _values()
    path = write_geotiff(tmp_path / "a.tif", values, None, block=16)
    mask = np.full((SIDE, SIDE), 255, np.uint8)
    mask[3] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), rasterio.open(path, "r+") as file:
        file.write_mask(mask)
    assert (tmp_path / "a.tif.msk").exists() != internal
    found = _pixels(_tif(path, values))
    assert np.array_equal(found.valid[0], mask > 0)
    assert not found.values[0, :, 3].any()


@pytest.mark.parametrize("nodata", [None, 7.0])
def test_alpha_band_hides_pixels_and_is_no_band(tmp_path: Path, nodata: float | None) -> None:
    from rasterio.enums import ColorInterp

    values = _values("uint16", 3)
    values[2] = 65535
    values[2, 5] = 0
    path = write_geotiff(tmp_path / "a.tif", values, None, block=16, nodata=nodata)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha]
    found = _pixels(_tif(path, values, "VV", "VH"))
    expected = (values[2] > 0) & (values[:2] != (nodata or -1)).all(axis=0)
    assert np.array_equal(found.valid[0], expected)


def test_nodata_of_a_sidecar_may_differ_by_band(tmp_path: Path) -> None:
    values = _values()
    values[0, 1], values[1, 2] = -1, -2
    path = write_geotiff(tmp_path / "a.tif", values, None, block=16)
    bands = "".join(
        f'<PAMRasterBand band="{i}"><NoDataValue>{v}</NoDataValue></PAMRasterBand>'
        for i, v in ((1, -1), (2, -2))
    )
    (tmp_path / "a.tif.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")
    found = _pixels(_tif(path, values))
    assert np.flatnonzero(~found.valid[0].all(axis=1)).tolist() == [1, 2]


def _store(path: Path, values: np.ndarray[Any, Any], attrs: dict[str, Any]) -> Any:
    import zarr

    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    along = (np.arange(SIDE) + 0.5) * 10
    for name, part, dims, more in (
        ("x", LEFT + along, ["x"], {}),
        ("y", TOP - along, ["y"], {}),
        ("b", values, ["band", "y", "x"], {"crs": "EPSG:32632", **attrs}),
    ):
        array = group.create_array(
            name, shape=part.shape, dtype=part.dtype, dimension_names=dims, attributes=more
        )
        array[...] = part
    return describe_zarr(str(path), ["VV", "VH"][: len(values)])


@pytest.mark.parametrize(
    "attrs",
    [
        {"_FillValue": -9999},
        {"_FillValue": "AAAAAICHw8A="},  # as xarray writes -9999 into format 3
        {"missing_value": [-9999.0, -1e30]},
        {"nodata": "-9999"},
        {"nodatavals": [-9999.0, -9999.0]},
        {"nodatavals": [-9999.0]},
        {"valid_min": -100},
    ],
)
def test_attributes_of_arrays_declare_missing_values(tmp_path: Path, attrs: Any) -> None:
    values = _values()
    values[:, 4] = -9999
    found = _pixels(_store(tmp_path / "a.zarr", values, attrs))
    assert not found.valid[0, 4].any() and found.valid[0, 5:].all() and found.valid[0, :4].all()


@pytest.mark.parametrize("limits", [(0.0, 1.0), (1, 10000), (0.5, 0.6)])
def test_limits_are_packed_unless_they_would_hide_everything(
    tmp_path: Path, limits: tuple[float, float], caplog: pytest.LogCaptureFixture
) -> None:
    stored = np.full((1, 1, SIDE, SIDE), 3000, np.uint16)
    stored[..., 0, :2] = (10001, 0)
    attrs = {"scale_factor": 1e-4, "_FillValue": 0, "valid_min": limits[0], "valid_max": limits[1]}
    path = write_cube(tmp_path / "a.zarr", stored, ["B02"], times=None, attrs=attrs)
    bands._say_physical.cache_clear()
    file = describe_zarr(str(path), ["B02"])
    describe_zarr(str(path), ["B02"])
    found = read_pixels(file, [0], AROUND, Target("dn", "auto", 10.0))
    hides_all = limits == (0.5, 0.6)  # in either unit: as CF says
    assert found.valid.sum() == (0 if hides_all else SIDE * SIDE - 2)
    assert not found.valid[0, 0, :2].any()
    assert caplog.text.count("taken as physical") == (limits == (0.0, 1.0))


def test_nodatavals_and_scales_belong_to_their_band(tmp_path: Path) -> None:
    values = _values()
    attrs = {"nodatavals": [-9999.0, 300.0], "scales": [1.0, 0.5], "offsets": [0.0, 10.0]}
    found = _pixels(_store(tmp_path / "a.zarr", values, attrs))
    assert np.array_equal(~found.valid[0], values[1] == 300)
    kept = found.valid[0]
    assert np.array_equal(found.values[0, 0][kept], values[0][kept])
    assert np.array_equal(found.values[0, 1][kept], values[1][kept] * 0.5 + 10)


@pytest.mark.parametrize(
    ("dtype", "value", "is_valid"),
    [
        ("uint16", 65535, True),
        ("int32", 2**24, True),
        ("int32", 2**24 + 1, False),
        ("uint32", 4_000_000_001, False),
        ("int64", 10**12, False),
        ("float32", 3e38, True),
        ("float64", 1e300, False),
        ("float32", np.inf, False),
    ],
)
def test_values_arrive_exactly_or_not_at_all(
    tmp_path: Path, dtype: str, value: float, is_valid: bool
) -> None:
    values = _values(dtype)
    values[0, 2, 3] = value
    found = _pixels(_store(tmp_path / "a.zarr", values, {}))
    assert bool(found.valid[0, 2, 3]) is is_valid
    assert found.values[0, 0, 2, 3] == (np.float32(value) if is_valid else 0)
    assert np.isfinite(found.values).all() and found.valid.sum() == SIDE * SIDE - (not is_valid)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("fill", [0, None])
def test_chunks_that_were_never_written_are_missing(tmp_path: Path, zarr_format, fill) -> None:
    from domainssl.io.raster.zarr import open_cube

    path = write_cube(
        tmp_path / "a.zarr", _values("uint16")[None], ["VV", "VH"], times=None, chunk=8,
        zarr_format=zarr_format, as_variables=True,
    )  # fmt: skip
    for name in ("VV", "VH"):
        (path / name / ("c/1/0" if zarr_format == 3 else "1.0")).unlink()
    if fill is None and zarr_format == 2:
        for name in ("VV", "VH"):
            meta = (path / name / ".zarray").read_text()
            meta = meta.replace('"fill_value": 0', '"fill_value": null')
            (path / name / ".zarray").write_text(meta)
    found = _pixels(describe_zarr(str(path), ["VV", "VH"]))
    expected = np.ones((SIDE, SIDE), bool)
    expected[8:, :8] = False
    assert np.array_equal(found.valid[0], expected)
    assert np.array_equal(found.values[0], _values()[:2] * expected)
    assert open_cube(str(path)).missing_chunks("VV") == 1


@pytest.mark.parametrize("edge", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", ["affine", "gdal"])
def test_coordinates_of_corners_are_told_by_the_transform(tmp_path: Path, edge, order) -> None:
    found = _placed(tmp_path, LEFT + (np.arange(SIDE) + edge) * 10,
                    TOP - (np.arange(SIDE) + edge) * 10, order)  # fmt: skip
    assert (found.left, found.top, found.step) == (LEFT, TOP, 10.0)


def test_float32_coordinates_are_as_exact_as_they_can_be(tmp_path: Path) -> None:
    x, y = LEFT + 3 + (np.arange(SIDE) + 0.5) * 2, 5_300_001.5 - (np.arange(SIDE) + 0.5) * 2
    exact = _placed(tmp_path, x.astype("float32"), y.astype("float32"), [2, 0, LEFT + 3, 0, -2,
                                                                         5_300_001.5])  # fmt: skip
    assert (exact.left, exact.top, exact.step) == (LEFT + 3, 5_300_001.5, 2.0)
    alone = _placed(tmp_path, x.astype("float32"), y.astype("float32"), None)
    assert alone.step == 2.0
    assert abs(alone.left - LEFT - 3) < 0.1 and abs(alone.top - 5_300_001.5) < 0.6


def test_a_transform_that_does_not_fit_is_told(tmp_path: Path, caplog) -> None:
    x, y = LEFT + (np.arange(SIDE) + 0.5) * 10, TOP - (np.arange(SIDE) + 0.5) * 10
    found = _placed(tmp_path, x, y, [10, 0, LEFT + 70, 0, -10, TOP])
    assert found.left == LEFT and "does not fit the coordinates" in caplog.text


def _placed(path: Path, x: Any, y: Any, transform: Any) -> Any:
    import zarr

    named = {"affine": [10, 0, LEFT, 0, -10, TOP, 0, 0, 1], "gdal": [LEFT, 10, 0, TOP, 0, -10]}
    if isinstance(transform, str):
        transform = named[transform]
    attrs = {"crs": "EPSG:32632", **({"transform": transform} if transform else {})}
    group = zarr.open_group(str(path / f"{transform is None}.zarr"), mode="w", zarr_format=3)
    for name, part, dims, more in (
        ("x", x, ["x"], {}), ("y", y, ["y"], {}), ("VV", np.ones((SIDE, SIDE)), ["y", "x"], attrs),
    ):  # fmt: skip
        array = group.create_array(
            name, shape=part.shape, dtype=part.dtype, dimension_names=dims, attributes=more
        )
        array[...] = part
    return describe_zarr(str(path / f"{transform is None}.zarr"), ["VV"]).bands[0].grid


def test_marks_far_below_digital_numbers_are_not_wrapped() -> None:
    values = np.full((1, 12, 2, 2), 1500, np.int16)
    values[0, 3, 0, 1] = -32768
    valid, _ = Validity(product("S2L2A")).settle(values, None)
    assert valid[0].tolist() == [[True, False], [True, True]]
    remove_offset(values[None], np.array([1000], np.int16))
    assert values.min() == 0 and values.max() == 500
