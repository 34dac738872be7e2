"""Windows of cubes and GeoTIFF: right pixels, right places, right masks, whatever the layout."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyproj
import pytest
import rasterio
import torch
from cube_files import LEFT, TIMES, TOP, coded, expected_codes, write_cube, write_geotiff

from domainssl.datamodules import SentinelCubeDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.io.raster.grid import Bounds
from domainssl.loading.source import Loading
from domainssl.modality import check_batch
from domainssl.sources.cube_blocks import Block, overlapping
from domainssl.sources.cube_options import Labels, Layer, Mask
from domainssl.sources.dates import Dates
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window

STILL: dict[str, Any] = {"jitter": False, "flips": False, "quarter_turns": False}
NOTHING_HELD = HeldOut(val_fraction=0)

SIDE = 96
LAYERS = {
    "s1": Layer(bands=("VV", "VH"), value_unit="db", stored_unit="db"),
    "s2": Layer(bands=("B02", "B03", "B04"), value_unit="dn"),
}
WINDOWS = Window(size=160, unit="m")
S2_TIMES = TIMES + np.timedelta64(2, "D")


def module(root: Any, **changes: Any) -> SentinelCubeDataModule:
    options: dict[str, Any] = {
        "modalities": LAYERS,
        "global_batch_size": 4,
        "window": WINDOWS,
        "held_out": HeldOut(val_fraction=0.2),
        "loading": Loading(workers=0),
        **changes,
    }
    data = SentinelCubeDataModule(root=str(root), **options)
    data.setup("fit")
    return data


def batches(data: SentinelCubeDataModule, epoch: int = 0) -> list[dict[str, Any]]:
    data.epoch = epoch
    return list(data.train_dataloader())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    s1 = coded(4, 2, SIDE).astype(np.float32)
    write_cube(root / "s1" / "here.zarr", s1, ("vv", "vh"), as_variables=True)
    write_cube(root / "s2" / "here.zarr", coded(4, 3, SIDE).astype(np.uint16),
               ("B02", "B03", "B04"), times=S2_TIMES, shards=True)  # fmt: skip
    return root


def check_places(data: SentinelCubeDataModule, found: list[dict[str, Any]]) -> int:
    """Compare every pixel with the code of its place, date and band; return the items seen."""
    seen = 0
    for batch in found:
        check_batch(batch, data.modalities, training=True)
        for name, times in (("s1", TIMES), ("s2", S2_TIMES)):
            days = times.astype("datetime64[D]").astype(int).tolist()
            for i, geo in enumerate(batch[f"{name}.geo"]):
                date = days.index(int(batch[f"{name}.dates"][i]))
                for band in range(batch[name].shape[1]):
                    expected = expected_codes(geo, batch[name].shape[-1], date, band)
                    assert np.array_equal(batch[name][i, band].numpy(), expected)
                seen += 1
    return seen


def test_every_pixel_is_that_of_its_place_date_and_band(pair):
    data = module(pair)
    found = batches(data)
    assert check_places(data, found) == 2 * 4 * len(found) > 0
    geo = {tuple(sorted(g.items())) for batch in found for g in batch["s2.geo"]}
    assert len(geo) == 4 * len(found)  # every window lies elsewhere


@pytest.mark.parametrize(
    "options",
    [
        {"zarr_format": 2},
        {"ascending": True},
        {"as_variables": True},
        {"dims": ("t", "channel", "latitude", "longitude")},
        {"chunk": 7},
        {"shards": True, "chunk": 16},
    ],
    ids=str,
)
def test_layouts_of_stores_make_no_difference(pair, tmp_path, options):
    (tmp_path / "s1").symlink_to(pair / "s1")
    write_cube(tmp_path / "s2" / "here.zarr", coded(4, 3, SIDE).astype(np.int16),
               ("b2", "green", "B4"), times=S2_TIMES, **options)  # fmt: skip
    data = module(tmp_path)
    assert check_places(data, batches(data)) > 0


def test_layers_may_be_groups_of_one_store_behind_a_url(tmp_path):
    import fsspec

    for name, bands, times in (("s1", ("VV", "VH"), TIMES),
                               ("s2", ("B02", "B03", "B04"), S2_TIMES)):  # fmt: skip
        values = coded(4, len(bands), SIDE).astype(np.float32 if name == "s1" else np.uint16)
        write_cube(tmp_path / "cube.zarr", values, bands, times=times, group=name)
    target = fsspec.filesystem("memory")
    target.put(str(tmp_path / "cube.zarr"), "/cubes/cube.zarr", recursive=True)
    data = module("memory://cubes/cube.zarr")
    assert check_places(data, batches(data)) > 0
    target.rm("/cubes", recursive=True)


def test_windows_cover_the_same_ground_at_different_resolutions(pair, tmp_path):
    (tmp_path / "s1").symlink_to(pair / "s1")
    coarse = coded(4, 3, SIDE // 2, step=20.0)
    write_cube(tmp_path / "s2" / "here.zarr", coarse.astype(np.uint16),
               ("B02", "B03", "B04"), times=S2_TIMES, step=20.0)  # fmt: skip
    layers = {**LAYERS, "s2": Layer(bands=LAYERS["s2"].bands, gsd_m=20.0)}
    data = module(tmp_path, modalities=layers)
    batch = batches(data)[0]
    assert batch["s1"].shape[-1] == 16 and batch["s2"].shape[-1] == 8
    for fine, wide in zip(batch["s1.geo"], batch["s2.geo"], strict=True):
        assert (fine["c"], fine["f"]) == (wide["c"], wide["f"])
        assert abs(wide["a"] + wide["b"]) == 2 * abs(fine["a"] + fine["b"])
    assert check_places(data, [batch]) > 0


def test_coarser_bands_are_repeated_and_finer_ones_averaged(tmp_path):
    fine = np.arange(48 * 48, dtype=np.float32).reshape(1, 1, 48, 48)
    write_cube(tmp_path / "a.zarr", fine, ("b5",), times=None, as_variables=True)
    for gsd, expected in ((10.0, fine[0, 0]), (20.0, _mean2(fine[0, 0])),
                          (5.0, fine[0, 0].repeat(2, 0).repeat(2, 1))):  # fmt: skip
        layers = {"x": Layer(bands=("B05",), path="a.zarr", value_unit="arbitrary", gsd_m=gsd)}
        data = module(tmp_path, modalities=layers, window=Window(size=480, unit="m", **STILL),
                      held_out=NOTHING_HELD, global_batch_size=1)  # fmt: skip
        assert np.allclose(batches(data)[0]["x"][0, 0].numpy(), expected)


def _mean2(values):
    return values.reshape(24, 2, 24, 2).mean((1, 3))


def test_scale_offset_and_fill_count_once(tmp_path):
    stored = np.full((1, 1, 32, 32), 11000, np.uint16)
    stored[..., 0, :2] = (0, 1000)
    attrs = {"scale_factor": 1e-4, "add_offset": -0.1, "_FillValue": 0}
    write_cube(tmp_path / "x.zarr", stored, ("B02",), times=None, attrs=attrs)
    for unit, ones in (("reflectance", 1.0), ("dn", 10_000.0)):
        layers = {"s2": Layer(bands=("B02",), path="x.zarr", value_unit=unit)}
        data = module(tmp_path, modalities=layers, window=Window(size=320, unit="m", **STILL),
                      held_out=NOTHING_HELD, global_batch_size=1)  # fmt: skip
        batch = batches(data)[0]
        assert batch["s2"][0, 0, 0, :3].tolist() == [0.0, 0.0, ones]
        assert batch["s2.valid"][0, 0, :3].tolist() == [False, True, True]
        assert batch["s2.valid"].sum() == 32 * 32 - 1


def test_nodata_nan_mask_and_range_make_pixels_invalid(tmp_path):
    stored = np.full((1, 1, 32, 32), 500.0, np.float32)
    stored[0, 0, 0, :4] = (np.nan, -9999.0, 70_000.0, np.inf)
    scl = np.full((1, 32, 32), 4, np.uint8)
    scl[0, 1, 0] = 9
    attrs = {"nodata": -9999.0, "_FillValue": "AAAAAAAA+H8=", "valid_max": 65535}
    write_cube(tmp_path / "x.zarr", stored, ("B02",), times=None, attrs=attrs, mask=scl)
    layers = {
        "s2": Layer(
            bands=("B02",),
            path="x.zarr",
            value_unit="dn",
            stored_unit="dn",
            mask=Mask("scl", (8, 9)),
        )
    }
    data = module(tmp_path, modalities=layers, window=Window(size=320, unit="m", **STILL),
                  held_out=NOTHING_HELD, global_batch_size=1)  # fmt: skip
    batch = batches(data)[0]
    valid = batch["s2.valid"][0]
    assert not valid[0, :4].any() and not valid[1, 0] and valid.sum() == 32 * 32 - 5
    assert batch["s2"].isfinite().all() and batch["s2"][0, 0, 1, 0] == 0


@pytest.mark.parametrize("suffix", [".tif", ".zarr"])
@pytest.mark.parametrize("nodata", [-9999, [-9999.0, -1.0]])
def test_a_layer_declares_missing_values_that_no_file_does(tmp_path, suffix, nodata):
    stored = np.full((1, 1, 32, 32), -12.0, np.float32)
    stored[0, 0, 3] = -9999
    if suffix == ".tif":
        write_geotiff(tmp_path / "x.tif", stored[0], ("VV",))
    else:
        write_cube(tmp_path / "x.zarr", stored, ("VV",), times=None)
    layers = {
        "s1": Layer(
            bands=("VV",), path=f"x{suffix}", value_unit="db", stored_unit="db", nodata=nodata
        )
    }
    data = module(tmp_path, modalities=layers, window=Window(size=320, unit="m", **STILL),
                  held_out=NOTHING_HELD, global_batch_size=1)  # fmt: skip
    batch = batches(data)[0]
    assert not batch["s1.valid"][0, 3].any() and batch["s1.valid"].sum() == 31 * 32
    assert batch["s1"].min() == -12


def test_a_modality_that_is_never_valid_ends_the_run(tmp_path):
    stored = np.full((1, 1, 32, 32), -9999.0, np.float32)
    write_cube(tmp_path / "x.zarr", stored, ("VV",), times=None, attrs={"nodata": -9999})
    layers = {"s1": Layer(bands=("VV",), path="x.zarr", value_unit="db", stored_unit="db")}
    data = module(tmp_path, modalities=layers, window=Window(size=320, unit="m", **STILL),
                  held_out=NOTHING_HELD, global_batch_size=1)  # fmt: skip
    with pytest.raises(DataError, match="s1: not one pixel is valid in 1 train batches"):
        batches(data)


@pytest.mark.parametrize(
    ("stored_unit", "value"), [("linear", 0.01), ("amplitude", 0.1), ("db", -20.0)]
)
def test_backscatter_is_delivered_in_db(tmp_path, stored_unit, value):
    stored = np.full((1, 1, 32, 32), value, np.float32)
    stored[0, 0, 0, 0] = np.nan if stored_unit == "db" else 0.0
    write_cube(tmp_path / "x.zarr", stored, ("VV",), times=None)
    layers = {"s1": Layer(bands=("VV",), path="x.zarr", value_unit="db", stored_unit=stored_unit)}
    data = module(tmp_path, modalities=layers, window=Window(size=320, unit="m", **STILL),
                  held_out=NOTHING_HELD, global_batch_size=1)  # fmt: skip
    batch = batches(data)[0]
    assert torch.allclose(batch["s1"][0, 0, 1:], torch.tensor(-20.0), atol=1e-5)
    assert not batch["s1.valid"][0, 0, 0] and batch["s1"][0, 0, 0, 0] == 0


@pytest.mark.parametrize("kind", ["tif", "zarr", "scaled"])
def test_processing_baselines_of_one_series_have_their_own_offset(tmp_path, kind):
    ground = np.broadcast_to(coded(1, 1, 32)[0], (2, 1, 32, 32))
    stored = (ground + np.array([0, 1000]).reshape(2, 1, 1, 1)).astype(np.uint16)
    if kind == "zarr":
        import zarr

        write_cube(tmp_path / "s2.zarr", stored, ("B02",), times=TIMES[:2], zarr_format=2)
        versions = zarr.open_group(str(tmp_path / "s2.zarr"), mode="a").create_array(
            "s2:processing_baseline", shape=2, dtype="<U5"
        )
        versions[...] = np.array(["03.01", "04.00"])
        versions.attrs["_ARRAY_DIMENSIONS"] = ["time"]
        path = "s2.zarr"
    else:
        for at, name in enumerate(("20211220T101031_N0301", "20220305T101031_N0400")):
            file = write_geotiff(tmp_path / f"S2A_MSIL2A_{name}_R022_T32.tif", stored[at], ("B02",))
            if kind == "scaled":
                with rasterio.open(file, "r+") as opened:
                    opened.scales, opened.offsets = (1e-4,), (-0.1 * at,)
        path = "S2?_MSIL2A_{date}_N*_R*_{site}.tif"

    def values(unit):
        layers = {"s2": Layer(bands=("B02",), path=path, value_unit="dn", stored_unit=unit)}
        window = Window(size=320, unit="m", **STILL)
        data = module(tmp_path, modalities=layers, window=window, held_out=NOTHING_HELD,
                      dates=Dates(mode="all"), global_batch_size=1)  # fmt: skip
        return batches(data)[0]["s2"][0].numpy()

    if kind == "scaled":  # each file states its own
        assert np.allclose(values("auto"), ground, atol=1e-3)
        return
    for unit in ("auto", "dn+1000"):
        with pytest.raises(DataError, match=r"04\.00 .* one series.*stored_unit to baseline"):
            values(unit)
    assert np.array_equal(values("baseline"), ground)
    assert np.array_equal(values("dn"), stored)


def test_scales_that_differ_by_date_are_refused(tmp_path):
    write_cube(tmp_path / "x.zarr", coded(2, 1, 32).astype(np.uint16), ("B02",), times=TIMES[:2],
               attrs={"scale_factor": [1e-4, 1e-3]})  # fmt: skip
    with pytest.raises(DataError, match="several numbers"):
        module(tmp_path, modalities={"s2": Layer(bands=("B02",), path="x.zarr")})


def test_numbers_without_a_unit_are_refused(tmp_path):
    write_cube(tmp_path / "x.zarr", np.ones((1, 1, 32, 32), np.float32), ("VV",), times=None)
    with pytest.raises(DataError, match="does not say what its numbers are.*stored_unit"):
        module(tmp_path, modalities={"s1": Layer(bands=("VV",), path="x.zarr", value_unit="db")})


# ------------------------------------------------------------------------ GeoTIFF


@pytest.fixture(scope="module")
def tiffs(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiffs")
    for site, shift in (("north", 0.0), ("south", -5000.0)):
        s1, s2 = (coded(1, n, 64, top=TOP + shift)[0] for n in (2, 3))
        write_geotiff(root / "S1" / f"{site}_S1.tif", s1.astype(np.float32), ("VV", "VH"),
                      top=TOP + shift, nodata=float("nan"))  # fmt: skip
        write_geotiff(root / "S2" / f"{site}_S2.tif", s2.astype(np.int16), None,
                      top=TOP + shift, nodata=0)  # fmt: skip
    return root


TIFF_LAYERS = {
    "s1": Layer(bands=("VV", "VH"), path="S1/{site}_S1.tif", value_unit="db", stored_unit="db"),
    "s2": Layer(bands=("B02", "B03", "B04"), path="S2/{site}_S2.tif", value_unit="dn"),
}


def test_geotiff_pairs_are_a_training_source(tiffs):
    data = module(tiffs, modalities=TIFF_LAYERS)
    found = batches(data)
    assert [site.name for site in data.sites] == ["north", "south"]
    seen = 0
    for batch in found:
        check_batch(batch, data.modalities, training=True)
        assert batch["s1.dates"].tolist() == [0] * 4  # unknown
        for name in ("s1", "s2"):
            for i, geo in enumerate(batch[f"{name}.geo"]):
                expected = expected_codes(geo, 16, 0, 1)
                assert np.array_equal(batch[name][i, 1].numpy(), expected)
                seen += 1
    assert seen


def test_dates_in_file_names_make_a_time_axis(tmp_path):
    for name, bands in (("s1", ("VV", "VH")), ("s2", ("B02", "B03", "B04"))):
        for date, time in enumerate(TIMES):
            values = coded(4, len(bands), 64)[date].astype(np.float32)
            stamp = str(time)[:10].replace("-", "")
            write_geotiff(tmp_path / "here" / f"{name}_{stamp}.tif", values, bands)
    layers = {
        "s1": Layer(
            bands=("VV", "VH"), path="{site}/s1_{date}.tif", value_unit="db", stored_unit="db"
        ),
        "s2": Layer(
            bands=("B02", "B03", "B04"),
            path="{site}/s2_{date}.tif",
            value_unit="dn",
            stored_unit="dn",
        ),
    }
    data = module(tmp_path, modalities=layers, dates=Dates(mode="all"), held_out=NOTHING_HELD)
    batch = batches(data)[0]
    days = TIMES.astype("datetime64[D]").astype(int).tolist()
    assert batch["s2.dates"].tolist() == [days] * 4 and batch["s2"].shape == (4, 4, 3, 16, 16)
    for date in range(4):
        expected = expected_codes(batch["s2.geo"][0], 16, date, 2)
        assert np.array_equal(batch["s2"][0, date, 2].numpy(), expected)


def test_files_of_one_time_that_name_their_bands_are_merged(tmp_path):
    whole = coded(1, 3, 32)[0].astype(np.uint16) + 1
    for part, name in enumerate("ab"):
        values = whole.copy()
        values[:, :, slice(16, None) if part == 0 else slice(0, 16)] = 0
        path = tmp_path / "s2" / f"T32_20210301T101031_{name}.tif"
        write_geotiff(path, values, ("B02", "B03", "B04"), nodata=0)
    layers = {"s2": Layer(bands=("B02", "B03", "B04"), path="s2/{site}_{date}_*.tif")}
    options = {"window": Window(size=320, unit="m", **STILL), "held_out": NOTHING_HELD}
    data = module(tmp_path, modalities=layers, global_batch_size=1, **options)
    [batch] = batches(data)
    assert batch["s2.valid"].all() and np.array_equal(batch["s2"][0].numpy(), whole)
    assert len(data.sites[0].layers["s2"].times) == 1


def test_a_file_per_band_is_joined_by_its_name_and_never_taken_for_a_date(tmp_path):
    bands = ("B02", "B03", "B04")
    for date, time in enumerate(TIMES[:2]):
        stamp = str(time)[:10].replace("-", "")
        for at, band in enumerate(bands):
            values = coded(2, 3, 32)[date, at : at + 1].astype(np.uint16)
            write_geotiff(tmp_path / "s2" / f"T32_{stamp}_{band}_10m.tif", values, None)
    options = {"window": Window(size=320, unit="m", **STILL), "held_out": NOTHING_HELD,
               "dates": Dates(mode="all"), "global_batch_size": 1}  # fmt: skip
    for path in ("s2/{site}_{date}_*_10m.tif", "s2/{site}_*.tif", "s2/*_{date}_{band}_*.tif"):
        if "{band}" in path:
            (tmp_path / "s2" / "T32_20210301_B02_20m.tif").symlink_to(
                tmp_path / "s2" / "T32_20210301_B02_10m.tif"
            )
        layers = {"s2": Layer(bands=("B02",), path=path)}
        with pytest.raises(DataError, match=r"(?s)one site.*T32_\w+_B0.*T32_\w+_B0.*\{site\}"):
            module(tmp_path, modalities=layers, **options)
    layers = {"s2": Layer(bands=("B04", "green"), path="s2/{site}_{date}_{band}_10m.tif")}
    batch = batches(module(tmp_path, modalities=layers, **options))[0]
    assert np.array_equal(batch["s2"][0].numpy(), coded(2, 3, 32)[:, [2, 1]])
    (tmp_path / "s2" / "T32_20210320_B04_10m.tif").unlink()
    with pytest.raises(DataError, match="T32_20210320_B0.*no file .* holds band 'B04'"):
        module(tmp_path, modalities=layers, **options)


def test_files_that_cannot_be_read_cost_their_date_or_their_site(tmp_path):
    """One damaged file of a site ended the run, whatever `on_bad_sample` said."""
    values = coded(1, 2, 32)[0].astype(np.uint16)
    names = ("a_20210301", "a_20210320", "b_20210301", "c_20210301")
    paths = {n: write_geotiff(tmp_path / "s2" / f"{n}.tif", values, ("B02", "B03")) for n in names}
    paths["a_20210320"].write_bytes(paths["a_20210320"].read_bytes()[:9])
    paths["b_20210301"].write_bytes(b"<!doctype html><title>404</title>")
    layers = {"s2": Layer(bands=("B02", "B03"), path="s2/{site}_{date}.tif")}
    options = {"window": Window(size=320, unit="m", **STILL), "held_out": NOTHING_HELD,
               "modalities": layers, "global_batch_size": 1}  # fmt: skip
    data = module(tmp_path, **options)
    assert [site.name for site in data.sites] == ["a", "c"]
    assert len(data.sites[0].layers["s2"].times) == 1
    date, page, *_ = data.problems
    assert "site a, a date is left out: " in date and "a_20210320.tif: the GeoTIFF cannot" in date
    assert "site b is left out: " in page and "a page of a web server" in page
    for name in ("a_20210301", "c_20210301"):
        paths[name].write_bytes(b"")
    with pytest.raises(DataError, match="no site can be used: site a is left out: .*GeoTIFF"):
        module(tmp_path, **options)


def test_a_damaged_chunk_does_not_end_a_run_before_it_begins(tmp_path):
    """A look at the offset of the first dates did."""
    for name in ("a", "b"):
        values = coded(1, 2, 32).astype(np.uint16)
        write_cube(tmp_path / "s2" / f"{name}.zarr", values, ("B02", "B03"), times=TIMES[:1])
    for chunk in (tmp_path / "s2" / "a.zarr" / "values" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"damaged")
    data = module(
        tmp_path, modalities={"s2": Layer(bands=("B02", "B03"))}, global_batch_size=1,
        window=Window(size=320, unit="m", **STILL), held_out=NOTHING_HELD, on_bad_sample="replace",
        loading=Loading(workers=0, max_bad_fraction=0.5),
    )  # fmt: skip
    assert [int(batch["s2"].max()) > 0 for batch in batches(data)] == [True, True]


# ------------------------------------------------------------------------ dates


def test_one_date_is_drawn_with_the_nearest_partner(pair):
    data = module(pair, dates=Dates(mode="one", max_gap_days=3))
    seen = set()
    for epoch in range(6):
        for batch in batches(data, epoch):
            assert (batch["s2.dates"] - batch["s1.dates"] == 2).all()
            seen |= set(batch["s1.dates"].tolist())
    assert len(seen) == 4


def test_dates_too_far_apart_are_refused(pair):
    with pytest.raises(DataError, match="no two dates of its layers lie within 1 days"):
        module(pair, dates=Dates(mode="one", max_gap_days=1))


def test_series_views_and_temporal_windows(pair):
    every = batches(module(pair, dates=Dates(mode="all")))[0]
    assert every["s1"].shape == (4, 4, 2, 16, 16) and every["s1.frames"].all()
    drawn = batches(module(pair, dates=Dates(mode="views", max_dates=2)))[0]["s2.dates"]
    assert drawn.shape == (4, 2) and (drawn.diff(dim=1) > 0).all()
    data = module(pair, dates=Dates(mode="all", span_days=40, end="2021-06-30"))
    for batch in batches(data):
        days = batch["s1.dates"][batch["s1.frames"]]
        assert days.max() < np.datetime64("2021-07-01").astype(int)
        for i in range(4):
            own = batch["s1.dates"][i][batch["s1.frames"][i]]
            assert own.max() - own.min() < 40


def test_entries_of_one_time_are_merged_pixel_by_pixel(tmp_path):
    values = coded(4, 2, 32).astype(np.uint16)
    values[1, :, :, 16:] = 0  # of two granules each shows a part, and both the middle
    values[3, :, :, :8] = 0
    times = np.array(["2021-05-02", "2021-03-01", "2021-06-01", "2021-03-01"], "datetime64[s]")
    attrs = {"_FillValue": 0}
    write_cube(tmp_path / "s2.zarr", values, ("B02", "B03"), times=times, attrs=attrs)
    layers = {"s2": Layer(bands=("B02", "B03"), path="s2.zarr")}
    data = module(tmp_path, modalities=layers, global_batch_size=1,
                  window=Window(size=320, unit="m", **STILL), held_out=NOTHING_HELD,
                  dates=Dates(mode="all"))  # fmt: skip
    batch = batches(data)[0]
    assert batch["s2.dates"][0].tolist() == sorted(set(times.astype("datetime64[D]").astype(int)))
    merged = np.where(np.arange(32) < 16, values[1], values[3])
    assert np.array_equal(batch["s2"][0].numpy(), [merged, values[0], values[2]])
    assert batch["s2.valid"].all()


def test_dates_that_show_nothing_are_passed_over(tmp_path):
    values = coded(4, 3, SIDE).astype(np.uint16)
    values[:3] = 0
    write_cube(tmp_path / "s2.zarr", values, ("B02", "B03", "B04"), attrs={"_FillValue": 0})
    layers = {"s2": Layer(bands=("B02", "B03", "B04"), path="s2.zarr")}
    for batch in batches(module(tmp_path, modalities=layers)):
        assert batch["s2.valid"].all()


# ------------------------------------------------------------------------ blocks and splits


def test_blocks_follow_chunks_so_that_nothing_is_decoded_twice(pair, caplog):
    data = module(pair)
    edges = {b.bounds.left for blocks in data.blocks.values() for b in blocks}
    assert all((edge - LEFT) % 320 == 0 for edge in edges)
    with caplog.at_level(logging.INFO, "domainssl.loading.stream"):
        stream = data.val_dataloader()
        list(stream)
    assert stream.read_amplification == 1.0
    assert "read amplification 1.00" in caplog.text


def test_only_the_chunks_of_a_block_are_read(pair):
    data = module(pair)
    stream = data.val_dataloader()
    list(stream)
    blocks = len(data.blocks["val"])
    assert stream.tally.bytes_decoded == blocks * 32 * 32 * (2 * 4 + 3 * 2)


def test_training_and_held_out_windows_share_no_pixel(pair):
    data = module(pair)
    assert not overlapping(data.sites, data.blocks["train"], data.blocks["val"]).any()
    held = [b.bounds for b in data.blocks["val"]]
    for epoch in range(3):
        for batch in batches(data, epoch):
            for geo in batch["s2.geo"]:
                xs = sorted((geo["c"], geo["c"] + 16 * (geo["a"] + geo["b"])))
                ys = sorted((geo["f"], geo["f"] + 16 * (geo["d"] + geo["e"])))
                assert all(
                    xs[1] <= b.left or xs[0] >= b.right or ys[1] <= b.bottom or ys[0] >= b.top
                    for b in held
                )


def test_overlapping_tiles_do_not_leak(tmp_path):
    for site, shift in (("a", 0.0), ("b", 320.0)):
        values = coded(1, 1, SIDE, left=LEFT + shift).astype(np.uint16)
        write_cube(tmp_path / "s2" / f"{site}.zarr", values, ("B02",), times=None,
                   left=LEFT + shift)  # fmt: skip
    data = module(
        tmp_path,
        modalities={"s2": Layer(bands=("B02",))},
        held_out=HeldOut(sites=("a",)),
        global_batch_size=1,
    )
    assert {b.site for b in data.blocks["val"]} == {0}
    assert all(b.bounds.left >= LEFT + SIDE * 10 for b in data.blocks["train"])


@pytest.mark.parametrize("kind", ["zarr", "tif"])
def test_a_site_that_is_there_twice_is_told(tmp_path, kind):
    values = coded(1, 3, SIDE)[0].astype(np.uint16)
    for name in ("here", "copy"):
        if kind == "zarr":
            write_cube(tmp_path / "s2" / f"{name}.zarr", values[None], LAYERS["s2"].bands,
                       times=S2_TIMES[:1])  # fmt: skip
        else:  # of dates that are not known
            write_geotiff(tmp_path / "s2" / f"{name}.tif", values, LAYERS["s2"].bands)
    [problem] = module(tmp_path, modalities={"s2": LAYERS["s2"]}, held_out=NOTHING_HELD).problems[
        :1
    ]
    assert ("here (as copy)" if kind == "zarr" else "here.tif (as ") in problem
    assert "count as often" in problem


def test_a_gap_keeps_training_away_from_held_out_blocks(pair):
    data = module(pair, held_out=HeldOut(val_fraction=0.1, gap=100.0))
    [held] = data.blocks["val"]
    for block in data.blocks["train"]:
        assert (
            block.bounds.left - held.bounds.right >= 100
            or held.bounds.left - block.bounds.right >= 100
            or block.bounds.bottom - held.bounds.top >= 100
            or held.bounds.bottom - block.bounds.top >= 100
        )


def test_large_chunks_are_cut_into_smaller_blocks(tmp_path):
    write_cube(tmp_path / "s2.zarr", coded(1, 1, SIDE).astype(np.uint16), ("B02",), times=None,
               chunk=SIDE)  # fmt: skip
    data = module(
        tmp_path,
        modalities={"s2": Layer(bands=("B02",), path="s2.zarr")},
        global_batch_size=1,
        window=Window(size=160, unit="m", per_block=2),
    )
    assert sum(len(blocks) for blocks in data.blocks.values()) == 9
    stream = data.val_dataloader()
    list(stream)
    assert stream.read_amplification == pytest.approx(9.0)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_and_their_start_method_change_nothing(pair, start_method):
    expected = batches(module(pair))
    data = module(pair, loading=Loading(workers=2, start_method=start_method))
    found = batches(data)
    data.teardown()
    for a, b in zip(expected, found, strict=True):
        assert a["id"] == b["id"] and torch.equal(a["s2"], b["s2"])


# ------------------------------------------------------------------------ labels and mistakes


def test_labels_are_the_most_frequent_class_of_a_window(tmp_path):
    write_cube(tmp_path / "s2" / "a.zarr", coded(1, 1, 64).astype(np.uint16), ("B02",), times=None)
    classes = np.zeros((1, 1, 64, 64), np.uint8)
    classes[..., 32:] = 2
    classes[..., :16, :16] = 255
    attrs = {"flag_values": [0, 2], "flag_meanings": "water crops", "_FillValue": 255}
    write_cube(tmp_path / "labels" / "a.zarr", classes, ("label",), times=None,
               as_variables=True, attrs=attrs)  # fmt: skip
    still = Window(size=160, unit="m", jitter=False)
    data = module(tmp_path, modalities={"s2": Layer(bands=("B02",))}, held_out=NOTHING_HELD,
                  window=still, global_batch_size=16)  # fmt: skip
    assert data.label_names == ("water", "class 1", "crops") and data.num_classes == 3
    [batch] = batches(data)
    for geo, label in zip(batch["s2.geo"], batch["label"].tolist(), strict=True):
        x = geo["c"] + 8 * (geo["a"] + geo["b"]) - LEFT
        y = TOP - geo["f"] - 8 * (geo["d"] + geo["e"])
        assert label == (-1 if x < 160 and y < 160 else 2 if x > 320 else 0)


def test_classes_without_a_name_are_refused_unless_declared_nodata(tmp_path):
    write_cube(tmp_path / "s2" / "a.zarr", coded(1, 1, 32).astype(np.uint16), ("B02",), times=None)
    classes = np.full((1, 1, 32, 32), 1, np.uint8)
    classes[..., 10:] = 7  # most of the window
    write_cube(tmp_path / "labels" / "a.zarr", classes, ("label",), times=None, as_variables=True)
    options = {"modalities": {"s2": Layer(bands=("B02",))}, "held_out": NOTHING_HELD,
               "window": Window(size=320, unit="m", **STILL), "global_batch_size": 1}  # fmt: skip
    names = ("water", "crops")
    with pytest.raises(DataError, match="labels.a.zarr: .* holds 7, which has no name.*nodata"):
        batches(module(tmp_path, labels=Labels(names=names), **options))
    [batch] = batches(module(tmp_path, labels=Labels(names=names, nodata=7), **options))
    assert batch["label"].tolist() == [1]


def test_different_reference_systems_are_refused(tmp_path):
    write_cube(tmp_path / "s1.zarr", coded(1, 2, 64).astype(np.float32), ("VV", "VH"), times=None)
    write_cube(tmp_path / "s2.zarr", coded(1, 3, 64).astype(np.uint16), ("B02", "B03", "B04"),
               times=None, crs="EPSG:32633")  # fmt: skip
    layers = {
        "s1": Layer(bands=("VV", "VH"), path="s1.zarr", value_unit="db", stored_unit="db"),
        "s2": Layer(bands=("B02", "B03", "B04"), path="s2.zarr"),
    }
    with pytest.raises(DataError, match=r"EPSG:32632.*EPSG:32633.*Reproject"):
        module(tmp_path, modalities=layers)


def test_mistakes_name_what_is_there(pair, tmp_path):
    with pytest.raises(DataError, match=r"no band 'B08'; there are: B02, B03, B04"):
        module(pair, modalities={"s2": Layer(bands=("B08",))})
    with pytest.raises(DataError, match=r"s3: no zarr store.*holds: s1, s2.*path"):
        module(pair, modalities={"s3": Layer(bands=("B02",))})
    with pytest.raises(DataError, match="no file fits the pattern"):
        module(pair, modalities={"s2": Layer(bands=("B02",), path="{site}/x.tif")})
    with pytest.raises(ConfigError, match=r"165 m is no multiple of 10 m.*use 160"):
        module(pair, window=Window(size=165, unit="m"))
    with pytest.raises(ConfigError, match="no site 'here2'.*Did you mean 'here'"):
        module(pair, held_out=HeldOut(sites=("here2",)))
    with pytest.raises(DataError, match="less than the windows' 2000 m"):
        module(pair, window=Window(size=2000, unit="m"))
    with pytest.raises(ConfigError, match="mode: got 'al'.*Did you mean 'all'"):
        Dates(mode="al")
    write_cube(tmp_path / "s2.zarr", coded(1, 1, 64).astype(np.uint16), ("B02",), times=None,
               crs="")  # fmt: skip
    with pytest.raises(DataError, match="no coordinate reference system"):
        module(tmp_path, modalities={"s2": Layer(bands=("B02",), path="s2.zarr")})
    layer = Layer(bands=("B02",), path="s2.zarr", crs="EPSG:32632")
    assert module(tmp_path, modalities={"s2": layer}, global_batch_size=1).sites
    with pytest.raises(ConfigError, match="expected 'auto', null"):
        SentinelCubeDataModule(labels="some")
    assert Labels().variable == "label"


def test_modalities_are_known_without_the_files():
    data = SentinelCubeDataModule(root="/nowhere", window=Window(size=640, unit="m"))
    assert data.context_size == (64, 64)
    assert data.modalities["s1"].mean == (-12.577, -20.265)
    assert data.modalities["s2"].channels[:3] == ("B01", "B02", "B03")
    assert data.modalities["s2"].wavelengths_nm is not None
    series = SentinelCubeDataModule(dates=Dates(mode="all")).modalities
    assert {m.kind for m in series.values()} == {"series"}


def test_the_identity_changes_with_the_headers(pair, tmp_path):
    a, b = module(pair).identity(), module(pair).identity()
    assert a == b and a["sites"]["here"]["crs"] == "EPSG:32632"
    c = module(pair, modalities={"s2": Layer(bands=("B02",))}).identity()
    assert c["sites"]["here"]["headers"] != a["sites"]["here"]["headers"]


def test_blocks_of_other_zones_and_across_the_date_line_are_kept_apart():
    def block(site, lon, lat, side=5000.0):
        to_crs = pyproj.Transformer.from_crs(4326, sites[site].crs, always_xy=True)
        x, y = to_crs.transform(lon, lat)
        return Block(site, Bounds(x, y, x + side, y + side), 1, 1)

    sites = [
        SimpleNamespace(crs=f"EPSG:{code}", metres=1.0) for code in (32632, 32633, 32660, 32601)
    ]
    ours = [block(0, 12.0, 45.0), block(0, 11.5, 45.0), block(2, 179.99, 10.0)]
    others = [block(1, 12.01, 45.01), block(3, -179.99, 10.01)]
    assert overlapping(sites, ours, others).tolist() == [True, False, True]
    assert overlapping(sites, ours, others, gap_m=60_000).tolist() == [True, True, True]
    assert overlapping(sites, ours[:1], ours[1:2]).tolist() == [False]
    assert overlapping(sites, ours, []).tolist() == [False] * 3
