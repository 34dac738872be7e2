"""A pretrained backbone learns from few labels what a random one does not."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from recipe_runs import kept

from domainssl.cli import main

WORDS = (
    "--model.tuning.mode=frozen", "--model.optimization.lr=0.1", "--trainer.accelerator=cpu",
    "--data.loading.train_fraction=0.1", "--data.loading.train_draw=0", "--trainer.max_epochs=60",
    "--trainer.check_val_every_n_epoch=60", "--callbacks.checkpoint=null",
    "--callbacks.export=null", "--loggers.tensorboard=null",
)  # fmt: skip


def _accuracy(folder: Path, backbone: str) -> float:
    words = ["--config=recipes/finetune_tiles.yaml", f"--run_dir={folder}", *WORDS]
    assert main(["fit", *words, f"--model.backbone={backbone}"]) == 0
    with (folder / "metrics.csv").open(newline="") as file:
        found = [row["val/accuracy"] for row in csv.DictReader(file) if row["val/accuracy"]]
    return float(found[-1])


@pytest.mark.slow
def test_a_pretrained_backbone_beats_the_random_one_at_a_tenth_of_the_labels(tmp_path):
    random = _accuracy(tmp_path / "random", "recipe:tiles_mae")
    trained = _accuracy(tmp_path / "trained", str(kept("tiles_mae")))
    assert trained >= random + 0.03
