"""Land cover is learned from a tenth of the labels: pretrained features beat random ones."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from recipe_runs import RECIPES, kept

from domainssl.cli import main

FEW = (
    "--data.loading.train_fraction=0.1", "--data.global_batch_size=5", "--trainer.max_epochs=75",
    "--trainer.check_val_every_n_epoch=75", "--trainer.log_every_n_steps=2",
    "--model.tuning.mode=frozen", "--callbacks.checkpoint=null", "--callbacks.export=null",
)  # fmt: skip


def _iou(folder: Path, *more: str) -> float:
    recipe = RECIPES / "finetune_ssl4eo_landcover.yaml"
    words = ["fit", "--config", str(recipe), f"--run_dir={folder}", "--trainer.accelerator=cpu"]
    assert main([*words, *FEW, *more]) == 0
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [float(row["val/iou"]) for row in csv.DictReader(file) if row.get("val/iou")][-1]


@pytest.mark.slow
def test_pretrained_features_tell_land_cover_from_a_tenth_of_the_labels(tmp_path: Path) -> None:
    """Same head, schedule and labels; the head alone is trained."""
    trained = _iou(tmp_path / "trained", f"--model.backbone={kept('ssl4eo_croma')}")
    random = _iou(tmp_path / "random")
    assert trained >= random + 0.03, (trained, random)
