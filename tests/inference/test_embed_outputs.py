"""Forms of `embed` besides GeoZarr: COG, and one vector per item as GeoParquet."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cube_files import LEFT, TOP, coded, write_geotiff
from PIL import Image

from domainssl.backbones.vit import ViTBackbone
from domainssl.errors import ConfigError, DataError
from domainssl.files import remove_rests
from domainssl.inference import pooled
from domainssl.inference.inputs import find_inputs, is_raster
from domainssl.inference.outputs import file_states, refuse_other
from domainssl.inference.preview import write_items
from domainssl.inference.run import embed
from domainssl.inference.scenes import Scene
from domainssl.io.raster.geozarr import VectorStore
from domainssl.pieces import Plan, Shard

BANDS = ("B02", "B03", "B04")
S2 = {
    "kind": "image", "channels": BANDS, "value_unit": "dn", "size": (32, 32), "gsd_m": 10.0,
    "mean": (2000.0,) * 3, "std": (1500.0,) * 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone() -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone({"s2": S2}, {"width": 12, "depth": 1, "heads": 2}, patch_size=8).eval()


def write(path: Path, side: int, left: float = LEFT, hole: bool = False) -> Path:
    values = coded(1, 3, side)[0].astype(np.uint16)
    if hole:
        values[:, :16, :16] = 0
    return write_geotiff(path, values, BANDS, nodata=0, left=left)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_cog_holds_the_vectors_of_the_store_on_its_grid(
    dtype: Any, backbone: ViTBackbone, tmp_path: Path
) -> None:
    import rasterio

    path = write(tmp_path / "a.tif", 70, hole=True)
    embed(backbone, path, tmp_path / "e.zarr", dtype=dtype)
    embed(backbone, path, tmp_path / "e.tif", dtype=dtype)  # the ending tells the form
    store = VectorStore(tmp_path / "e.zarr")
    stored = np.asarray(store.group["embedding"][...])
    with rasterio.open(tmp_path / "e.tif") as file:
        assert file.crs.to_epsg() == 32632 and file.shape == (9, 9)
        assert tuple(file.transform)[:6] == (80.0, 0.0, LEFT, 0.0, -80.0, TOP)
        assert file.descriptions == tuple(f"feature {n}" for n in range(12))
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.nodata == -128 if dtype == "int8" else np.isnan(file.nodata)
        np.testing.assert_array_equal(file.read(), stored.astype(file.dtypes[0]))
        assert (file.read_masks(1)[:2, :2] == 0).all() and file.read_masks(1)[2:].all()
    if dtype == "int8":
        with rasterio.open(tmp_path / "e_scale.tif") as file:
            np.testing.assert_array_equal(file.read(1), store.group["scale"][...])
    # each has its own preview, and they show the same
    first, second = ((tmp_path / f"e.{end}.png").read_bytes() for end in ("zarr", "tif"))
    assert first == second and not (tmp_path / "e.png").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_one_vector_per_raster_with_its_footprint(backbone: ViTBackbone, tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    import shapely

    folder = tmp_path / "in"
    write(folder / "a.tif", 32)
    write(folder / "b.tif", 48, left=LEFT + 5000)
    write(folder / "c.tif", 16, hole=True)  # nothing is valid
    embed(backbone, folder, tmp_path / "v.parquet", pooled=True, batch_size=3)
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["id"].to_pylist() == ["a", "b", "c"]
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    pixels = torch.from_numpy(coded(1, 3, 48)[0].astype(np.float32))[None]
    with torch.no_grad():
        whole = backbone({"s2": pixels[..., :32, :32]}).pooled["s2"][0]
        parts = []
        for rows, columns in ((0, 0), (0, 32), (32, 0), (32, 32)):
            window = torch.zeros(1, 3, 32, 32)
            part = pixels[..., rows : rows + 32, columns : columns + 32]
            valid = torch.zeros(1, 32, 32, dtype=torch.bool)
            window[..., : part.shape[2], : part.shape[3]] = part
            valid[..., : part.shape[2], : part.shape[3]] = True
            found = backbone({"s2": window, "s2.valid": valid}).pooled["s2"][0]
            parts.append((found, part.shape[2] * part.shape[3]))
    np.testing.assert_allclose(vectors[0], whole, atol=2e-6)
    mean = sum(v * n for v, n in parts) / sum(n for _, n in parts)
    np.testing.assert_allclose(vectors[1], mean, atol=2e-6)
    assert np.isnan(vectors[2]).all()
    geo = json.loads(table.schema.metadata[b"geo"])
    assert geo["version"] == "1.1.0" and geo["primary_column"] == "geometry"
    column = geo["columns"]["geometry"]
    assert column["encoding"] == "WKB" and column["geometry_types"] == ["Polygon"]
    shapes = shapely.from_wkb(table["geometry"].to_pylist())
    np.testing.assert_allclose(shapely.total_bounds(shapes), column["bbox"])
    assert all(shape.is_valid and shape.exterior.is_ccw for shape in shapes)
    assert shapes[0].bounds[0] == pytest.approx(7.73, abs=0.01)  # west of the meridian of zone 32
    box = table["bbox"][0].as_py()
    assert (box["xmin"], box["ymin"], box["xmax"], box["ymax"]) == shapes[0].bounds
    with Image.open(tmp_path / "v.parquet.png") as picture:
        assert picture.size == (800, 250)  # two rows of features: no cloud of dots to see


def test_outputs_that_end_like_another_file_are_refused(
    backbone: ViTBackbone, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.tif", 32)
    for name in ("x.foo", "x.nii.gz", "maps.h5"):
        with pytest.raises(ConfigError, match=r"ends like a file.*\.zarr or \.tif.*mkdir"):
            embed(backbone, path, tmp_path / name)
        assert not (tmp_path / name).exists()
    (tmp_path / "set.foo").mkdir()  # a folder is a folder, whatever it is called
    for folder in ("set.foo", "v1.2"):
        embed(backbone, path, tmp_path / folder)
        assert (tmp_path / folder / "a.zarr").is_dir()
    with pytest.raises(ConfigError, match="Name both alike"):
        embed(backbone, path, tmp_path / "x.tif", form="zarr")


@pytest.mark.parametrize(("count", "size"), [(0, None), (1, (800, 250)), (5, (500, 500))])
def test_a_few_vectors_are_drawn_as_rows_and_none_not_at_all(
    count: int, size: Any, tmp_path: Path
) -> None:
    vectors = np.full((6, 4), np.nan, np.float32)
    vectors[:count] = np.random.default_rng(0).normal(size=(count, 4))
    write_items(tmp_path / "v.png", vectors, [*"abcdef"])
    if size is None:
        assert not (tmp_path / "v.png").exists()
        return
    with Image.open(tmp_path / "v.png") as picture:
        assert picture.size == size


def test_geopandas_reads_the_table(backbone: ViTBackbone, tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas")
    write(tmp_path / "in" / "a.tif", 32)
    embed(backbone, tmp_path / "in", tmp_path / "v.parquet", pooled=True, dtype="int8")
    frame = geopandas.read_parquet(tmp_path / "v.parquet")
    assert frame.crs.to_string() == "OGC:CRS84" and list(frame.id) == ["a"]
    metres = frame.to_crs(32632).total_bounds
    np.testing.assert_allclose(metres, (LEFT, TOP - 320, LEFT + 320, TOP), atol=0.01)
    with torch.no_grad():
        pixels = torch.from_numpy(coded(1, 3, 32)[0].astype(np.float32))[None]
        exact = backbone({"s2": pixels}).pooled["s2"][0]
    near = np.array(frame["embedding"][0], np.float32) * frame["scale"][0]
    np.testing.assert_allclose(near, exact, atol=0.51 * frame["scale"][0])


def test_groups_are_shared_and_resumed(
    backbone: ViTBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooled, "_GROUP", 2)
    for name in "abcde":
        write(tmp_path / "in" / f"{name}.tif", 32 + ord(name) % 3)
    embed(backbone, tmp_path / "in", tmp_path / "one.parquet", pooled=True)
    for number, count in ((1, 2), (2, 1)):
        done = embed(
            backbone, tmp_path / "in", tmp_path / "two.parquet", pooled=True,
            plan=Plan(jobs=0, shard=Shard(number, 2)),
        )  # fmt: skip
        assert done.pieces == count
    one, two = (tmp_path / f"{n}.parquet" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(ConfigError, match=r"else: items\.e was \{.*, is none\."):
        (tmp_path / "in" / "e.tif").unlink()
        embed(backbone, tmp_path / "in", two, pooled=True)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_items_in_another_order_are_refused(tmp_path: Path) -> None:
    pairs: list[list[Any]] = [["a", {"crs": 1}], ["b", {"crs": 2}]]
    with pytest.raises(ConfigError, match="else: the order of the items differs"):
        refuse_other(tmp_path / "o", {"items": pairs}, {"items": pairs[::-1]})
    refuse_other(tmp_path / "o", {"items": pairs}, {"items": pairs})


def test_a_manifest_names_items_and_modalities(tmp_path: Path) -> None:
    from domainssl.backbones.croma import CROMABackbone

    torch.manual_seed(0)
    s1 = {**S2, "channels": ("VV", "VH"), "value_unit": "db", "mean": (-12.0,) * 2,
          "std": (5.0,) * 2}  # fmt: skip
    radar = np.full((2, 40, 40), -11.0, np.float32) + np.arange(40, dtype=np.float32) / 10
    write_geotiff(tmp_path / "r.tif", radar, ("VV", "VH"))
    write(tmp_path / "o.tif", 40)
    (tmp_path / "m.csv").write_text("id,s1,s2\n")
    with pytest.raises(DataError, match="has no row"):
        find_inputs(tmp_path / "m.csv", ["s1", "s2"], is_raster, "a raster")
    (tmp_path / "m.csv").write_text("id,s1,s2\nplace,r.tif,o.tif\n")
    backbone = CROMABackbone({"s1": s1, "s2": S2}, patch_size=8, width=16, depth=2, heads=2)
    embed(backbone.eval(), tmp_path / "m.csv", tmp_path / "out", stored_unit="s1=db")
    facts = VectorStore(tmp_path / "out" / "place.zarr").facts
    assert facts["feature"] == "joint" and list(facts["window"]) == ["s1", "s2"]


def test_an_item_that_cannot_be_read_gets_no_vector_and_is_named(
    backbone: ViTBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.tif", 40)
    read = Scene.read

    def damaged(scene: Scene, windows: Any, box: Any) -> Any:
        if scene.name == "b":
            raise DataError("b.tif: cannot be read.")
        return read(scene, windows, box)

    monkeypatch.setattr(Scene, "read", damaged)
    output = tmp_path / "t.parquet"
    plan = Plan(jobs=0, skip_bad=True)
    done = embed(backbone, tmp_path / "in", output, pooled=True, plan=plan)
    assert done.left_out == {"b": "b.tif: cannot be read."}
    rows = parquet.read_table(output)["embedding"].to_pylist()
    assert np.isfinite(rows[0]).all() and (rows[1] is None or np.isnan(rows[1]).all())
    again = embed(backbone, tmp_path / "in", output, pooled=True, plan=plan)  # tried again
    assert again.resumed == 0 and again.left_out == done.left_out
    monkeypatch.setattr(Scene, "read", read)
    assert not embed(backbone, tmp_path / "in", output, pooled=True, plan=plan).left_out
    assert np.isfinite(parquet.read_table(output)["embedding"].to_pylist()).all()
    names = {"in", "t.parquet", "t.parquet.json", "t.parquet.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_state_of_a_folder_changes_with_a_file_that_is_written_over(tmp_path: Path) -> None:
    for name in ("IM1", "IM2"):
        (tmp_path / name).write_bytes(b"12345")
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    whole, folder = os.stat(tmp_path), file_states([tmp_path])
    with (tmp_path / "IM1").open("r+b") as file:
        file.write(b"x")
    os.utime(tmp_path / "IM1", ns=(10**18 - 1, 10**18 - 1))  # older, as files from an archive
    assert os.stat(tmp_path).st_mtime_ns == whole.st_mtime_ns
    assert file_states([tmp_path]) != folder and file_states([tmp_path])[0][0] == 10
    assert file_states([tmp_path / "IM1"]) == [[5, 10**18 - 1]]


def test_rests_of_killed_calls_go_with_finished_outputs_alone(tmp_path: Path) -> None:
    """Parts of hidden files, of second files and of pictures stayed for ever."""
    rests = (
        ".a.tif.lock", "..a.tif.part-rows.part-1", "..a.tif.source.part-1", ".a_scale.tif.part-1",
        ".a.tif.aux.xml.part-1", ".x_tiles.parquet.part-1",
    )  # fmt: skip
    kept = (".a.tif.source", ".b.tif.part-map", ".ab.tif.part-1", ".a.png.part-1", "a.tif")
    for name in (*rests, *kept):
        (tmp_path / name).touch()
    remove_rests([tmp_path / "a.tif", tmp_path / "x.geojson"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
