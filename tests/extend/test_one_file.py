"""An objective and a DataModule of one file each, in a subfolder, and no other file touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from domainssl.cli.config import catalog
from domainssl.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]

OBJECTIVE = '''
"""Predicts the mean of every modality from its pooled features."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from domainssl.backbones.encoders.backbone import EncoderBackbone
from domainssl.objectives.base import Objective, Step

__all__ = ["Levels"]


class Levels(Objective):
    """Predicts band means.

    Args:
        modalities: Of the data.
        shared: Of every objective.
    """

    def __init__(self, modalities: Mapping[str, Any], **shared: Any) -> None:
        super().__init__(**shared)
        self.backbone = EncoderBackbone(modalities, encoder="resnet18")
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(self.backbone.embed_dim[name], m.num_channels)
                for name, m in self.backbone.modalities.items()
            }
        )

    def draw(self, batch, generators):
        return {}

    def forward(self, batch, draws, outputs=False):
        x = self.backbone.normalize(batch)
        pooled = self.backbone.encode(x).pooled
        return Step(
            {n: (h(pooled[n]) - x[n].mean((2, 3))).square().mean() for n, h in self.heads.items()}
        )
'''

DATA = '''
"""Noise of two sensors."""

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from domainssl.modality import Modality, collate

__all__ = ["NoiseDataModule"]


class NoiseDataModule(LightningDataModule):
    """Noise of two sensors.

    Args:
        items: How many there are.
    """

    def __init__(self, items: int = 8) -> None:
        super().__init__()
        self.items = items
        self.modalities = {
            name: Modality(
                name=name, kind="image", channels=bands, value_unit="arbitrary", size=(32, 32),
                mean=(0.0,) * len(bands), std=(1.0,) * len(bands),
            )
            for name, bands in (("s1", ("VV", "VH")), ("s2", ("B02", "B03", "B04")))
        }

    def train_dataloader(self):
        def item(i):
            noise = torch.Generator().manual_seed(i)
            sizes = {n: (m.num_channels, 32, 32) for n, m in self.modalities.items()}
            return {"id": str(i), **{n: torch.randn(s, generator=noise) for n, s in sizes.items()}}

        return DataLoader([item(i) for i in range(self.items)], 4, collate_fn=collate)

    val_dataloader = train_dataloader
'''

RECIPE = """\
seed_everything: 0
trainer: {max_epochs: 1, accelerator: cpu, devices: 1, enable_progress_bar: false}
loggers: {tensorboard: null}
callbacks: {}
model: Levels
data: {class_path: NoiseDataModule, init_args: {items: 8}}
"""

SCAN = """
import json
import domainssl
from domainssl.cli.config.catalog import find_classes
import domainssl.objectives, domainssl.datamodules
data = domainssl.datamodules.NoiseDataModule(items=4)
model = domainssl.objectives.Levels(modalities=data.modalities)
batch = next(iter(data.train_dataloader()))
losses = model(batch, model.draw(batch, model.generators(0))).losses
print(json.dumps({
    "model": find_classes("model")["Levels"], "data": find_classes("data")["NoiseDataModule"],
    "listed": ["Levels" in domainssl.list_objectives(),
               "NoiseDataModule" in domainssl.list_datamodules()],
    "losses": sorted(losses), "file": domainssl.__file__,
}))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package with one new file in a subfolder of each part."""
    package = tmp_path / "copy" / "domainssl"
    ignored = shutil.ignore_patterns("__pycache__", "*.md")
    shutil.copytree(REPOSITORY / "domainssl", package, ignore=ignored)
    for part, name, text in (("objectives", "levels", OBJECTIVE), ("datamodules", "noise", DATA)):
        folder = package / part / "added"
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
    return package


@pytest.fixture
def found_in(copy: Path, monkeypatch):
    monkeypatch.setattr(catalog, "package_folder", lambda: copy)
    catalog.find_classes.cache_clear()
    yield copy
    catalog.find_classes.cache_clear()


def test_a_file_in_a_subfolder_is_found_by_the_command_line(found_in: Path) -> None:
    assert catalog.find_classes("model")["Levels"] == "domainssl.objectives.added.levels.Levels"
    home = "domainssl.datamodules.added.noise.NoiseDataModule"
    assert catalog.find_classes("data")["NoiseDataModule"] == home


def test_a_name_that_two_files_define_is_refused_with_both(found_in: Path) -> None:
    (found_in / "objectives/added/croma.py").write_text(OBJECTIVE.replace("Levels", "CROMA"))
    with pytest.raises(ConfigError) as error:
        catalog.find_classes("model")
    text = str(error.value)
    assert "objectives.added.croma.CROMA" in text and "objectives.croma.CROMA" in text


@pytest.mark.slow
def test_one_file_each_is_scanned_built_and_trained(copy: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copy.parent), "OMP_NUM_THREADS": "1"}

    def python(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    facts = json.loads(python("-W", "ignore", "-c", SCAN).splitlines()[-1])
    assert facts == {
        "model": "domainssl.objectives.added.levels.Levels",
        "data": "domainssl.datamodules.added.noise.NoiseDataModule",
        "listed": [True, True],
        "losses": ["s1", "s2"],
        "file": str(copy / "__init__.py"),
    }
    (tmp_path / "added.yaml").write_text(RECIPE)
    python("-m", "domainssl", "fit", "--config", "added.yaml", f"--run_dir={tmp_path / 'run'}")
    assert list((tmp_path / "run").rglob("*")), "the run wrote nothing"
