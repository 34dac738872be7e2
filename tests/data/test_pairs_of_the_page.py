"""GeoTIFF pairs train from docs/data/cubes.md alone: its own YAML laid over the recipe."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import rasterio

from domainssl.cli.run.train import build_data
from domainssl.datamodules.cubes import SentinelCubeDataModule

S1 = 'path: "S1Hand/{site}_S1Hand.tif"'
S2 = 'path: "S2Hand/{site}_S2Hand.tif"'


def page(repository: Path) -> str:
    text = (repository / "docs" / "data" / "cubes.md").read_text(encoding="utf-8")
    [block] = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.S) if S1 in b]
    return block


def opened(repository: Path, folder: Path, overlay: str, root: Path) -> SentinelCubeDataModule:
    (folder / "mine.yaml").write_text(overlay.replace("/data/pairs", str(root)))
    recipe = repository / "recipes" / "cube_croma.yaml"
    data = build_data(["--config", str(recipe), "--config", str(folder / "mine.yaml")])
    data.setup("fit")
    return data


def checked(data: SentinelCubeDataModule, s2: Path) -> None:
    batch = next(iter(data.train_dataloader()))
    assert batch["s1"].shape[1:] == (2, 64, 64) and batch["s2"].shape[1:] == (12, 64, 64)
    assert batch["s1.valid"].float().mean() > 0.9 and batch["s2.valid"].float().mean() > 0.9
    with rasterio.open(s2) as file:
        geo = batch["s2.geo"][0]
        row, column = file.index(geo["c"] + geo["a"] / 2, geo["f"] + geo["e"] / 2)
        window = rasterio.windows.Window(column, row, 64, 64)
        whole = file.read(2, window=window).astype(np.float32)
    assert geo["a"] > 0 > geo["e"] and np.array_equal(batch["s2"][0, 1].numpy(), whole)


@pytest.fixture
def still() -> str:
    return (
        "    window: {jitter: false, flips: false, quarter_turns: false}\n"
        "    held_out: {val_fraction: 0.0}\n    global_batch_size: 1\n"
    )


def test_sen1floods11_trains_from_the_page(repository, tmp_path, shared_data, still) -> None:
    root = tmp_path / "pairs"
    for sensor in ("S1Hand", "S2Hand"):
        (root / sensor).mkdir(parents=True)
        [file] = (shared_data / "eo" / "sen1floods11").glob(f"*_{sensor}.tif")
        (root / sensor / file.name).symlink_to(file)
    data = opened(repository, tmp_path, page(repository) + still, root)
    checked(data, next((root / "S2Hand").iterdir()))


def test_terramesh_trains_from_the_page(repository, tmp_path, shared_data, still) -> None:
    root = shared_data / "eo" / "terramesh_examples"
    overlay = page(repository).replace(S1, 'path: "S1RTC/{site}.tif"')
    overlay = overlay.replace(S2, 'path: "S2L2A/{site}.tif"')
    data = opened(repository, tmp_path, overlay + still, root)
    assert [site.name for site in data.sites] == ["433D_629L_3_1", "637U_59R_1_3"]
    batch = next(iter(data.train_dataloader()))
    assert batch["s2"].shape[1:] == (12, 64, 64) and batch["s2.valid"].float().mean() > 0.9
