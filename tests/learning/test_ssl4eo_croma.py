"""Does the recipe learn: better than no training, better than band statistics, across sensors.

Judged on the 64 held-out locations of the sample by what the run itself logs; probes get 10 labels
per class.
"""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest

import domainssl
from domainssl.cli import main

RECIPE = Path(domainssl.__file__).parent / "recipes" / "ssl4eo_croma.yaml"
LOCATIONS = 64
REPRESENTATIONS = ("s1", "s2", "joint")
DIRECTIONS = ("s12s2", "s22s1")


def train(folder: Path, seed: int = 0, recipe: Path = RECIPE) -> dict[str, float]:
    """Run a recipe on the CPU and return the last value of every metric of its evaluation."""
    words = ["fit", "--config", str(recipe), f"--run_dir={folder}", "--trainer.accelerator=cpu"]
    words += [f"--seed_everything={seed}", f"--model.seed={seed}", f"--data.seed={seed}"]
    assert main(words) == 0
    return last_metrics(folder)


def last_metrics(folder: Path) -> dict[str, float]:
    """Return the last value of every metric of the held-out items."""
    last: dict[str, float] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            last.update({k: float(v) for k, v in row.items() if k.startswith("val/") and v})
    return last


def check_learning(metrics: dict[str, float]) -> None:
    """Assert the criteria that hold for every method, and those of contrastive ones."""
    for name in REPRESENTATIONS:
        trained = metrics[f"val/probe/{name}"]
        untrained = metrics[f"val/untrained/probe/{name}"]
        raw = metrics[f"val/raw/probe/{name}"]
        assert trained >= untrained + 0.05, f"{name}: {trained:.2f}, untrained {untrained:.2f}"
        assert trained > raw, f"{name}: {trained:.2f}, per-band statistics {raw:.2f}"
    for direction in DIRECTIONS:
        found = metrics[f"val/retrieval/{direction}/R@1"]
        assert found >= 10 / LOCATIONS, f"{direction}: {found:.3f}, chance {1 / LOCATIONS:.3f}"


@pytest.fixture(autouse=True)
def _quiet_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning's log handler keeps the stderr of the test that imported it
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(scope="module")
def trained(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Metrics of one run of the recipe."""
    return train(tmp_path_factory.mktemp("learning") / "run")


@pytest.mark.timeout(600)
def test_the_recipe_learns_what_neither_the_untrained_backbone_nor_band_statistics_know(trained):
    check_learning(trained)


def test_labels_of_the_sample_are_hidden_from_band_statistics_and_untrained_backbones(trained):
    for name in REPRESENTATIONS:
        assert trained[f"val/raw/probe/{name}"] <= 0.5
        assert trained[f"val/untrained/probe/{name}"] <= 0.65


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_recipe_learns_whatever_the_seed(sample_root, tmp_path, seed):
    check_learning(train(tmp_path / "run", seed))


@pytest.mark.slow
def test_shuffled_pairs_bring_no_gain(sample_root, tmp_path):
    text = RECIPE.read_text()
    assert text.count("class_path: SSL4EOS12DataModule") == 1
    control = tmp_path / "control.yaml"
    control.write_text(text.replace("SSL4EOS12DataModule", "shuffled_pairs.ShuffledPairs"))
    metrics = train(tmp_path / "run", 0, control)
    for direction in DIRECTIONS:
        assert metrics[f"val/retrieval/{direction}/R@1"] < 5 / LOCATIONS
    gains = [
        metrics[f"val/probe/{name}"] - metrics[f"val/untrained/probe/{name}"]
        for name in REPRESENTATIONS
    ]
    # true pairs gain 0.4 and more; 24 tested items per split leave a noise of some hundredths
    assert sum(gains) / len(gains) < 0.1, gains
