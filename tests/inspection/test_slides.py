"""`inspect` of slides, tile pictures and feature files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import damage_tile, shrink, squares, write_ome, write_tiff

from domainssl.cli import main
from domainssl.inspection.following import following
from domainssl.inspection.recognise import inspect_path, recognise, render


def _text(report: dict[str, Any]) -> str:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=160).print(render(report))
    return stream.getvalue()


def test_slide_is_described_with_levels_resolution_and_colours(tmp_path: Path) -> None:
    rgb = squares(1003, 701)
    path = write_tiff(tmp_path / "a.tif", [rgb, shrink(rgb, 4)])
    report = inspect_path(str(path))
    slide = report["slides"][0]
    assert (report["kind"], report["problems"]) == ("slides", [])
    assert (slide["size"], slide["levels"]) == ([1003, 701], [[1003, 701], [250, 175]])
    assert slide["downsamples"][1] == pytest.approx(4.008857, abs=1e-6)
    assert slide["mpp"] == pytest.approx([0.5, 0.5])
    assert (slide["mpp_source"], slide["backend"]) == ("openslide.mpp", "openslide")
    assert (slide["stored_tiles"], slide["checked_tiles"]) == (176, 176)
    assert slide["valid_fraction"] == 1.0
    means = [row["mean"] for row in slide["values"]]
    assert means == pytest.approx(rgb.reshape(-1, 3).mean(0).tolist(), abs=1.5)
    assert "1003 x 701, 250 x 175" in _text(report)
    json.dumps(report)


def test_unknown_resolution_and_damage_are_problems(tmp_path: Path) -> None:
    write_tiff(tmp_path / "none.tif", [squares(256, 256)], mpp=None)
    damage_tile(write_tiff(tmp_path / "bad.tif", [squares(640, 384)]), 320, 128)
    (tmp_path / "empty.svs").write_bytes(b"")
    report = inspect_path(str(tmp_path))
    assert report["count"] == 3
    assert [s["damaged_tiles"] for s in report["slides"]] == [[[0, 320, 128]], []]
    assert following(report)[0] == f"python -m domainssl tile {tmp_path} --output GRIDS"
    alone = following(inspect_path(str(tmp_path / "none.tif")))
    assert all(line.endswith(" --mpp_um UM") for line in alone)
    said = "\n".join(report["problems"])
    assert "1 of 60 stored tiles looked at cannot be read, at (320, 128)" in said
    assert "mpp_um" in said
    assert "empty.svs" in said
    assert main(["inspect", str(tmp_path)]) == 1


def test_slides_in_folders_are_no_layers_of_a_map(tmp_path: Path) -> None:
    for name in ("he/x.tif", "ihc/x.tif"):
        write_tiff(tmp_path / name, [squares(256, 192)])
    (tmp_path / "he" / "a.tif").write_bytes(b"")  # the first file tells nothing
    assert recognise(str(tmp_path))[0].name == "slides"
    report = inspect_path(str(tmp_path))
    assert report["count"] == 3 and "a.tif: an empty file" in report["problems"][0]
    (tmp_path / "areas").mkdir()
    mask = tmp_path / "areas" / "x.tif"
    tifffile.imwrite(mask, np.zeros((64, 64), np.uint8), metadata=None)
    assert recognise(str(tmp_path))[0].name == "slides"
    geo = [(33550, "d", 3, (10.0, 10.0, 0.0), True), (33922, "d", 6, (0.0,) * 6, True)]
    tifffile.imwrite(mask, np.zeros((64, 64), np.uint8), extratags=geo, metadata=None)
    assert recognise(str(tmp_path))[0].name == "layers"


def test_sixteen_bit_colours_that_use_fewer_are_called_dark(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    for name, factor in (("dark.tif", 16), ("good.tif", 257)):
        tifffile.imwrite(tmp_path / name, squares(128, 128).astype("uint16") * factor,
                         tile=(64, 64), photometric="rgb", resolution=(20_000, 20_000),
                         resolutionunit=3, metadata=None)  # fmt: skip
    reports = {Path(r["path"]).name: r for r in inspect_path(str(tmp_path))["slides"]}
    assert "fewer bits than the file states" in reports["dark.tif"]["odd"][0]
    assert "odd" not in reports["good.tif"]


@pytest.mark.parametrize("value", [0, 255])
def test_a_slide_of_one_colour_is_a_problem(tmp_path: Path, value: int) -> None:
    path = write_tiff(tmp_path / "a.tif", [np.full((256, 256, 3), value, np.uint8)])
    (said,) = inspect_path(str(path))["problems"]
    assert said == f"{path}: the whole overview has the value {value}; nothing is seen on the slide"


def test_multiplex_shows_its_channels(tmp_path: Path) -> None:
    values = np.stack([np.full((256, 256), 1000 * (n + 1), np.uint16) for n in range(4)])
    names = ["DAPI", "CD3", "CD8", "CD20"]
    write_ome(tmp_path / "m.ome.tif", values, "CYX", metadata={"Channel": {"Name": names}},
              photometric="minisblack")  # fmt: skip
    slide = inspect_path(str(tmp_path / "m.ome.tif"))["slides"][0]
    assert (slide["channels"], slide["dtype"]) == (names, "uint16")
    assert [row["mean"] for row in slide["values"]] == [1000, 2000, 3000, 4000]


def test_tile_folder_is_described(tmp_path: Path) -> None:
    for n, folder in enumerate(("a", "a", "b")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (100 + n, 50, 200)).save(tmp_path / folder / f"{n}.png")
    (tmp_path / "b" / "x.png").write_bytes(b"\x89PNG")
    report = inspect_path(str(tmp_path))
    assert (report["kind"], report["count"], report["measured"]) == ("pictures", 4, 3)
    assert (report["sizes"], report["folders"]) == ({"64 x 64": 3}, {"a": 2, "b": 2})
    assert [row["mean"] for row in report["values"]] == [101, 50, 200]
    assert len(report["problems"]) == 1
    assert "x.png" in report["problems"][0]
    assert "64 x 64: 3" in _text(report)


def test_tiff_tiles_are_pictures_and_maps_are_not(tmp_path: Path) -> None:
    tile = np.full((32, 32, 3), 90, np.uint8)
    tifffile.imwrite(tmp_path / "tile.tif", tile, photometric="rgb", metadata=None)
    assert recognise(str(tmp_path / "tile.tif"))[0].name == "pictures"
    geo = [(33550, "d", 3, (10.0, 10.0, 0.0), True), (33922, "d", 6, (0.0,) * 6, True)]
    tifffile.imwrite(tmp_path / "map.tif", tile, photometric="rgb", tile=(16, 16), extratags=geo)
    assert recognise(str(tmp_path / "map.tif"))[0].name == "geotiff"
    tifffile.imwrite(tmp_path / "numbers.tif", np.zeros((64, 64), np.float32), tile=(16, 16))
    assert recognise(str(tmp_path / "numbers.tif"))[0].name == "geotiff"


def test_feature_files_are_described(tmp_path: Path) -> None:
    folder = tmp_path / "features_uni_v1"
    folder.mkdir()
    for name, count in (("a", 3), ("b", 0)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            coords = file.create_dataset(
                "coords", data=np.arange(2 * count).reshape(count, 2) * 512
            )
            coords.attrs["patch_size"], coords.attrs["patch_size_level0"] = 256, 512
            file["features"] = np.full((count, 8), 2.0, np.float16)
    report = inspect_path(str(tmp_path))
    assert (report["kind"], report["layout"], report["count"]) == ("bags", "trident", 2)
    first = report["bags"][0]
    assert (first["tiles"], first["dim"], first["patch_size_level0"]) == (3, 8, 512)
    assert (first["mean"], first["dtype"]) == (2.0, "float16")
    assert [text for text in report["problems"] if "b.h5" in text]
    assert "layout trident" in _text(report) and report["table"] is None
    table = tmp_path / "manifest.csv"
    table.write_text("slide_id,case_id,split,label\na,p,train,x\nb,q,val,y\nc,q,val,y\n")
    report = inspect_path(str(tmp_path))
    assert report["table"] == {
        "file": str(table), "slides": 2, "patients": 2, "splits": {"train": 1, "val": 1},
        "classes": {"x": 1, "y": 1},
    }  # fmt: skip
    assert any("1 slides of manifest.csv have no features" in t for t in report["problems"])
    assert "table of slides" in _text(report)
    table.write_text("slide_id,case_id,split\na,p,train\nb,p,val\n")
    assert any("appear in two splits: p" in t for t in inspect_path(str(tmp_path))["problems"])
    table.unlink()
    assert inspect_path(str(folder / "a.h5"))["bags"][0]["tiles"] == 3
    with h5py.File(folder / "a.h5", "a") as file:
        file["coords"].attrs.update({"level0_magnification": 40, "target_magnification": 40})
        file["coords"][2] = file["coords"][1]
    said = " ".join(inspect_path(str(folder / "a.h5"))["problems"])
    assert "patch_size_level0 is 512, but 256 pixels at 40x of a slide of 40x are 256" in said
    assert "1 tiles lie at the place of another" in said
    with h5py.File(folder / "c.h5", "w") as file:
        coords = file.create_dataset("coords", data=[[256 * (i % 4), 0] for i in range(6)])
        coords.attrs["patch_size_level0"] = 128
        file["features"] = np.zeros((6, 8), np.float32)
        coords[4:] = [[0, 256], [256, 256]]
    said = " ".join(inspect_path(str(folder / "c.h5"))["problems"])
    assert "tiles of 128 pixels of level 0 that overlap by 0, but neighbours lie 256 apart" in said
    (folder / "c.h5").unlink()
    options = "--config recipes/slides_titan.yaml --data.root=" + str(tmp_path)
    after = following(report)
    assert after[0] == (
        f"python -m domainssl inspect {options} --data.modalities.tile_features.dim=8"
    )
    assert after[2].startswith("python -m domainssl fit") and "dim=8" in after[2]
    alone = inspect_path(str(folder / "a.h5"))
    assert following(alone) == [
        f"python -m domainssl embed SLIDE_BACKBONE {folder / 'a.h5'} --output slides.parquet"
    ]
    assert following({"kind": "data"}, ["--config=a b.yaml", "--data.seed=1"]) == [
        "python -m domainssl stats '--config=a b.yaml' --data.seed=1 --output stats.yaml",
        "python -m domainssl fit '--config=a b.yaml' --data.seed=1",
    ]
