"""Does the recipe learn: better than no training, better than band statistics, across sensors.

Judged on the 64 held-out locations of the sample by what the run itself logs; probes get 10 labels
per class.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_runs import RECIPES, assert_learned, kept, train

from domainssl.matrix.runs import Outcome, read_outcome

pytestmark = pytest.mark.slow
REPRESENTATIONS = ("s1", "s2", "joint")
DIRECTIONS = ("s1-s2", "s2-s1")


@pytest.fixture(scope="module")
def trained(sample_root: Path) -> Outcome:
    """What one run of the recipe found."""
    return read_outcome(kept("ssl4eo_croma"))


def test_the_recipe_learns_what_neither_the_untrained_backbone_nor_band_statistics_know(trained):
    assert trained.items == 64 and trained.contrastive
    assert len(trained.criteria()) == 2 * len(REPRESENTATIONS) + len(DIRECTIONS)
    assert_learned(trained)


def test_labels_of_the_sample_are_hidden_from_band_statistics_and_untrained_backbones(trained):
    for name in REPRESENTATIONS:
        assert trained.metrics[f"val/raw/probe/{name}"] <= 0.5
        assert trained.metrics[f"val/untrained/probe/{name}"] <= 0.65


def test_shuffled_pairs_bring_no_gain(sample_root, tmp_path):
    text = (RECIPES / "ssl4eo_croma.yaml").read_text()
    assert text.count("class_path: SSL4EOS12DataModule") == 1
    control = tmp_path / "control.yaml"
    control.write_text(text.replace("SSL4EOS12DataModule", "shuffled_pairs.ShuffledPairs"))
    outcome = train(tmp_path / "run", control)
    metrics = outcome.metrics
    for direction in DIRECTIONS:
        assert metrics[f"val/retrieval/{direction}/R@1"] < 5 / outcome.items
    gains = [
        metrics[f"val/probe/{name}"] - metrics[f"val/untrained/probe/{name}"]
        for name in REPRESENTATIONS
    ]
    # true pairs gain 0.4 and more; 24 tested items per split leave a noise of some hundredths
    assert sum(gains) / len(gains) < 0.1, gains
