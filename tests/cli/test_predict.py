"""The verb `predict` with a saved task: a scan or a raster in, a class map on its own grid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scan_files import oblique, write_nifti

from domainssl.backbones.vit import ViTBackbone
from domainssl.cli import main
from domainssl.cli.reading import refuse_unread
from domainssl.cli.verbs import embed
from domainssl.errors import ConfigError
from domainssl.io.ids import ids_of
from domainssl.tasks import SegmentationTask
from domainssl.tasks.export import export_task

nibabel = pytest.importorskip("nibabel")
VOLUME = {"kind": "volume", "channels": ("ct",), "value_unit": "hu", "size": (8, 8, 8)}
IMAGE = {"kind": "image", "channels": ("B02",), "value_unit": "dn", "size": (8, 8), "gsd_m": 10.0}


def saved(folder: Path, name: str, facts: dict[str, Any], head: str) -> SegmentationTask:
    torch.manual_seed(0)
    backbone = ViTBackbone({name: facts}, {"width": 12, "depth": 1, "heads": 1}, 4)
    task = SegmentationTask(
        backbone, modalities={name: facts}, classes=("air", "organ", "bone"), head={"name": head},
        context_size=8,
    )  # fmt: skip
    export_task(task, folder)
    return task.eval()


def test_a_scan_becomes_a_map_equal_to_monai_in_memory(tmp_path: Path, capsys: Any) -> None:
    inferers = pytest.importorskip("monai.inferers")
    facts = {**VOLUME, "mean": (40.0,), "std": (300.0,)}
    task = saved(tmp_path / "task", "ct", facts, "light")
    values = np.random.default_rng(0).normal(0, 300, (14, 11, 9)).astype(np.float32)
    path = write_nifti(tmp_path / "scan.nii.gz", values, oblique())
    words = ["predict", str(tmp_path / "task"), str(path), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert "1 map; classes: 0 air, 1 organ, 2 bone" in capsys.readouterr().out
    told = json.loads((tmp_path / "out/scan.nii.gz.json").read_text())
    assert told["labels"] == {"0": "air", "1": "organ", "2": "bone"} and len(told["colours"]) == 3
    assert (tmp_path / "out/scan.nii.gz.png").read_bytes().startswith(b"\x89PNG")
    found = nibabel.as_closest_canonical(nibabel.load(tmp_path / "out/scan.nii.gz"))
    given = nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_allclose(found.affine, given.affine, atol=1e-5)
    x = torch.from_numpy(given.get_fdata(dtype=np.float32).copy())[None, None]
    with torch.no_grad():
        wanted = inferers.sliding_window_inference(
            x, 8, 1, lambda part: task.logits({"ct": part}), overlap=0.25, mode="gaussian"
        )[0].argmax(0)
    assert (np.asarray(found.dataobj) == wanted.numpy()).mean() > 0.999  # rounding at borders
    assert main(words) == 0 and "1 of them before" in capsys.readouterr().out
    assert main([*words, "--overlap=0.5"]) == 2
    assert "overlap differ" in capsys.readouterr().err
    assert main([*words, "--overlap=0.5", "--restart"]) == 0
    hidden = [*words[:-1], str(tmp_path / "hidden"), "--ids=hashed"]
    assert main(hidden) == 0
    names = {p.name for p in (tmp_path / "hidden").glob("[!.]*")} - {"predict.json"}
    [key] = ids_of(["scan"], "hashed")
    assert names == {f"{key}.nii.gz{end}" for end in ("", ".json", ".png")}
    assert main([*words[:-1], str(tmp_path / "map.nii.gz")]) == 2
    assert "maps and regions go into a folder" in capsys.readouterr().err


def test_a_raster_becomes_a_cog(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    saved(tmp_path / "task", "s2", {**IMAGE, "mean": (500.0,), "std": (300.0,)}, "linear")
    transform = rasterio.transform.from_origin(500010.0, 5200020.0, 10.0, 10.0)
    with rasterio.open(
        tmp_path / "tile.tif", "w", driver="GTiff", height=21, width=19, count=1, dtype="uint16",
        crs="EPSG:32633", transform=transform,
    ) as file:  # fmt: skip
        file.write(np.random.default_rng(0).integers(1, 999, (1, 21, 19)).astype(np.uint16))
        file.descriptions = ("B02",)
    words = [str(tmp_path / "task"), str(tmp_path / "tile.tif"), f"--output={tmp_path / 'out'}"]
    assert main(["predict", *words]) == 0
    with rasterio.open(tmp_path / "out/tile.tif") as found:
        assert found.crs.to_epsg() == 32633 and found.transform == transform
        assert found.tags(1)["CLASS_1"] == "organ" and set(np.unique(found.read(1))) <= {0, 1, 2}


def test_an_input_is_no_result_and_is_never_deleted(tmp_path: Path, capsys: Any) -> None:
    rasterio = pytest.importorskip("rasterio")
    saved(tmp_path / "task", "s2", {**IMAGE, "mean": (500.0,), "std": (300.0,)}, "linear")
    path = tmp_path / "in" / "tile.tif"
    path.parent.mkdir()
    with rasterio.open(
        path, "w", driver="GTiff", height=9, width=9, count=1, dtype="uint16", crs="EPSG:32633",
        transform=rasterio.transform.from_origin(500010.0, 5200020.0, 10.0, 10.0),
    ) as file:  # fmt: skip
        file.write(np.random.default_rng(0).integers(1, 999, (1, 9, 9)).astype(np.uint16))
        file.descriptions = ("B02",)
    before = path.read_bytes()
    into = f"--output={path.parent}"
    for given in (path, path.parent):
        for more in ([], ["--restart"]):
            assert main(["predict", str(tmp_path / "task"), str(given), into, *more]) == 2
            assert "is the input" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tile.tif").write_bytes(b"of somebody")
    words = ["predict", str(tmp_path / "task"), str(path), f"--output={tmp_path / 'out'}"]
    for more in ([], ["--restart"]):
        assert main([*words, *more]) == 2
        assert "was not written by predict" in capsys.readouterr().err
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["tile.tif"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tile.tif"]
    assert (tmp_path / "out" / "tile.tif").read_bytes() == b"of somebody"


@pytest.mark.parametrize(
    ("domain", "pooled", "words", "answer"),
    [
        ("rasters", False, ["--scan", "volume=0"], "--scan: is read for volumes"),
        ("rasters", False, ["--mpp_um=0.5"], "--mpp_um: is read for slides"),
        ("rasters", True, ["--halo=1"], "--pooled writes one table"),
        ("volumes", False, ["--crs=EPSG:32632"], "--crs: is read for rasters"),
        ("slides", False, ["--date=first"], "--date: is read for rasters"),
        ("bags", False, ["--window=8"], "--window: is read for rasters and volumes and slides"),
        ("rasters", False, ["--crs=EPSG:32632", "--window=8", "--any_gsd"], ""),
    ],
)
def test_options_about_inputs_of_another_domain_are_refused(
    domain: str, pooled: bool, words: list[str], answer: str
) -> None:
    """Nothing read them, and nobody said so."""
    parser = embed._parser()
    options = parser.parse_args(["BACKBONE", "INPUT", "--output=x", *words])
    if not answer:
        return refuse_unread(parser, options, domain, pooled=pooled)
    with pytest.raises(ConfigError, match=answer):
        refuse_unread(parser, options, domain, pooled=pooled)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["embed", "B", "I", "--output=x", "--split=test"], "is a part of the data of a recipe"),
        (["tile", "S", "--output=x", "--layout=zarr"], "counts with --features only"),
        (["tile", "S", "--output=x", "--min_region=0.1"], "counts with --regions only"),
    ],
)
def test_options_that_count_beside_another_only_are_refused(
    words: list[str], answer: str, capsys: Any
) -> None:
    assert main(words) == 2
    assert answer in " ".join(capsys.readouterr().err.split())


def test_both_forms_are_told_apart_and_explained(tmp_path: Path, capsys: Any) -> None:
    assert main(["predict", "--help"]) == 0
    said = capsys.readouterr().out
    assert "TASK INPUT" in said and "predict --config RECIPE" in said
    assert main(["predict", "recipes/ct_mae3d.yaml", "x", "--output", str(tmp_path)]) == 2
    assert "predict --config recipes/ct_mae3d.yaml" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "none"), "x", "--output", str(tmp_path)]) == 2
