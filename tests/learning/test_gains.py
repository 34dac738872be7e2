"""A pretrained backbone learns from a tenth of the labels what a random one does not.

One draw of the labels here; `docs/finetuning.md` has three.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_runs import assert_exports, kept

from domainssl.cli import main
from domainssl.cli.run.train import build_data
from domainssl.errors import ConfigError, DataError
from domainssl.matrix.gains import FEW, Gain, labelled, last_value, table, words_of


def _value(name: str, folder: Path, backbone: str) -> float:
    words = words_of(name, backbone, folder, draw=0, fraction=0.1)
    assert main(["fit", *words, "--trainer.accelerator=cpu", "--loggers.tensorboard=null"]) == 0
    return last_value(folder, FEW[name].metric)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_a_pretrained_backbone_beats_the_random_one_at_a_tenth_of_the_labels(name, tmp_path):
    random = _value(name, tmp_path / "random", f"recipe:{FEW[name].start}")
    trained = _value(name, tmp_path / "trained", str(kept(FEW[name].start)))
    assert trained >= random + 0.03, (trained, random)
    assert_exports(tmp_path / "trained", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_a_tenth_of_the_labels_are_eight_of_every_class(name):
    least = 6 if name == "finetune_pastis_crops" else 8  # eight patches, not each with every crop
    assert labelled(name, 3, 0.1, build_data) >= least


def test_every_recipe_of_fine_tuning_has_a_gain_that_can_be_measured():
    folder = Path(__file__).parents[2] / "recipes"
    assert {path.stem for path in folder.glob("finetune_*.yaml")} == set(FEW)
    for name, few in FEW.items():
        assert f"recipe:{few.start}" in (folder / f"{name}.yaml").read_text(encoding="utf-8")


def test_gains_are_means_over_draws(tmp_path):
    gain = Gain(
        recipe="finetune_tiles",
        metric="val/accuracy",
        random=(0.5, 0.25),
        trained=(0.75, 0.5),
        items=8,
        seconds=12.6,
    )
    assert gain.mean == 0.25
    row = table([gain], {"finetune_tiles": "`tiles_mae`"}).splitlines()[-1]
    assert row == (
        "| `finetune_tiles` | `tiles_mae` | accuracy | 8 "
        "| 0.500 0.250 | 0.750 0.500 | +0.250 | 13 |"
    )
    (tmp_path / "metrics.csv").write_text("step,val/iou\n1,0.5\n2,\n3,0.75\n")
    assert last_value(tmp_path, "val/iou") == 0.75
    with pytest.raises(DataError, match="no val/dice in metrics.csv"):
        (tmp_path / "metrics.csv").write_text("step,val/iou\n1,0.5\n")
        last_value(tmp_path, "val/dice")
    with pytest.raises(ConfigError, match="no recipe 'finetune_tile'.*Did you mean"):
        words_of("finetune_tile", "", tmp_path, 0, 0.1)
