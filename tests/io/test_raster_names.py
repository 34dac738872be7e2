"""Names of bands as catalogues and tools write them, and what else lies in folders of rasters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cube_files import write_cube, write_geotiff

from domainssl.errors import DataError
from domainssl.io.raster.band_names import titles_or_none
from domainssl.io.raster.bands import describe_zarr
from domainssl.io.raster.geotiff import describe_geotiff
from domainssl.io.raster.sites import find_files
from domainssl.sensors import canonical_band

VALUES = np.arange(1, 1 + 2 * 256).reshape(2, 16, 16).astype("uint16")


@pytest.mark.parametrize(
    ("name", "band"),
    [("coastal", "B01"), ("rededge1", "B05"), ("Red Edge 2", "B06"), ("red-edge-3", "B07"),
     ("nir", "B08"), ("nir08", "B8A"), ("nir09", "B09"), ("cirrus", "B10"), ("swir16", "B11"),
     ("swir22", "B12"), ("b8a", "B8A"), ("B1", "B01"), ("vv", "VV"),
     ("20200501T101031_20200501T101031_T32TQM_B8A", "B8A")],
)  # fmt: skip
def test_names_of_catalogues_are_known(name: str, band: str) -> None:
    assert canonical_band(name) == band


@pytest.mark.parametrize(
    "titles",
    [["Band 1", "Band 2"], ["band_1", "band_2"], ["BANDS", "BANDS"], ["1", "2"], [None, None],
     ["Gray", "Undefined"], ["VV", "VV"], ["Layer_1", ""]],
)  # fmt: skip
def test_descriptions_that_repeat_or_say_nothing_are_none(tmp_path: Path, titles) -> None:
    assert titles_or_none(titles) is None
    path = write_geotiff(tmp_path / "a.tif", VALUES, titles, block=16)
    file = describe_geotiff(str(path), ["VV", "VH"])
    assert [(b.name, b.index) for b in file.bands] == [("VV", 0), ("VH", 1)]
    with pytest.raises(DataError, match=r"2 bands without names of their own, but 1 are wanted"):
        describe_geotiff(str(path), ["VV"])


def test_repeated_names_that_place_a_band_elsewhere_are_refused(tmp_path: Path) -> None:
    values = np.concatenate([VALUES, VALUES[:1]])
    path = write_geotiff(tmp_path / "a.tif", values, ["B02", "B03", "B03"], block=16)
    assert [
        b.index
        for b in describe_geotiff(
            str(path), ["B02", "B03", "B04"], names=["B02", "B03", "B04"]
        ).bands
    ] == [0, 1, 2]
    with pytest.raises(DataError, match=r"repeat .*band 3 is called 'B03' where 'B04' would be"):
        describe_geotiff(str(path), ["B02", "B03", "B04"])


def test_names_that_only_count_are_taken_in_the_order_asked_for(tmp_path: Path) -> None:
    titles = [f"Band {number}" for number in range(1, 5)]  # Band 2 is not B02 here
    path = write_geotiff(tmp_path / "a.tif", np.concatenate([VALUES, VALUES]), titles, block=16)
    file = describe_geotiff(str(path), ["B02", "B03", "B04", "B08"])
    assert [(b.name, b.index) for b in file.bands] == [
        ("B02", 0),
        ("B03", 1),
        ("B04", 2),
        ("B08", 3),
    ]


@pytest.mark.parametrize("of_band", [True, False])
def test_fields_name_bands_that_have_no_description(tmp_path: Path, of_band: bool) -> None:
    import rasterio

    path = write_geotiff(tmp_path / "a.tif", VALUES, None, block=16)
    with rasterio.open(path, "r+") as file:
        for number, name in ((1, "B8"), (2, "B2")):
            if of_band:
                file.update_tags(number, BANDNAME=name)
            else:  # as ENVI's headers are carried over
                file.update_tags(**{f"Band_{number}": name})
    assert [b.index for b in describe_geotiff(str(path), ["B02", "B08"]).bands] == [1, 0]


def test_a_band_of_another_name_comes_with_a_remedy(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.tif", VALUES, ["B02: Blue", None], block=16)
    with pytest.raises(
        DataError, match=r"and 1 without a name\. If it is there under another name"
    ):
        describe_geotiff(str(path), ["B02"])


def test_numbered_bands_of_a_store_are_taken_in_order(tmp_path: Path) -> None:
    path = write_cube(tmp_path / "a.zarr", VALUES[None], ["1", "2"], times=None)
    found = describe_zarr(str(path), ["VH", "VV"])
    assert [(b.name, b.index) for b in found.bands] == [("VH", 0), ("VV", 1)]
    assert [b.index for b in describe_zarr(str(path), ["2"]).bands] == [1]


@pytest.mark.parametrize("pattern", ["s2", "s2/{site}_{date}*", "s2/*"])
def test_sidecars_hidden_files_and_other_formats_are_passed_over(tmp_path: Path, pattern) -> None:
    folder = tmp_path / "s2"
    path = write_geotiff(folder / "a_20200501.tif", VALUES, ["B02", "B03"], block=16)
    for name in ("a_20200501.tif.aux.xml", "._a_20200501.tif", ".DS_Store", "a_20200501.tif.ovr",
                 "a_20200501.jp2", "a_20200501_notes.txt"):  # fmt: skip
        (folder / name).write_bytes(b"\0\5\26\7 something else")
    found = find_files(str(tmp_path), pattern, "")
    assert [f.path for files in found.values() for f in files] == [str(path)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.nc", "netCDF"), ("a.jp2", "JPEG 2000"), ("a.vrt", "VRT"), ("a.h5", "HDF5")],
)
@pytest.mark.parametrize("pattern", ["s2", "s2/{site}.*"])
def test_formats_that_are_not_read_are_named(tmp_path: Path, name, kind, pattern) -> None:
    (tmp_path / "s2").mkdir()
    (tmp_path / "s2" / name).write_bytes(b"some bytes")
    with pytest.raises(DataError, match=rf"{name}: {kind} is not read. Zarr stores .* GeoTIFF"):
        find_files(str(tmp_path), pattern, "")


@pytest.mark.parametrize("pattern", ["s2", "s2/{site}.tif"])
def test_links_are_followed_and_dangling_ones_named(tmp_path: Path, pattern) -> None:
    path = write_geotiff(tmp_path / "a.tif", VALUES, None, block=16)
    (tmp_path / "s2").mkdir()
    (tmp_path / "s2" / "b.tif").symlink_to(path)
    assert list(find_files(str(tmp_path), pattern, "")) == ["b"]
    (tmp_path / "s2" / "c.tif").symlink_to(tmp_path / "gone.tif")
    with pytest.raises(DataError, match=r"c\.tif: a link to '.*gone\.tif', which does not exist"):
        find_files(str(tmp_path), pattern, "")


def test_variables_may_stand_in_the_root_of_a_store(tmp_path: Path) -> None:
    path = write_cube(
        tmp_path / "a.zarr", VALUES[None], ["VV", "VH"], times=None, as_variables=True
    )
    write_cube(tmp_path / "b.zarr", VALUES[None], ["VV", "VH"], times=None)
    assert find_files(str(path), "s1", "")["a"][0].group == ""
    found = find_files(str(tmp_path / "b.zarr"), "values", "")["b"][0]
    file = describe_zarr(found.path, ["VV", "VH"], group=found.group)
    assert [(b.array, b.index) for b in file.bands] == [("values", 0), ("values", 1)]
