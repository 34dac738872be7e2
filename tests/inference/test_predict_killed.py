"""`predict` killed by SIGKILL in the middle goes on, and what it writes is that of a whole call."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import bag_files
import numpy as np
import pytest
import torch
from processes import killed
from slide_files import write_tiff

from domainssl.backbones.slide import TITANBackbone
from domainssl.backbones.vit import ViTBackbone
from domainssl.cli import main
from domainssl.modality import Modality
from domainssl.tasks import ClassificationTask, SegmentationTask
from domainssl.tasks.export import export_task

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("h5py")
SMALL = {"width": 12, "depth": 1, "heads": 1}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is a fork")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check(
    folder: Path, source: Path, at: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> set[str]:
    """Predict once as a whole, once killed at a call; return what the kill has left."""
    words = ["predict", str(folder / "task"), str(source), "--output"]
    assert main([*words, str(folder / "whole")]) == 0
    name, number = at
    cls = SegmentationTask if name == "logits" else ClassificationTask
    original, calls = getattr(cls, name), []

    def dying(self: object, batch: object) -> object:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch)

    def call() -> None:
        monkeypatch.setattr(cls, name, dying)
        main([*words, str(folder / "killed")])

    assert killed(call)
    left = set(contents(folder / "killed"))
    assert main([*words, str(folder / "killed")]) == 0
    assert contents(folder / "killed") == contents(folder / "whole")
    return left


def test_a_map_goes_on_after_the_rows_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    facts = {
        "kind": "image", "channels": ("B02",), "value_unit": "dn", "size": (8, 8), "gsd_m": 10.0,
        "mean": (500.0,), "std": (300.0,),
    }  # fmt: skip
    task = SegmentationTask(
        ViTBackbone({"s2": facts}, SMALL, 4), modalities={"s2": facts}, classes=("a", "b", "c"),
        head={"name": "linear"}, context_size=8,
    )  # fmt: skip
    export_task(task, tmp_path / "task")
    with rasterio.open(
        tmp_path / "tile.tif", "w", driver="GTiff", height=40, width=16, count=1, dtype="uint16",
        crs="EPSG:32633", transform=rasterio.Affine(10, 0, 500_000, 0, -10, 5_200_000),
    ) as file:  # fmt: skip
        file.write(np.random.default_rng(0).integers(1, 999, (1, 40, 16)).astype(np.uint16))
        file.descriptions = ("B02",)
    left = check(tmp_path, tmp_path / "tile.tif", ("logits", 11), monkeypatch)
    assert {".tile.tif.part-map", ".tile.tif.part-rows", "predict.json"} <= left
    assert "tile.tif" not in left


def test_slides_that_are_done_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    he = Modality(
        name="he", kind="image", channels=("r", "g", "b"), value_unit="rgb8", size=(32, 32),
        mpp_um=1.0, mean=(128.0,) * 3, std=(64.0,) * 3,
    )  # fmt: skip
    task = ClassificationTask(
        ViTBackbone({"he": he}, SMALL, 8), modalities={"he": he}, classes=("a", "b")
    )
    export_task(task, tmp_path / "task")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = np.full((256, 256, 3), 245, np.uint8)
        pixels[32:224, 32:224] = rng.integers(100, 140, (192, 192, 3)) * np.array([1.5, 0.5, 1.2])
        write_tiff(tmp_path / "slides" / f"{name}.tif", [pixels])
    left = check(tmp_path, tmp_path / "slides", ("with_weights", 2), monkeypatch)
    assert "a.geojson" in left and "b.geojson" not in left


def test_rows_that_are_done_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    bag = Modality(
        name="tile_features", kind="features", channels=tuple(f"f{i}" for i in range(bag_files.D)),
        value_unit="arbitrary", mpp_um=0.5, mean=(20.0,) * bag_files.D, std=(20.0,) * bag_files.D,
    )  # fmt: skip
    task = ClassificationTask(
        TITANBackbone({"tile_features": bag}, width=16, depth=1, heads=2),
        modalities={"tile_features": bag}, classes=("a", "b"), head={"kind": "gated", "hidden": 8},
    )  # fmt: skip
    export_task(task, tmp_path / "task")
    path = bag_files.trident(tmp_path / "job")
    for name in ("other", "third"):
        (path.parent / f"{name}.h5").write_bytes(path.read_bytes())
    left = check(tmp_path, tmp_path / "job", ("with_weights", 2), monkeypatch)
    assert "predictions.csv" not in left
    assert {n for n in left if n.endswith(".h5")} == {"attention/other.h5"}
