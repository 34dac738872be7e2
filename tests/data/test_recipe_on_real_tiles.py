"""The CROMA recipe trains on release-A and release-B files written from real tiles."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from real_tiles import write_real

from domainssl.cli import main
from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule
from domainssl.sources.dates import Dates

REPOSITORY = Path(__file__).resolve().parents[2]
# README.md beside the real data: central 120 pixels of the two places, S2L2A with its stored offset
S1_MEANS = [[-12.0966, -17.9069], [-10.6673, -17.1240]]
L2A_BLUE = 1440.6528 - 1000


@pytest.fixture(scope="module", params=["A", "B"])
def root(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_data: Path
) -> Path:
    folder = tmp_path_factory.mktemp("real")
    write_real(folder, shared_data, request.param, repeat=2)
    return folder


def test_held_out_items_are_the_central_crops_with_their_published_means(root: Path) -> None:
    dates = Dates(mode="fixed", positions=0)
    data = SSL4EOS12DataModule(root=str(root), global_batch_size=4, dates=dates)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert batch["s2"].shape == (4, 12, 120, 120) and batch["s2.valid"].all()
    found = batch["s1"].double().mean((2, 3)).numpy()
    np.testing.assert_allclose(found, S1_MEANS * 2, atol=1e-4)
    assert float(batch["s2"][0, 1].double().mean()) == pytest.approx(L2A_BLUE, abs=1e-4)


def test_recipe_trains_on_them(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    status = main(
        [
            "fit",
            f"--config={REPOSITORY / 'recipes' / 'ssl4eo_croma.yaml'}",
            f"--data.root={root}",
            "--data.global_batch_size=4",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=2",
            "--trainer.check_val_every_n_epoch=2",
            "--trainer.log_every_n_steps=1",
            "--callbacks.evaluation=null",
            "--callbacks.panels.init_args.every_n_epochs=2",
        ]
    )
    assert status == 0
    [metrics] = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.open()))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert list(tmp_path.rglob("backbone.safetensors")) and list(tmp_path.rglob("*.png"))
