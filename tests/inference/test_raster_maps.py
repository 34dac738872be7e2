"""Class maps of rasters keep the georeference of the input, and where nothing was measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from cube_files import coded, write_cube
from PIL import Image
from torch import Tensor

from domainssl.backbones.vit import ViTBackbone
from domainssl.errors import DataError, StorageError
from domainssl.inference.map_preview import class_colours, write_class_preview
from domainssl.inference.predict import PredictOptions
from domainssl.inference.raster_maps import RasterPrediction, find_scenes
from domainssl.inference.run import embed
from domainssl.inference.scenes import SceneOptions
from domainssl.io.raster.class_map import MapPlace, write_class_map
from domainssl.pieces import Plan, build

rasterio = pytest.importorskip("rasterio")


class Thresholds:
    """A task that knows the class of a pixel by its first band: 0 below 1000, 1 below 2000, 2."""

    classes = ("water", "field", "forest")
    context_size = 16

    def __init__(self) -> None:
        facts = {"kind": "image", "channels": ("B02", "B03"), "value_unit": "dn", "gsd_m": 10.0}
        self.backbone: Any = ViTBackbone(
            {"s2": facts}, {"width": 8, "depth": 1, "heads": 1}, 4, normalization="identity"
        )

    def logits(self, batch: Any) -> Tensor:
        x = batch["s2"][:, :1]
        assert x.shape[2:] == (16, 16)
        return torch.cat([x < 1000, (x >= 1000) & (x < 2000), x >= 2000], 1).float()


def scene(path: Path, values: np.ndarray, **more: Any) -> Path:
    profile = {
        "driver": "GTiff", "height": values.shape[1], "width": values.shape[2], "count": 2,
        "dtype": "uint16", "crs": "EPSG:32633", "nodata": 0,
        "transform": rasterio.transform.from_origin(500010.0, 5200020.0, 10.0, 10.0), **more,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(values)
        file.descriptions = ("B02", "B03")
    return path


def pixels(shape: tuple[int, int] = (70, 45)) -> np.ndarray:
    rows, columns = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    first = 300 + 25 * rows + 20 * columns
    return np.stack([first, first + 1]).astype(np.uint16)


def predicted(
    path: Path, folder: Path, *, plan: Plan = Plan(jobs=0), **options: Any
) -> RasterPrediction:
    task = Thresholds()
    work = RasterPrediction(
        folder=folder, scenes=find_scenes(str(path), task.backbone, SceneOptions()), task=task,
        options=PredictOptions(**options),
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    build(work, plan, noun="scenes")
    return work


def test_the_map_has_georeference_nodata_and_names(tmp_path: Path) -> None:
    values = pixels()
    values[:, 20:30, 5:15] = 0  # nodata
    path = scene(tmp_path / "tile.tif", values)
    predicted(path, tmp_path / "out", overlap=0.5)
    with rasterio.open(tmp_path / "out/tile.tif") as found, rasterio.open(path) as given:
        assert found.crs == given.crs and found.transform == given.transform
        assert found.shape == given.shape and found.dtypes == ("uint8",) and found.nodata == 255
        assert found.descriptions == ("class",) and found.tags(1)["CLASS_2"] == "forest"
        assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        first = values[0].astype(int)
        wanted = (first >= 1000).astype(int) + (first >= 2000)
        wanted[first == 0] = 255
        assert np.array_equal(found.read(1), wanted)
        assert found.colorinterp[0].name == "palette"
        colours = [found.colormap(1)[n][:3] for n in range(3)]
        assert colours == class_colours(3) and found.colormap(1)[255][:3] == (0, 0, 0)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [".tile.tif.source", "tile.tif", "tile.tif.aux.xml", "tile.tif.png"]
    categories = ElementTree.parse(tmp_path / "out/tile.tif.aux.xml").iter("Category")
    assert [c.text for c in categories] == ["water", "field", "forest"]
    picture = np.asarray(Image.open(tmp_path / "out/tile.tif.png").convert("RGB"))
    shown = {tuple(c) for c in np.unique(picture.reshape(-1, 3), axis=0).tolist()}
    assert set(colours) <= shown


def test_a_changed_input_and_another_reading_are_predicted_again(
    tmp_path: Path, caplog: Any
) -> None:
    """A second call kept the map of the old file."""
    path, target = scene(tmp_path / "tile.tif", pixels((20, 20))), tmp_path / "out/tile.tif"
    predicted(path, tmp_path / "out")
    first = target.stat().st_mtime_ns
    predicted(path, tmp_path / "out")
    assert target.stat().st_mtime_ns == first and not caplog.records
    with rasterio.open(target) as found:
        before = found.read(1)
    scene(path, pixels((20, 20))[:, ::-1])
    predicted(path, tmp_path / "out")
    assert "tile.tif: its input has changed since" in caplog.text
    with rasterio.open(target) as found:
        assert np.array_equal(found.read(1), before[::-1]) and len(np.unique(before)) == 2


def test_chunks_of_a_store_that_are_written_over_are_another_input(tmp_path: Path) -> None:
    """Of stores no state was known: `embed` and `predict` kept what the old numbers gave."""
    write_cube(tmp_path / "a.zarr", coded(1, 2, 20), ("B02", "B03"), times=None)
    backbone, known = Thresholds().backbone, []
    for _ in range(2):
        [found] = find_scenes(str(tmp_path / "a.zarr"), backbone, SceneOptions(stored_unit="dn"))
        known.append(found.facts)
        chunk = tmp_path / "a.zarr/values/c/0/0/0"
        chunk.write_bytes(chunk.read_bytes())
        os.utime(chunk, ns=(1, 1))
    assert known[0] != known[1]


def test_damaged_scenes_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    """`predict --skip_bad` ended at the first raster that cannot be opened."""
    scene(tmp_path / "a.tif", pixels((20, 20)))
    (tmp_path / "b.tif").write_bytes(b"II*\0 nothing")
    backbone, left_out = Thresholds().backbone, dict[str, str]()
    [found] = find_scenes(str(tmp_path), backbone, SceneOptions(), left_out)
    assert found.name == "a" and list(left_out) == ["b"] and "b.tif" in left_out["b"]
    with pytest.raises(DataError, match="b.tif"):
        find_scenes(str(tmp_path / "b.tif"), backbone, SceneOptions(), {})


def test_a_full_disk_is_no_bad_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --skip_bad the map was left out as a damaged GeoTIFF, one scene after the other."""
    path = scene(tmp_path / "tile.tif", pixels((20, 20)))
    embedded = ViTBackbone(
        {"s2": {"kind": "image", "channels": ("B02", "B03"), "value_unit": "dn", "size": (8, 8)}},
        {"width": 8, "depth": 1, "heads": 1}, 4, normalization="identity",
    )  # fmt: skip

    def full(*args: object, **more: object) -> None:
        raise rasterio.errors.RasterioIOError("No space left on device")

    monkeypatch.setattr("rasterio.shutil.copy", full)
    said = r"cannot be written \(No space left on device\)\. Make room, or choose another --output"
    with pytest.raises(StorageError, match=said):
        predicted(path, tmp_path / "out", plan=Plan(jobs=0, skip_bad=True))
    with pytest.raises(StorageError, match=said):
        embed(embedded, path, tmp_path / "e.tif", plan=Plan(jobs=0, skip_bad=True))


def test_scenes_lie_in_folders_below(tmp_path: Path) -> None:
    """A folder of folders was told to hold no raster, and a VRT to be no Zarr store."""
    for name in ("x/one.tif", "y/two.tif", "z/s2.tif"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        scene(tmp_path / "in" / name, pixels((20, 20)))
    backbone = Thresholds().backbone
    found = find_scenes(str(tmp_path / "in"), backbone, SceneOptions())
    assert [s.name for s in found] == ["x__one", "y__two", "z"]
    (tmp_path / "vrt").mkdir()
    (tmp_path / "vrt" / "a.vrt").write_text("<VRTDataset/>")
    for given in ("vrt", "vrt/a.vrt"):
        with pytest.raises(DataError, match=r"VRT is not read.*gdal_translate"):
            find_scenes(str(tmp_path / given), backbone, SceneOptions())


def test_many_classes_have_colours_of_their_own(tmp_path: Path) -> None:
    colours = class_colours(300)
    assert len(set(colours)) == 300 and colours[:3] == class_colours(3)
    labels = np.arange(300, dtype=np.int16).reshape(15, 20)
    write_class_preview(tmp_path / "m.png", labels, [f"c{n}" for n in range(300)], nodata=-1)
    assert (tmp_path / "m.png").is_file()
    place = MapPlace(crs="EPSG:32633", corner=(500010.0, 5200020.0), step=10.0)
    write_class_map(
        tmp_path / "m.tif", labels, place, nodata=-1, classes=[f"<{n}>" for n in range(300)],
        colours=colours,
    )  # fmt: skip
    with rasterio.open(tmp_path / "m.tif") as found:
        assert found.dtypes == ("int16",) and found.tags(1)["CLASS_299"] == "<299>"
    [*categories] = ElementTree.parse(tmp_path / "m.tif.aux.xml").iter("Category")
    assert categories[299].text == "<299>"


def test_a_scene_smaller_than_a_window_and_one_in_degrees(tmp_path: Path) -> None:
    step = 10 / 111_319.49079327358
    transform = rasterio.transform.from_origin(12.0, 47.0, step, step)
    path = scene(tmp_path / "small.tif", pixels((9, 13)), crs="EPSG:4326", transform=transform)
    predicted(path, tmp_path / "out", window=(40_000,))  # ran for minutes: 16 pixels are enough
    with rasterio.open(tmp_path / "out/small.tif") as found:
        assert found.crs.to_epsg() == 4326 and found.shape == (9, 13)
        assert found.transform.almost_equals(transform, 1e-12)
        assert set(np.unique(found.read(1))) == {0}


def test_folders_are_scenes_or_one_scene_by_modality(tmp_path: Path) -> None:
    backbone = Thresholds().backbone
    for name in ("a", "b"):
        scene(tmp_path / f"{name}.tif", pixels((20, 20)))
    found = find_scenes(str(tmp_path), backbone, SceneOptions())
    assert [s.name for s in found] == ["a", "b"]
    scene(tmp_path / "a.1.tif", pixels((20, 20)))
    (tmp_path / "._a.tif").write_bytes(b"what some systems leave beside a file")
    found = find_scenes(str(tmp_path), backbone, SceneOptions())
    assert [s.name for s in found] == ["a.1", "a", "b"]
    (tmp_path / "list.csv").write_text("id,path\nfirst,b.tif\n")
    [one] = find_scenes(str(tmp_path / "list.csv"), backbone, SceneOptions())
    assert one.name == "first"
    scene(tmp_path / "s2.tif", pixels((20, 20)))
    [one] = find_scenes(str(tmp_path), backbone, SceneOptions())
    assert one.name == tmp_path.name and list(one.parts) == ["s2"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no GeoTIFF \(.tif.*folder is empty"):
        find_scenes(str(tmp_path / "empty"), backbone, SceneOptions())
