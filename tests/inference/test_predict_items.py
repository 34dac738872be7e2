"""`predict` for slides, bags, pairs of dates and numbers: what is written, and where it lies."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bag_files
import numpy as np
import pytest
import torch
from scan_files import oblique, write_nifti
from slide_files import write_tiff

from domainssl.backbones.slide import TITANBackbone
from domainssl.backbones.vit import ViTBackbone
from domainssl.cli import main
from domainssl.inference.bags import bag_items
from domainssl.modality import Modality
from domainssl.tasks import ChangeDetectionTask, ClassificationTask, RegressionTask
from domainssl.tasks.export import export_task

h5py = pytest.importorskip("h5py")
pandas = pytest.importorskip("pandas")
rasterio = pytest.importorskip("rasterio")
SMALL = {"width": 12, "depth": 1, "heads": 1}
TILE = Modality(
    name="he", kind="image", channels=("r", "g", "b"), value_unit="rgb8", size=(32, 32),
    mpp_um=1.0, mean=(128.0,) * 3, std=(64.0,) * 3,
)  # fmt: skip
BAG = Modality(
    name="tile_features", kind="features", channels=tuple(f"f{i}" for i in range(bag_files.D)),
    value_unit="arbitrary", mpp_um=0.5, mean=(20.0,) * bag_files.D, std=(20.0,) * bag_files.D,
)  # fmt: skip
IMAGE = Modality(
    name="s2", kind="image", channels=("B02",), value_unit="dn", size=(8, 8), gsd_m=10.0,
    mean=(500.0,), std=(300.0,),
)  # fmt: skip


def predict(task: Any, folder: Path, *words: object) -> Path:
    """Export a task, predict with it, and return the folder that is written."""
    if not (folder / "task").exists():
        export_task(task, folder / "task")
    out = folder / "out"
    assert main(["predict", str(folder / "task"), *map(str, words), f"--output={out}"]) == 0
    return out


def raster(path: Path, values: np.ndarray, left: float = 500_000.0) -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=1,
        dtype="uint16", crs="EPSG:32633", nodata=0,
        transform=rasterio.transform.from_origin(left, 5_200_000.0, 10.0, 10.0),
    ) as file:  # fmt: skip
        file.write(values.astype(np.uint16), 1)
        file.descriptions = ("B02",)
    return path


def dark_and_light(task: ClassificationTask) -> ClassificationTask:
    """Class 1 where a tile is light, without training: the head reads the mean of the pixels."""

    def answers(batch: Any) -> Any:
        light = batch["he"].mean((1, 2, 3)) / 128 - 1
        return torch.stack([-light, light], 1) * 8, {}

    task.with_weights = answers  # type: ignore[method-assign]
    return task


def test_classes_of_tiles_become_regions_that_the_readers_of_regions_read(tmp_path: Path) -> None:
    from domainssl.inference.predict import PredictOptions
    from domainssl.inference.slide_inputs import named_slides
    from domainssl.inference.slide_maps import SlidePrediction
    from domainssl.io.slide.regions import read_regions
    from domainssl.pieces import Plan, build

    pixels = np.full((256, 384, 3), 40, np.uint8)
    pixels[64:192, 128:320] = 220  # 2 x 3 tiles of 64 pixels at level 0 (0.5 um)
    write_tiff(tmp_path / "slides" / "a.tif", [pixels])
    task = dark_and_light(
        ClassificationTask(
            ViTBackbone({"he": TILE}, SMALL, 8), modalities={"he": TILE}, classes=("dark", "light")
        ).eval()
    )
    work = SlidePrediction(
        folder=tmp_path, slides=named_slides([str(tmp_path / "slides")], "plain"), task=task,
        options=PredictOptions(batch_size=5), min_tissue=0,
    )  # fmt: skip
    build(work, Plan(jobs=0), noun="slides")
    content = json.loads((tmp_path / "a.geojson").read_text())
    by_name = {f["properties"]["classification"]["name"]: f for f in content["features"]}
    light = by_name["light"]
    assert sorted(map(tuple, light["geometry"]["coordinates"][0][:-1])) == [
        (128, 64), (128, 192), (320, 64), (320, 192),
    ]  # fmt: skip
    assert light["properties"]["objectType"] == "annotation"
    assert light["properties"]["measurements"]["tiles"] == 6
    assert light["properties"]["classification"]["color"] == [214, 94, 0]
    assert len(by_name["dark"]["geometry"]["coordinates"]) == 2  # outline and hole
    found = read_regions(tmp_path / "a.geojson")
    names, shares = found.under(np.array([[128, 64], [0, 0]]), (64, 64), (384, 256))
    assert names.tolist() == ["light", "dark"] and shares.tolist() == [1.0, 1.0]
    tiles = pandas.read_parquet(tmp_path / "a_tiles.parquet")
    assert len(tiles) == 24 and (tiles.predicted == "light").sum() == 6
    row = tiles[(tiles.x == 128) & (tiles.y == 64)].iloc[0]
    assert row["p(light)"] > 0.99 and row.size_level0 == 64


def test_slides_that_differ_in_their_ending_have_names_of_their_own(tmp_path: Path) -> None:
    from domainssl.inference.slide_inputs import named_slides

    (tmp_path / "x").mkdir()
    for name in ("a.svs", "a.tif", "b.tif", "x/a.tif"):
        (tmp_path / name).write_bytes(b"")
    found = named_slides([str(tmp_path)], "plain")
    assert sorted(s.name for s in found) == ["a.svs", "a.tif", "b", "x__a"]


def test_the_verb_predicts_a_folder_of_slides_on_tissue(tmp_path: Path, capsys: Any) -> None:
    pixels = np.full((256, 384, 3), 245, np.uint8)
    pixels[64:192, 128:320] = (180, 60, 140)
    write_tiff(tmp_path / "slides" / "a.tif", [pixels])
    task = ClassificationTask(
        ViTBackbone({"he": TILE}, SMALL, 8), modalities={"he": TILE}, classes=("a", "b")
    )
    out = predict(task, tmp_path, tmp_path / "slides")
    assert "1 slide as regions; classes: 0 a, 1 b" in capsys.readouterr().out
    tiles = pandas.read_parquet(out / "a_tiles.parquet")
    assert set(zip(tiles.x, tiles.y, strict=True)) == {
        (x, y) for x in (128, 192, 256) for y in (64, 128)
    }
    np.testing.assert_allclose(tiles["p(a)"] + tiles["p(b)"], 1, atol=1e-6)
    write_tiff(tmp_path / "glass.tif", [np.full((256, 384, 3), 245, np.uint8)])
    predict(task, tmp_path, tmp_path / "glass.tif")
    assert "glass.geojson: no tile holds enough tissue" in capsys.readouterr().out


def test_bags_give_a_row_per_slide_and_how_much_every_tile_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bag_files.trident(tmp_path / "job", dtype="float32")
    backbone = TITANBackbone({"tile_features": BAG}, width=16, depth=1, heads=2)
    task = ClassificationTask(
        backbone, modalities={"tile_features": BAG}, classes=("a", "b"),
        head={"kind": "gated", "hidden": 8},
    ).eval()  # fmt: skip
    out = predict(task, tmp_path, tmp_path / "job")
    [row] = pandas.read_csv(out / "predictions.csv").to_dict("records")
    assert row["id"] == "slide" and row["tiles"] == row["shown"] == len(bag_files.LATTICE)
    with h5py.File(out / "attention" / "slide.h5") as file:
        scores, coords = file["attention_scores"][:], file["coords"][:]
        assert file["coords"].attrs["patch_size_level0"] == bag_files.SIZE
    assert scores.shape == (len(bag_files.LATTICE),) and abs(scores.sum() - 1) < 1e-5
    places = (coords - coords.min(0)) / bag_files.SIZE
    values = np.stack([bag_files.feature(*place) for place in coords])
    batch = {
        "tile_features": torch.from_numpy(values)[None],
        "tile_features.coords": torch.from_numpy(places[:, ::-1].astype(np.float32).copy())[None],
    }
    with torch.no_grad():
        logits, weights = task.with_weights(batch)
    assert abs(row["p(a)"] - float(logits.softmax(1)[0, 0])) < 1e-5
    np.testing.assert_allclose(scores, weights["tile_features"][0].numpy(), atol=1e-5)
    assert row["predicted"] == "ab"[int(logits.argmax())]


def test_bags_of_other_features_are_refused_and_a_few_tiles_are_enough(
    tmp_path: Path, capsys: Any
) -> None:
    bag_files.trident(tmp_path / "job")
    backbone = TITANBackbone({"tile_features": BAG}, width=16, depth=1, heads=2)
    task = RegressionTask(backbone, modalities={"tile_features": BAG}, targets=("age",))
    export_task(task, tmp_path / "task")
    words = ["predict", str(tmp_path / "task"), str(tmp_path / "job"), "--tiles=5"]
    assert main([*words, f"--output={tmp_path / 'ages.parquet'}"]) == 0
    [row] = pandas.read_parquet(tmp_path / "ages.parquet").to_dict("records")
    assert row["shown"] == 5 and np.isfinite(row["age"])
    other = Modality(
        **{**BAG.to_dict(), "channels": ("a", "b"), "mean": (0.0,) * 2, "std": (1.0,) * 2}
    )
    export_task(
        RegressionTask(
            TITANBackbone({"tile_features": other}, width=16, depth=1, heads=2),
            modalities={"tile_features": other}, targets=("age",),
        ),
        tmp_path / "other",
    )  # fmt: skip
    capsys.readouterr()
    words[1] = str(tmp_path / "other")
    assert main([*words, f"--output={tmp_path / 'out'}"]) == 2
    assert f"features of {bag_files.D} numbers, the backbone was trained on 2" in (
        capsys.readouterr().err.replace("\n", " ")
    )


def test_bags_of_two_encoders_in_one_input_are_told(tmp_path: Path, caplog: Any) -> None:
    for name, encoder in (("a", "uni"), ("b", "conch"), ("c", "uni")):
        bag_files.write(
            tmp_path / f"{name}.h5", bag_files.LATTICE, attrs=bag_files.TRIDENT,
            facts={"encoder": encoder},
        )  # fmt: skip
    backbone: Any = SimpleNamespace(modalities={"tile_features": BAG})
    assert sum(len(list(item.batches())) for item in bag_items(str(tmp_path), backbone)) == 3
    (told,) = caplog.messages
    assert "b.h5: features of the encoder 'conch', and of 'uni' before" in told


def change_task() -> ChangeDetectionTask:
    torch.manual_seed(0)
    series = Modality(**{**IMAGE.to_dict(), "kind": "series"})
    return ChangeDetectionTask(
        ViTBackbone({"s2": IMAGE}, SMALL, 4), modalities={"s2": series},
        classes=("same", "changed"), head={"name": "linear"}, context_size=8,
    ).eval()  # fmt: skip


def test_two_dates_become_one_map_of_what_changed(tmp_path: Path, capsys: Any) -> None:
    task, rng = change_task(), np.random.default_rng(0)
    values = rng.integers(1, 999, (2, 8, 12))
    values[0, :2, :2] = values[1, 4:6, 4:6] = 0  # nodata on one date each
    before = raster(tmp_path / "2020.tif", values[0])
    after = raster(tmp_path / "2021.tif", values[1, :, 2:], left=500_020.0)
    out = predict(task, tmp_path, before, after, "--blending=halo", "--overlap=0")
    with rasterio.open(out / "2020__2021.tif") as found:
        labels = found.read(1)
        assert found.transform.c == 500_020.0 and labels.shape == (8, 10) and found.nodata == 255
    shared = np.stack([values[0, :, 2:], values[1, :, 2:]]).astype(np.float32)
    valid = shared > 0
    assert np.array_equal(labels == 255, ~valid.all(0))
    batch = {
        "s2": torch.from_numpy(shared[:, None, :, :8])[None],
        "s2.valid": torch.from_numpy(valid[..., :8])[None],
    }
    with torch.no_grad():
        wanted = task.logits(batch)[0].argmax(0).numpy()
    seen = valid.all(0)[:, :8]
    assert np.array_equal(labels[:, :8][seen][:6], wanted[seen][:6])
    shifted = raster(tmp_path / "shifted.tif", values[1], left=500_003.0)
    words = ["predict", str(tmp_path / "task"), str(before), str(shifted)]
    assert main([*words, f"--output={tmp_path / 'other'}"]) == 2
    assert "expected one grid for both" in capsys.readouterr().err.replace("\n", " ")
    assert main([*words[:3], f"--output={tmp_path / 'other'}"]) == 2
    assert (
        "one image, but change is between two dates. Give two inputs"
        in capsys.readouterr().err.replace("\n", " ")
    )


def test_numbers_of_pixels_are_written_with_nan_where_nothing_was_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = RegressionTask(
        ViTBackbone({"s2": IMAGE}, SMALL, 4), modalities={"s2": IMAGE},
        targets=("height", "biomass"), dense={"name": "linear"}, context_size=8,
        loss={"mean": 20.0, "std": 5.0},
    ).eval()  # fmt: skip
    values = np.random.default_rng(0).integers(1, 999, (8, 8))
    values[:3, :3] = 0
    out = predict(task, tmp_path, raster(tmp_path / "tile.tif", values))
    batch = {
        "s2": torch.from_numpy(values.astype(np.float32))[None, None],
        "s2.valid": torch.from_numpy(values > 0)[None],
    }
    with torch.no_grad():
        wanted = task.logits(batch)[0].numpy()
    wanted[:, values == 0] = np.nan
    with rasterio.open(out / "tile.tif") as found:
        assert found.descriptions == ("height", "biomass") and np.isnan(found.nodata)
        np.testing.assert_allclose(found.read(), wanted, rtol=1e-5)
    record = json.loads((out / "predict.json").read_text())
    assert record["numbers"] == ["height", "biomass"] and "classes" not in record


def test_numbers_of_voxels_lie_on_the_scan(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    torch.manual_seed(0)
    ct = Modality(
        name="ct", kind="volume", channels=("ct",), value_unit="hu", size=(8, 8, 8),
        mean=(40.0,), std=(300.0,),
    )  # fmt: skip
    task = RegressionTask(
        ViTBackbone({"ct": ct}, SMALL, 4), modalities={"ct": ct}, targets=("dose",),
        dense={"name": "light"}, context_size=8,
    ).eval()  # fmt: skip
    values = np.random.default_rng(0).normal(0, 300, (8, 8, 8)).astype(np.float32)
    path = write_nifti(tmp_path / "scan.nii.gz", values, oblique())
    out = predict(task, tmp_path, path)
    found, given = (
        nibabel.as_closest_canonical(nibabel.load(p)) for p in (out / "scan.nii.gz", path)
    )
    np.testing.assert_allclose(found.affine, given.affine, atol=1e-5)
    x = torch.from_numpy(given.get_fdata(dtype=np.float32).copy())[None, None]
    with torch.no_grad():
        wanted = task.logits({"ct": x})[0, 0].numpy()
    np.testing.assert_allclose(found.get_fdata(), wanted, rtol=1e-4, atol=1e-4)


def test_items_larger_than_a_window_are_the_mean_over_their_windows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ClassificationTask(
        ViTBackbone({"s2": IMAGE}, SMALL, 4), modalities={"s2": IMAGE}, classes=("a", "b"),
        context_size=8,
    ).eval()  # fmt: skip
    (tmp_path / "tiles").mkdir()
    values = np.random.default_rng(0).integers(1, 999, (8, 16))
    values[:, 12:] = 0  # half of the second window
    raster(tmp_path / "tiles" / "one.tif", values)
    raster(tmp_path / "tiles" / "two.tif", np.zeros((8, 8)))  # nothing was measured
    out = predict(task, tmp_path, tmp_path / "tiles")
    table = pandas.read_csv(out / "predictions.csv").set_index("id")
    chances = []
    for part in (values[:, :8], values[:, 8:]):
        batch = {
            "s2": torch.from_numpy(part.astype(np.float32))[None, None],
            "s2.valid": torch.from_numpy(part > 0)[None],
        }
        with torch.no_grad():
            chances.append(task.logits(batch).softmax(1)[0].numpy())
    wanted = (chances[0] + 0.5 * chances[1]) / 1.5
    assert abs(table.loc["one", "p(a)"] - wanted[0]) < 1e-6
    assert np.isnan(table.loc["two", "p(a)"]) and np.isnan(table.loc["two", "predicted"])
    dated = tmp_path / "S2A_MSIL2A_20210502T100000_N0300_R022_T33TQM.tif"
    dated.write_bytes((tmp_path / "tiles" / "one.tif").read_bytes())
    words = ["predict", str(tmp_path / "task"), str(dated), f"--output={tmp_path / 'dated.csv'}"]
    assert main(words) == 0
    [row] = pandas.read_csv(tmp_path / "dated.csv").to_dict("records")
    assert row["date"] == "2021-05-02T10:00:00" and abs(row["p(a)"] - wanted[0]) < 1e-6
