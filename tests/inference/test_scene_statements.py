"""What rasters say of themselves, or do not, where `embed` and `predict` read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cube_files import LEFT, TIMES, TOP, coded, write_cube, write_geotiff

from domainssl.backbones.vit import ViTBackbone
from domainssl.errors import ConfigError, DataError
from domainssl.inference.inputs import find_inputs, is_raster
from domainssl.inference.scenes import SceneOptions, open_scene
from domainssl.inference.tokens import TokenWindows
from domainssl.sensors import canonical_band, unit_in_name

BANDS = ("B02", "B03", "B04")
CARD: dict[str, Any] = {
    "s1": {"channels": ("VV", "VH"), "value_unit": "db", "mean": (-10.0,) * 2, "std": (5.0,) * 2,
           "valid_range": (-60.0, 40.0)},
    "s2": {"channels": BANDS, "value_unit": "dn", "mean": (2000.0,) * 3, "std": (1500.0,) * 3,
           "valid_range": (-1000.0, 32767.0)},
}  # fmt: skip
SIDE = 32


def backbone(name: str) -> ViTBackbone:
    modality = {"kind": "image", "size": (SIDE, SIDE), "gsd_m": 10.0, **CARD[name]}
    return ViTBackbone({name: modality}, {"width": 12, "depth": 1, "heads": 2}, patch_size=8)


def read(path: Path, name: str = "s2", **options: Any) -> tuple[Any, Any]:
    """Return values (C, H, W) and validity (H, W) as the backbone gets them."""
    scene = open_scene(str(path), backbone(name), SceneOptions(**options))
    windows = TokenWindows(feature=name, sizes={name: (SIDE, SIDE)}, grid=(4, 4), dim=12)
    batch = scene.read(windows, (slice(0, 4), slice(0, 4)))
    return batch[name][0].numpy(), batch[f"{name}.valid"][0].numpy()


def numbers() -> Any:
    return coded(1, 3, SIDE)[0].astype(np.uint16)


def radar() -> Any:
    return np.stack([-10 - coded(1, 1, SIDE)[0, 0] % 7, -16 - coded(1, 1, SIDE)[0, 0] % 5]) / 1.0


def edit(path: Path, **facts: Any) -> Path:
    import rasterio

    with rasterio.open(path, "r+") as file:
        for name, value in facts.items():
            setattr(file, name, value)
    return path


def test_bands_of_snap_are_known_by_name_and_unit(tmp_path: Path) -> None:
    assert [canonical_band(n) for n in ("Sigma0_VV_db", "Gamma0_VH", "VV_dB", "sigma0-hv")] == [
        "VV", "VH", "VV", "HV",
    ]  # fmt: skip
    assert [unit_in_name(n) for n in ("Sigma0_VV_db", "VH_dB", "Gamma0_VH", "feedback")] == [
        "dB", "dB", "", "",
    ]  # fmt: skip
    path = write_geotiff(tmp_path / "s.tif", radar(), ("Sigma0_VH_db", "Sigma0_VV_db"))
    np.testing.assert_array_equal(read(path, "s1")[0], radar()[::-1])
    both = write_geotiff(tmp_path / "b.tif", np.tile(radar(), (2, 1, 1))[:3],
                         ("Sigma0_VV", "Sigma0_VH", "Sigma0_VV_db"))  # fmt: skip
    with pytest.raises(DataError, match=r"'VV' is there 2 times \(Sigma0_VV, Sigma0_VV_db\)"):
        read(both, "s1", stored_unit="db")


def test_colours_are_names_unless_writers_give_them_in_passing(tmp_path: Path) -> None:
    import rasterio
    from rasterio.transform import from_origin

    values = numbers()
    facts = {
        "driver": "GTiff", "count": 3, "height": SIDE, "width": SIDE, "crs": "EPSG:32632",
        "transform": from_origin(LEFT, TOP, 10, 10), "photometric": "rgb",
    }  # fmt: skip
    for dtype in ("uint16", "uint8"):
        with rasterio.open(tmp_path / f"{dtype}.tif", "w", dtype=dtype, **facts) as file:
            file.write((values % 256).astype(dtype))
    found = read(tmp_path / "uint16.tif", stored_unit="dn")[0]
    np.testing.assert_array_equal(found, (values % 256)[::-1])
    found = read(tmp_path / "uint8.tif", stored_unit="dn")[0]
    np.testing.assert_array_equal(found, values % 256)
    with pytest.raises(DataError, match=r"one byte.*--stored_unit dn takes them"):
        read(tmp_path / "uint8.tif")


@pytest.mark.parametrize(
    ("name", "values", "unit", "said"),
    [
        ("s1", 10 ** (radar() / 10), "db", r"linear power. Set --stored_unit linear"),
        ("s1", radar() * 100, "db", r"\[-2000, -1000\].*nothing measures them"),
        ("s2", numbers().astype(np.float32), "reflectance", r"nothing measures them"),
        ("s2", numbers() / np.float32(1e4), "dn", r"seem to be reflectance. Set --stored_unit ref"),
    ],
)
def test_values_of_another_unit_are_refused(
    tmp_path: Path, name: str, values: Any, unit: str, said: str
) -> None:
    path = write_geotiff(tmp_path / "a.tif", values, CARD[name]["channels"])
    with pytest.raises(DataError, match=said):
        read(path, name, stored_unit=unit)
    assert read(path, name, stored_unit=unit, any_unit=True)[1].all()


def test_units_are_looked_at_where_there_is_data(tmp_path: Path) -> None:
    """The four parts that are looked at first lay in a border without data: all passed."""
    side = 512
    values = np.full((2, side, side), np.nan, np.float32)
    values[:, 200:216, 470:486] = np.resize(radar(), (2, 16, 16)) * 100
    path = write_geotiff(tmp_path / "a.tif", values, ("VV", "VH"))
    with pytest.raises(DataError, match=r"nothing measures them"):
        read(path, "s1", stored_unit="db")


def test_a_raster_without_a_valid_pixel_is_told(tmp_path: Path, caplog: Any) -> None:
    path = write_geotiff(tmp_path / "a.tif", radar(), ("VV", "VH"))
    assert not read(path, "s1", stored_unit="linear")[1].any()
    assert "no valid pixel of s1" in caplog.text and "--stored_unit linear" in caplog.text


def test_a_scale_without_the_offset_of_its_baseline_is_asked_for(tmp_path: Path) -> None:
    name = "S2A_MSIL2A_20230301T100031_N0509_R122_T32TQM_20230301T124512.tif"
    bright = edit(write_geotiff(tmp_path / name, numbers() + 1000, BANDS), scales=(1e-4,) * 3)
    with pytest.raises(DataError, match=r"baseline 05.09.*gdal_edit.py -offset -0.1"):
        read(bright)
    edit(bright, offsets=(-0.1,) * 3)
    np.testing.assert_allclose(read(bright)[0], numbers(), atol=1e-2)
    dark = write_geotiff(tmp_path / "more" / name, numbers(), BANDS)
    np.testing.assert_allclose(read(edit(dark, scales=(1e-4,) * 3))[0], numbers(), atol=1e-2)
    tagged = write_geotiff(tmp_path / "b.tif", numbers() + 1000, BANDS)
    import rasterio

    with rasterio.open(tagged, "r+") as file:
        file.update_tags(PROCESSING_BASELINE="04.00")  # as gdal_translate of a product leaves it
    np.testing.assert_array_equal(read(tagged, stored_unit="baseline")[0], numbers())


def test_places_that_nobody_states_are_told_with_what_there_is(tmp_path: Path) -> None:
    import rasterio
    from rasterio.control import GroundControlPoint
    from rasterio.rpc import RPC

    plain = {"driver": "GTiff", "count": 3, "height": SIDE, "width": SIDE, "dtype": "uint16"}
    corners = [
        GroundControlPoint(row=r, col=c, x=LEFT + 10 * c, y=TOP - 10 * r)
        for r, c in ((0, 0), (0, SIDE), (SIDE, 0))
    ]
    with rasterio.open(tmp_path / "g.tif", "w", **plain) as file:
        file.write(numbers())
        file.gcps = (corners, rasterio.crs.CRS.from_epsg(32632))
    one = [1.0] + [0.0] * 19
    with rasterio.open(tmp_path / "r.tif", "w", **plain) as file:
        file.write(numbers())
        file.rpcs = RPC(0, 1, 45, 1, one, one, 16, 16, 9, 1, one, one, 16, 16, None, None)
    for number in (float("nan"), 1e18):
        far = write_geotiff(tmp_path / "far.tif", numbers(), BANDS)
        edit(far, transform=rasterio.Affine(10, 0, number, 0, -10, TOP))
        with pytest.raises(DataError, match="not finite, or so far from the origin"):
            read(far)
    for name, what in (("g", "ground control points"), ("r", "RPC")):
        with pytest.raises(DataError, match=f"no transform but .*{what}"):
            read(tmp_path / f"{name}.tif")


def test_entries_of_one_time_are_one_date(tmp_path: Path) -> None:
    values = coded(3, 3, SIDE)
    values[0, :, :, 20:] = 0  # two granules that each cover a part
    values[1, :, :, :20] = 0
    times = np.array(["2021-03-01T10:00", "2021-03-01T10:00", "2021-05-02"], "datetime64[s]")
    path = write_cube(tmp_path / "a.zarr", values, BANDS, times=times)
    for date in ("first", "2021-03-01", "2021-03-01T10:00"):
        found, valid = read(path, date=date)
        assert valid.all()
        np.testing.assert_array_equal(found, np.where(values[0] > 0, values[0], values[1]))
    with pytest.raises(ConfigError, match=r"2 dates \(2021-03-01, 2021-05-02\)"):
        read(path)
    others = write_cube(tmp_path / "b.zarr", values[:2], BANDS,
                        times=TIMES[0] + np.array([0, 3600], "timedelta64[s]"))  # fmt: skip
    with pytest.raises(ConfigError, match=r"2021-03-01T00:00:00, 2021-03-01T01:00:00"):
        read(others, date="2021-03-01")
    assert read(others, date="2021-03-01T01:00", stored_unit="dn")[1].mean() == 12 / 32


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("x_20200501", "2020-05-01T00:00:00"),
        ("x_2020-05-01_20200501", "2020-05-01T00:00:00"),
        ("x_20200501_20200601", ""),
        ("x_20201301", ""),
        ("x120200501", ""),
    ],
)
def test_a_single_raster_has_the_day_that_its_name_holds(
    tmp_path: Path, name: str, day: str
) -> None:
    path = write_geotiff(tmp_path / f"{name}.tif", radar(), ("VV_dB", "VH_dB"))
    scene = open_scene(str(path), backbone("s1"), SceneOptions())
    assert scene.date == day
    windows = TokenWindows(feature="s1", sizes={"s1": (SIDE, SIDE)}, grid=(4, 4), dim=12)
    batch = scene.read(windows, (slice(0, 4), slice(0, 4)))
    assert ("s1.dates" in batch) == bool(day)


def test_numbers_of_another_sign_and_other_formats_are_named(tmp_path: Path) -> None:
    odd = write_cube(tmp_path / "a.zarr", coded(1, 3, SIDE).astype(np.int16), BANDS, times=None,
                     as_variables=True, attrs={"_Unsigned": "true"})  # fmt: skip
    with pytest.raises(DataError, match=r"int16 numbers, of which _Unsigned is 'true'"):
        read(odd)
    (tmp_path / "a.vrt").write_text("<VRTDataset/>")
    with pytest.raises(DataError, match=r"VRT is not read.*gdal_translate"):
        find_inputs(tmp_path / "a.vrt", ["s2"], is_raster, "a raster")


def test_options_of_embed_are_named_beside_those_of_runs(tmp_path: Path) -> None:
    import rasterio

    path = write_geotiff(tmp_path / "a.tif", numbers(), BANDS)
    with rasterio.open(path) as file:
        facts = {**file.profile, "crs": None}
    with rasterio.open(tmp_path / "n.tif", "w", **facts) as file:
        file.write(numbers())
    with pytest.raises(DataError, match=r"modalities.<name>.crs, or --crs of embed and predict"):
        read(tmp_path / "n.tif")
    np.testing.assert_array_equal(read(tmp_path / "n.tif", crs="EPSG:32632")[0], numbers())
    with pytest.raises(DataError, match=r"--crs of embed and predict: EPSG:99999 is no coordinate"):
        read(tmp_path / "n.tif", crs="EPSG:99999")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ({"crs": "EPSG:32633"}, r"--crs EPSG:32633: .*a.tif states EPSG:32632"),
        ({"group": "x"}, r"--group x: is a folder in a Zarr store"),
        ({"mask": "scl", "bands": BANDS}, r"--mask scl: is an array of a Zarr store"),
        ({"date": "2020-01-01"}, r"a.tif is one image, whose date neither the file nor its name"),
        ({"max_dates": 2}, r"--max_dates 2: limits the dates of a series"),
        ({"stored_unit": "s1=db,s2=dn"}, r"--stored_unit s1=db: there is no modality 's1'"),
    ],
)
def test_what_is_said_and_cannot_count_is_refused(
    tmp_path: Path, said: dict[str, Any], answer: str
) -> None:
    """Such options were passed over without a message."""
    path = write_geotiff(tmp_path / "a.tif", numbers(), BANDS)
    with pytest.raises(ConfigError, match=answer):
        read(path, **said)


def setup_module() -> None:
    torch.manual_seed(0)
