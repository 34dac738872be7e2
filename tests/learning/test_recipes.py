"""Recipes learn.

Each kind of data and each objective is trained to its end at least once, by a run that is kept for
other tests (`recipe_runs.kept`) and judged by what it logs; `docs/matrix.md` has all of them with
several seeds.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from recipe_runs import COVERED, LEARN, RECIPES, _clear, assert_exports, assert_learned, kept

from domainssl.matrix.cells import COLUMNS, column_of
from domainssl.matrix.runs import read_outcome

FOUND = sorted(
    (path for path in RECIPES.glob("*.yaml") if not path.stem.startswith("finetune_")),
    key=lambda path: path.stem,
)


def _objective(path: Path) -> str:
    model: str = yaml.safe_load(path.read_text())["model"]["class_path"]
    return model


def test_each_objective_and_each_kind_of_data_learns_once():
    names = {path.stem: path for path in FOUND}
    trained = {*LEARN, *COVERED}
    assert names.keys() > trained
    here = Path(__file__).parent
    assert all((here / f"test_{name}.py").is_file() for name in COVERED)
    assert {_objective(path) for path in FOUND} == {_objective(names[n]) for n in trained}
    columns = {n: column_of(n, yaml.safe_load(path.read_text())) for n, path in names.items()}
    assert {columns[name] for name in trained} == {column.title for column in COLUMNS}


@pytest.mark.slow
def test_labels_are_hidden_from_histograms_and_untrained_backbones():
    outcome = read_outcome(kept("ssl4eo_simclr"))
    assert outcome.items == 64 and outcome.contrastive and len(outcome.criteria()) == 8
    for name in ("s1", "s2", "joint"):
        assert outcome.metrics[f"val/raw/probe/{name}"] <= 0.4
        assert outcome.metrics[f"val/untrained/probe/{name}"] <= 0.65


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARN)
def test_a_recipe_learns_and_exports(name, tmp_path):
    assert_learned(read_outcome(kept(name)))
    assert_exports(kept(name), tmp_path / "out")


def test_runs_of_other_code_are_removed_after_a_day(tmp_path):
    names = [f"a-{16 * '0'}", f"a-{16 * '1'}", f"ab-{16 * '1'}"]
    fresh, old, other = (tmp_path / name for name in names)
    for folder in (fresh, old, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    _clear(tmp_path, "a")
    assert sorted(tmp_path.iterdir()) == [fresh, other]
