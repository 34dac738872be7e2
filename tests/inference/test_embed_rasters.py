"""`embed` on rasters: values, georeference, invalid pixels, resume, ranks."""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cube_files import LEFT, TOP, coded, write_cube, write_geotiff
from real_data import REAL_DATA

import domainssl
from domainssl.backbones.vit import ViTBackbone
from domainssl.cli import main
from domainssl.errors import ConfigError, DataError
from domainssl.files import read_json
from domainssl.inference import dense
from domainssl.inference.run import embed
from domainssl.inference.scene_bands import modality_of
from domainssl.inference.scenes import SceneOptions, open_scene
from domainssl.inference.tokens import fitting_sides, token_windows
from domainssl.io.raster.geozarr import VectorStore
from domainssl.modality import Modality
from domainssl.pieces import Plan, Shard

BANDS = ("B02", "B03", "B04")
S2 = {
    "kind": "image", "channels": BANDS, "value_unit": "dn", "size": (32, 32), "gsd_m": 10.0,
    "mean": (2000.0,) * 3, "std": (1500.0,) * 3,
}  # fmt: skip
REAL = REAL_DATA / "eo" / "terramesh_examples"


@pytest.fixture(scope="module")
def backbone() -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone({"s2": S2}, {"width": 12, "depth": 1, "heads": 2}, patch_size=8).eval()


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    values = coded(1, 3, 203)[0].astype(np.uint16)
    values[:, 60:80, 60:90] = 0
    return write_geotiff(tmp_path / "in" / "scene.tif", values, BANDS, nodata=0)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_SHARD_PIXELS", 64)  # 8 tokens: 26 of them lie in 4 shards


def vectors(path: Path) -> Any:
    store = VectorStore(path)
    shape = store.group["embedding"].shape[1:]
    return store.read([slice(0, n) for n in shape])


def equal_folders(a: Path, b: Path) -> bool:
    found = filecmp.dircmp(a, b)
    names = [str(p.relative_to(a)) for p in a.rglob("*") if p.is_file()]
    same, _, _ = filecmp.cmpfiles(a, b, names, shallow=False)
    return not found.left_only and not found.right_only and len(same) == len(names)


def test_every_token_is_that_of_the_window_in_whose_middle_it_lies(
    scene: Path, backbone: ViTBackbone, tmp_path: Path, small_shards: None
) -> None:
    embed(backbone, scene, tmp_path / "e.zarr", batch_size=3)
    found = vectors(tmp_path / "e.zarr")
    pixels = torch.from_numpy(coded(1, 3, 203)[0].astype(np.float32))
    # windows have 4 tokens and overlap by 2: token 12 lies in the middle of that from 11 to 14
    with torch.no_grad():
        tokens = backbone({"s2": pixels[None, :, 88:120, 104:136]}).tokens["s2"][0]
    for row in (12, 13):
        for column in (14, 15):
            expected = tokens[(row - 11) * 4 + column - 13]
            np.testing.assert_allclose(found[:, row, column], expected, atol=2e-6)
    with torch.no_grad():  # in a corner nothing is left out
        corner = backbone({"s2": pixels[None, :, :32, :32]}).tokens["s2"][0, 0]
    np.testing.assert_allclose(found[:, 0, 0], corner, atol=2e-6)


def test_patches_without_a_valid_pixel_are_missing_and_no_others(
    scene: Path, backbone: ViTBackbone, tmp_path: Path
) -> None:
    embed(backbone, scene, tmp_path / "e.zarr")
    missing = np.isnan(vectors(tmp_path / "e.zarr"))
    assert (missing.all(0) == missing.any(0)).all()
    assert sorted(zip(*map(list, np.nonzero(missing[0])), strict=True)) == [
        (row, column) for row in (8, 9) for column in (8, 9, 10)
    ]


def test_xarray_opens_the_store_with_coordinates_and_reference_system(
    scene: Path, backbone: ViTBackbone, tmp_path: Path
) -> None:
    xarray, pyproj = pytest.importorskip("xarray"), pytest.importorskip("pyproj")
    embed(backbone, scene, tmp_path / "e.zarr", dtype="float16")
    found = xarray.open_zarr(tmp_path / "e.zarr")
    values = found["embedding"]
    assert values.dims == ("band", "y", "x") and values.shape == (12, 26, 26)
    assert values.dtype == np.float16
    assert found.x.values[0] == LEFT + 40 and found.y.values[-1] == TOP - 25.5 * 80
    mapping = values.coords["spatial_ref"].attrs
    assert pyproj.CRS.from_wkt(mapping["crs_wkt"]).to_epsg() == 32632
    assert mapping["GeoTransform"] == "400000.0 80.0 0.0 5000000.0 0.0 -80.0"
    assert found.attrs["proj:code"] == "EPSG:32632"


def test_our_own_reader_opens_the_store_on_its_grid(
    scene: Path, backbone: ViTBackbone, tmp_path: Path
) -> None:
    from domainssl.io.raster.bands import describe_zarr

    embed(backbone, scene, tmp_path / "e.zarr")
    file = describe_zarr(str(tmp_path / "e.zarr"), [str(n) for n in range(12)])
    grid = file.bands[0].grid
    assert (file.crs, grid.left, grid.top, grid.step) == ("EPSG:32632", LEFT, TOP, 80.0)
    assert len(file.bands) == 12 and (grid.height, grid.width) == (26, 26)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real tiles are not on this machine")
def test_real_pixels_keep_their_georeference(tmp_path: Path) -> None:
    import rasterio

    path = next((REAL / "S2L2A").glob("*.tif"))
    with rasterio.open(path) as file:
        transform, crs, shape = file.transform, file.crs, file.shape
        names = tuple(f"B{n:02d}" for n in range(1, file.count + 1))
    facts = {**S2, "channels": names, "mean": (2e3,) * len(names), "std": (1e3,) * len(names)}
    torch.manual_seed(0)
    backbone = ViTBackbone({"s2": facts}, {"width": 8, "depth": 1, "heads": 2}, patch_size=16)
    embed(backbone, path, tmp_path / "e.zarr", any_gsd=True, stored_unit="dn")
    attrs = VectorStore(tmp_path / "e.zarr").facts
    found = attrs["spatial:transform"]
    assert rasterio.crs.CRS.from_user_input(attrs.get("proj:code") or attrs["proj:wkt2"]) == crs
    assert found[0] == pytest.approx(16 * transform.a, rel=1e-9)
    assert abs(found[2] - transform.c) < 0.01 * transform.a
    assert abs(found[5] - transform.f) < 0.01 * transform.a
    assert attrs["spatial:shape"] == [-(-n // 16) for n in shape]


def test_int8_vectors_are_within_half_a_step_of_their_scale(
    scene: Path, backbone: ViTBackbone, tmp_path: Path
) -> None:
    embed(backbone, scene, tmp_path / "e.zarr")
    embed(backbone, scene, tmp_path / "q.zarr", dtype="int8")
    exact, near = vectors(tmp_path / "e.zarr"), vectors(tmp_path / "q.zarr")
    scale = VectorStore(tmp_path / "q.zarr").group["scale"][...]
    assert (np.isnan(exact) == np.isnan(near)).all()
    assert np.nanmax(np.abs(exact - near) / scale) < 0.501


def test_parts_ranks_processes_and_resumed_calls_write_the_same_store(
    scene: Path,
    backbone: ViTBackbone,
    tmp_path: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embed(backbone, scene, tmp_path / "whole.zarr")
    for number in (2, 1):
        done = embed(
            backbone, scene, tmp_path / "parts.zarr", plan=Plan(jobs=0, shard=Shard(number, 2))
        )
        assert bool(done.missing) == (number == 2)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        embed(backbone, scene, tmp_path / "ranks.zarr")
    monkeypatch.delenv("RANK")
    write, count = VectorStore.write, [0]

    def killed(store: VectorStore, box: Any, values: Any) -> None:
        count[0] += 1
        if count[0] == 9:
            values = values * 0  # half-written, and then the power fails
            write(store, box, values)
            raise KeyboardInterrupt
        write(store, box, values)

    monkeypatch.setattr(VectorStore, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(backbone, scene, tmp_path / "killed.zarr")
    assert not (tmp_path / "killed.zarr").exists()
    monkeypatch.setattr(VectorStore, "write", write)
    done = embed(backbone, scene, tmp_path / "killed.zarr")
    assert (done.pieces, done.resumed) == (16, 8)
    for name in ("parts", "ranks", "killed"):
        assert equal_folders(tmp_path / "whole.zarr", tmp_path / f"{name}.zarr"), name
        assert filecmp.cmp(
            tmp_path / "whole.zarr.png", tmp_path / f"{name}.zarr.png", shallow=False
        )
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert not left


def test_several_processes_write_equal_bytes(
    scene: Path, backbone: ViTBackbone, tmp_path: Path, small_shards: None
) -> None:
    embed(backbone, scene, tmp_path / "one.zarr", plan=Plan(jobs=0))
    embed(backbone, scene, tmp_path / "two.zarr", plan=Plan(jobs=2))
    assert equal_folders(tmp_path / "one.zarr", tmp_path / "two.zarr")
    for ending in (".zarr.png", ".zarr.json"):
        one, two = (tmp_path / f"{name}{ending}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_workers_of_a_cluster_write_the_same_cog(
    scene: Path, backbone: ViTBackbone, tmp_path: Path, small_shards: None
) -> None:
    distributed = pytest.importorskip("distributed", reason="the extra scale is not installed")
    embed(backbone, scene, tmp_path / "one.tif", form="cog")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp",
        dashboard_address="127.0.0.1:0", memory_limit=0,
    ) as cluster:  # fmt: skip
        plan = Plan(jobs=0, scheduler=cluster.scheduler_address)
        done = embed(backbone, scene, tmp_path / "two.tif", form="cog", plan=plan)
    assert (done.pieces, done.outputs) == (16, [tmp_path / "two.tif"])
    assert filecmp.cmp(tmp_path / "one.tif", tmp_path / "two.tif", shallow=False)


def test_a_shard_that_cannot_be_read_is_missing_in_a_complete_store(
    scene: Path,
    backbone: ViTBackbone,
    tmp_path: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    read = dense.DenseEmbedding._read

    def damaged(work: dense.DenseEmbedding, key: str) -> Any:
        if key == "0/1.2":
            raise DataError("scene.tif: rows 64 to 128 cannot be read.")
        return read(work, key)

    monkeypatch.setattr(dense.DenseEmbedding, "_read", damaged)
    output = tmp_path / "e.zarr"
    with pytest.raises(DataError, match="--skip_bad"):
        embed(backbone, scene, output)
    assert not output.exists()
    done = embed(backbone, scene, output, plan=Plan(jobs=0, skip_bad=True))
    assert (done.outputs, done.pieces, done.missing) == ([output], 15, [])
    assert list(done.left_out) == ["scene, shard 1.2"]
    missing = np.isnan(vectors(output)).all(0)
    assert missing[8:16, 16:24].all() and not missing[:8].any() and not missing[16:].any()
    assert list(read_json(tmp_path / "e.zarr.json")["left_out"]) == ["1.2"]
    assert embed(backbone, scene, output).resumed == 16  # complete, whoever asks
    whole = vectors(output)
    (output / "embedding/c/0/2/1").unlink()  # lost since: it was taken for complete
    assert embed(backbone, scene, output).resumed == 15 and "lost" in caplog.text
    np.testing.assert_array_equal(vectors(output), whole)
    shutil.rmtree(output)
    again = embed(backbone, scene, output, plan=Plan(jobs=0, skip_bad=True))
    assert (again.resumed, again.outputs) == (0, [output]) and "is not there" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(dense, "_SHARD_PIXELS", 64)
    embed(backbone, scene, output, plan=Plan(jobs=0, restart=True))
    assert np.isfinite(vectors(output)[:, 8:16, 16:24]).all()


def test_a_raster_that_cannot_be_opened_is_left_out_and_named(
    scene: Path, backbone: ViTBackbone, tmp_path: Path
) -> None:
    (scene.parent / "bad.tif").write_bytes(b"II*\0 nothing")
    (scene.parent / "broken.zarr").mkdir()  # it was passed over without a word
    with pytest.raises(DataError, match=r"broken.zarr|bad.tif"):
        embed(backbone, scene.parent, tmp_path / "out")
    done = embed(backbone, scene.parent, tmp_path / "out", plan=Plan(jobs=0, skip_bad=True))
    assert [p.name for p in done.outputs] == ["scene.zarr"]
    assert list(done.left_out) == ["bad", "broken"]


def test_a_raster_without_a_shard_that_can_be_read_is_all_missing(
    scene: Path, backbone: ViTBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(work: dense.DenseEmbedding, key: str) -> Any:
        raise DataError("scene.tif: cannot be read.")

    monkeypatch.setattr(dense.DenseEmbedding, "_read", damaged)
    done = embed(backbone, scene, tmp_path / "e.zarr", plan=Plan(jobs=0, skip_bad=True))
    assert done.pieces == 0 and len(done.left_out) == 1
    assert np.isnan(vectors(tmp_path / "e.zarr")).all()


def test_the_size_of_batches_changes_nothing_but_rounding(
    backbone: ViTBackbone, tmp_path: Path
) -> None:
    scene = write_geotiff(tmp_path / "s.tif", coded(1, 3, 100)[0].astype(np.uint16), BANDS)
    embed(backbone, scene, tmp_path / "a.zarr", batch_size=1)
    embed(backbone, scene, tmp_path / "b.zarr", batch_size=17)
    np.testing.assert_allclose(
        vectors(tmp_path / "a.zarr"), vectors(tmp_path / "b.zarr"), atol=2e-6, rtol=1e-5
    )


def test_a_raster_smaller_than_a_window_is_filled_up(backbone: ViTBackbone, tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "s.tif", coded(1, 3, 20)[0].astype(np.uint16), BANDS)
    embed(backbone, path, tmp_path / "e.zarr")
    found = vectors(tmp_path / "e.zarr")
    assert found.shape == (12, 3, 3) and np.isfinite(found).all()
    # a window far larger than the raster ran for minutes
    embed(backbone, path, tmp_path / "far.zarr", window=40_000)
    np.testing.assert_array_equal(vectors(tmp_path / "far.zarr"), found)
    assert fitting_sides((64, 64, 48), (32, 32, 32), (70, 20, 40)) == (64, 32, 48)
    with pytest.raises(ConfigError, match="--window 40000: an input has 20 x 20 pixels"):
        bare = ViTBackbone({"s2": {**S2, "size": ()}}, {"width": 8, "depth": 1, "heads": 1}, 4)
        embed(bare, path, tmp_path / "bare.zarr", window=40_000)


def test_one_date_of_a_cube_is_chosen(backbone: ViTBackbone, tmp_path: Path) -> None:
    write_cube(tmp_path / "c.zarr", coded(4, 3, 64), BANDS)
    with pytest.raises(
        ConfigError, match="--date is needed: .* has 4 dates .2021-03-01, 2021-03-20"
    ):
        embed(backbone, tmp_path / "c.zarr", tmp_path / "e.zarr")
    with pytest.raises(DataError, match="--stored_unit to dn"):  # the offset, or a bright day?
        embed(backbone, tmp_path / "c.zarr", tmp_path / "e.zarr", date="2021-05-02")
    chosen = {"date": "2021-05-02", "stored_unit": "dn"}
    embed(backbone, tmp_path / "c.zarr", tmp_path / "e.zarr", **chosen)
    path = write_geotiff(tmp_path / "d.tif", coded(4, 3, 64)[2].astype(np.uint16), BANDS)
    embed(backbone, path, tmp_path / "d.zarr", stored_unit="dn")
    np.testing.assert_array_equal(vectors(tmp_path / "e.zarr"), vectors(tmp_path / "d.zarr"))


def test_series_go_in_as_a_whole(tmp_path: Path) -> None:
    facts = {**S2, "kind": "series"}
    torch.manual_seed(0)
    backbone = ViTBackbone({"s2": facts}, {"width": 16, "depth": 1, "heads": 2}, patch_size=8)
    write_cube(tmp_path / "c.zarr", coded(4, 3, 32), BANDS)
    embed(backbone, tmp_path / "c.zarr", tmp_path / "e.zarr")
    days = [18687, 18706, 18749, 18869]
    batch = {
        "s2": torch.from_numpy(coded(4, 3, 32)).float()[None],
        "s2.dates": torch.tensor([days], dtype=torch.int32),
    }
    with torch.no_grad():
        expected = backbone.eval().feature_maps(batch)["s2"][0]
    np.testing.assert_allclose(vectors(tmp_path / "e.zarr"), expected, atol=2e-6)


def test_an_offset_that_nobody_states_is_asked_for(backbone: ViTBackbone, tmp_path: Path) -> None:
    name = "S2A_MSIL2A_20230508T100041_N0509_R122_T32TQM_20230508T122613.tif"
    path = write_geotiff(tmp_path / name, coded(1, 3, 32)[0].astype(np.uint16) + 1000, BANDS)
    with pytest.raises(DataError, match="1000 too high.*--stored_unit to dn.1000"):
        embed(backbone, path, tmp_path / "e.zarr")
    embed(backbone, path, tmp_path / "e.zarr", stored_unit="dn+1000")
    plain = write_geotiff(tmp_path / "p.tif", coded(1, 3, 32)[0].astype(np.uint16), BANDS)
    embed(backbone, plain, tmp_path / "p.zarr")
    np.testing.assert_array_equal(vectors(tmp_path / "e.zarr"), vectors(tmp_path / "p.zarr"))


@pytest.mark.parametrize("empty", [0, -9999])
def test_numbers_that_may_carry_the_offset_are_refused_unless_their_dark_pixels_exclude_it(
    backbone: ViTBackbone, tmp_path: Path, empty: int
) -> None:
    values = coded(1, 3, 203)[0].astype(np.int16) + 1000
    values[:, :90] = empty  # nodata that nobody declared is no dark pixel
    path = write_geotiff(tmp_path / "s.tif", values, BANDS)
    with pytest.raises(DataError, match=r"offset of \+1000.*--stored_unit to dn .*or dn\+1000"):
        open_scene(str(path), backbone, SceneOptions())
    for unit, expected in (("dn", 3000.0), ("dn+1000", 2000.0)):
        values[:, 90:] = 3000
        part = open_scene(
            str(write_geotiff(path, values, BANDS)), backbone, SceneOptions(stored_unit=unit)
        )
        windows = token_windows(backbone, ["s2"], feature=None, size=None, dates=1)
        batch = part.read(windows, (slice(16, 18), slice(0, 2)))
        assert batch["s2"].unique().tolist() == [expected]
    values[0, 150:] = 400  # more than 1 % below a reflectance of -0.05
    dark = open_scene(str(write_geotiff(path, values, BANDS)), backbone, SceneOptions())
    assert dark.facts["modalities"]["s2"]["stored_unit"] == "dn"


def test_dates_on_both_sides_of_the_change_of_baselines_are_judged_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = ViTBackbone({"s2": {**S2, "kind": "series"}}, {"width": 16, "depth": 1, "heads": 2})
    times = np.array(["2021-03-01", "2021-08-30", "2023-03-01"], "datetime64[s]")
    values = coded(3, 3, 32) - np.array([0, 4000, 8000])[:, None, None, None]
    values[2] += 1000
    write_cube(tmp_path / "c.zarr", values, BANDS, times=times)
    with pytest.raises(DataError, match="2023-03-01.*offset of .1000"):
        open_scene(str(tmp_path / "c.zarr"), backbone, SceneOptions())
    values[2] -= 1000
    write_cube(tmp_path / "d.zarr", values, BANDS, times=times)
    open_scene(str(tmp_path / "d.zarr"), backbone, SceneOptions())


def test_bands_are_taken_in_the_order_of_the_card_and_missing_ones_are_named(
    backbone: ViTBackbone, scene: Path, tmp_path: Path
) -> None:
    values = coded(1, 3, 32)[0].astype(np.uint16)
    turned = write_geotiff(tmp_path / "t.tif", values[::-1], BANDS[::-1])
    plain = write_geotiff(tmp_path / "p.tif", values, BANDS)
    embed(backbone, turned, tmp_path / "t.zarr")
    embed(backbone, plain, tmp_path / "p.zarr")
    np.testing.assert_array_equal(vectors(tmp_path / "t.zarr"), vectors(tmp_path / "p.zarr"))
    lacking = write_geotiff(tmp_path / "l.tif", values, ("B02", "B03", "B8A"))
    with pytest.raises(
        DataError, match=r"B02 B03 B8A. are not those of 's2' .B02 B03 B04.: B04 is"
    ):
        embed(backbone, lacking, tmp_path / "l.zarr")
    misspelled = write_geotiff(tmp_path / "m.tif", values[[1, 0, 2]], ("gren", "blue", "B04"))
    hint = r"B03 is missing .is 'gren' 'green', B03\?.\. .*--bands B02,B03,B04"
    with pytest.raises(DataError, match=hint):
        embed(backbone, misspelled, tmp_path / "m.zarr")
    embed(backbone, misspelled, tmp_path / "m.zarr", bands=("green", "blue", "red"))
    np.testing.assert_array_equal(vectors(tmp_path / "m.zarr"), vectors(tmp_path / "p.zarr"))
    with pytest.raises(DataError, match="3 bands, but 2 names"):
        embed(backbone, misspelled, tmp_path / "n.zarr", bands=("green", "blue"))


def test_a_raster_that_fits_no_modality_is_told_with_the_bands_of_both(tmp_path: Path) -> None:
    radar = {**S2, "channels": ("VV", "VH"), "value_unit": "db", "mean": (-10.0,) * 2,
             "std": (5.0,) * 2}  # fmt: skip
    both = {"s1": Modality(name="s1", **radar), "s2": Modality(name="s2", **S2)}
    values = coded(1, 3, 32)[0].astype(np.uint16)
    path = str(write_geotiff(tmp_path / "a.tif", values, ("B02", "B03", "Rdd")))
    with pytest.raises(ConfigError) as caught:
        modality_of(path, both)
    assert str(caught.value) == (
        f"{path}: which modality of the backbone is it? Its bands are B02 B03 Rdd; s1 has VV VH, "
        "of which VV VH are missing; s2 has B02 B03 B04, of which B04 is missing (is 'Rdd' 'red', "
        "B04?). Say --modality s1 or s2, with --bands where its bands have other names or none, "
        "in their order."
    )
    assert modality_of(path, both, names=("B02", "B03", "B04")) == "s2"
    bare = str(write_geotiff(tmp_path / "b.tif", values, None))
    with pytest.raises(ConfigError, match="Its bands have no names; s1 has VV VH; s2 has B02 B03"):
        modality_of(bare, both)


def test_the_command_writes_a_folder_of_rasters_and_refuses_to_mix(
    scene: Path, backbone: ViTBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domainssl.export_backbone(backbone, tmp_path / "tiny")
    deep = scene.parent / "more" / "b.tif"
    write_geotiff(deep, coded(1, 3, 40)[0].astype(np.uint16), BANDS)
    words = ["embed", str(tmp_path / "tiny"), str(scene.parent), f"--output={tmp_path / 'out'}"]
    assert main(words) == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted(
        f"{n}{e}" for n in ("scene", "more__b") for e in (".zarr", ".zarr.json", ".zarr.png")
    )
    capsys.readouterr()
    assert main([*words, "--halo=0"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "made from something else: chunk was [" in said and "; halo was 1, is 0; shard" in said
    assert main([*words, "--halo=0", "--restart"]) == 0
    assert VectorStore(tmp_path / "out" / "scene.zarr").facts["halo"] == 0


def test_a_raster_that_changed_is_named_with_both_sizes_and_leaves_nothing(
    scene: Path, backbone: ViTBackbone, tmp_path: Path
) -> None:
    embed(backbone, scene, tmp_path / "e.zarr")
    before = scene.stat()
    os.utime(scene, ns=(1, 1))
    with pytest.raises(ConfigError) as caught:
        embed(backbone, scene, tmp_path / "e.zarr")
    assert (
        "made from something else: source.modalities.s2.file (bytes, time of change in ns) was "
        f"[{before.st_size}, {before.st_mtime_ns}], is [{before.st_size}, 1]. "
    ) in str(caught.value)
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".claims")]


def test_results_among_the_inputs_are_no_inputs(
    scene: Path, backbone: ViTBackbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second call took its own vectors for rasters, whose bands it did not find."""
    for output in (scene.parent / "out", scene.parent):
        for _ in range(2):
            done = embed(backbone, scene.parent, output)
            assert [path.name for path in done.outputs] == ["scene.zarr"]
    assert not caplog.records
    write_geotiff(scene.parent / "out" / "b.tif", coded(1, 3, 40)[0].astype(np.uint16), BANDS)
    embed(backbone, scene.parent, scene.parent / "out")
    assert "b.tif (1 such in all) lies in the folder of results" in caplog.text


def test_what_embed_did_not_write_is_left_alone(
    scene: Path, backbone: ViTBackbone, tmp_path: Path
) -> None:
    (tmp_path / "e.zarr").mkdir()
    (tmp_path / "e.zarr" / "mine").write_text("x")
    for restart in (False, True):
        with pytest.raises(ConfigError, match="was not written by embed"):
            embed(backbone, scene, tmp_path / "e.zarr", plan=Plan(jobs=0, restart=restart))
    assert (tmp_path / "e.zarr" / "mine").read_text() == "x"
