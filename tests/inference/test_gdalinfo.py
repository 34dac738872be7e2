"""GDAL's own command and rasterio agree on what is written, and both with the pixels it is of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_data import REAL_DATA

from domainssl.backbones.vit import ViTBackbone
from domainssl.cli import main
from domainssl.inference.run import embed
from domainssl.tasks import SegmentationTask
from domainssl.tasks.export import export_task

rasterio = pytest.importorskip("rasterio")
REAL = REAL_DATA / "eo/terramesh_examples/S2L2A"
FILES = [*sorted(REAL.glob("*.tif")), None]  # None: made here, where no real pixels are
PATCH = 16


@pytest.fixture
def gdalinfo() -> Any:
    """What `gdalinfo -json` says of a file; a skip fails in CI, which installs it."""
    command = shutil.which("gdalinfo")
    if command is None:
        text = "no gdalinfo here (Debian: gdal-bin)"
        pytest.fail(text) if os.environ.get("CI") == "true" else pytest.skip(text)

    def of(path: Path) -> dict[str, Any]:
        found = subprocess.run([command, "-json", path], capture_output=True, check=True, text=True)
        return dict(json.loads(found.stdout))

    return of


@pytest.fixture(params=FILES, ids=lambda path: path.stem if path else "made")
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param is not None:
        return Path(request.param)
    path = tmp_path / "made.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=90, width=70, count=12, dtype="uint16", nodata=0,
        crs="EPSG:32719", transform=rasterio.Affine(10, 0, 300_010, 0, -10, 6_200_020),
    ) as file:  # fmt: skip
        file.write(np.random.default_rng(0).integers(1, 4000, (12, 90, 70)).astype(np.uint16))
    return path


def check(said: dict[str, Any], path: Path, bands: list[str]) -> None:
    """Compare what both tools say of a file."""
    with rasterio.open(path) as file:
        assert said["size"] == [file.width, file.height]
        assert said["geoTransform"] == list(file.transform.to_gdal())
        assert rasterio.crs.CRS.from_wkt(said["coordinateSystem"]["wkt"]) == file.crs
        assert [band["description"] for band in said["bands"]] == list(file.descriptions) == bands
        for band, nodata in zip(said["bands"], file.nodatavals, strict=True):
            assert float(band["noDataValue"]) == nodata or np.isnan([nodata]).all()
            assert np.isnan(nodata) == np.isnan(float(band["noDataValue"]))
    assert said["metadata"]["IMAGE_STRUCTURE"]["LAYOUT"] == "COG"


def test_an_embedding_and_a_map_keep_the_georeference_of_real_pixels(
    scene: Path, tmp_path: Path, gdalinfo: Any
) -> None:
    with rasterio.open(scene) as file:
        transform, crs, shape = file.transform, file.crs, file.shape
        names = tuple(f"B{n:02d}" for n in range(1, file.count + 1))
    facts = {
        "kind": "image", "channels": names, "value_unit": "dn", "size": (32, 32), "gsd_m": 10.0,
        "mean": (2e3,) * len(names), "std": (1e3,) * len(names),
    }  # fmt: skip
    torch.manual_seed(0)
    backbone = ViTBackbone({"s2": facts}, {"width": 8, "depth": 1, "heads": 2}, PATCH)
    out = tmp_path / "e.tif"
    embed(backbone, scene, out, form="cog", any_gsd=True, stored_unit="dn")
    said = gdalinfo(out)
    check(said, out, [f"feature {n}" for n in range(8)])
    left, wide, _, top, _, high = said["geoTransform"]
    assert wide == pytest.approx(PATCH * transform.a, rel=1e-9) and high == pytest.approx(-wide)
    assert abs(left - transform.c) < 0.01 * transform.a
    assert abs(top - transform.f) < 0.01 * transform.a
    assert said["size"] == [-(-n // PATCH) for n in reversed(shape)]
    task = SegmentationTask(
        backbone, modalities={"s2": facts}, classes=("a", "b"), head={"name": "linear"},
        context_size=32,
    )  # fmt: skip
    export_task(task, tmp_path / "task")
    words = [str(tmp_path / "task"), str(scene), f"--output={tmp_path / 'maps'}"]
    assert main(["predict", *words, "--any_gsd", "--stored_unit=dn"]) == 0
    [path] = (tmp_path / "maps").glob("*.tif")
    said = gdalinfo(path)
    check(said, path, ["class"])
    assert said["geoTransform"] == pytest.approx(list(transform.to_gdal()), rel=1e-9)
    assert rasterio.crs.CRS.from_wkt(said["coordinateSystem"]["wkt"]) == crs
    assert said["bands"][0]["metadata"][""]["CLASS_1"] == "b"
