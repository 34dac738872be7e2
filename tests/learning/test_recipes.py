"""Every recipe learns: one run each with one seed, judged by what the run itself logs."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_runs import RECIPES, assert_learned, train

COVERED = {"ssl4eo_croma", "cube_croma"}  # they have files of their own beside this one
FOUND = sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem)


def test_recipes_are_found_and_those_tested_elsewhere_exist():
    names = {path.stem for path in FOUND}
    assert names > COVERED
    here = Path(__file__).parent
    assert all((here / f"test_{name}.py").is_file() for name in COVERED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [p for p in FOUND if p.stem not in COVERED], ids=lambda p: p.stem
)
def test_a_recipe_learns(recipe, tmp_path):
    assert_learned(train(tmp_path / "run", recipe))
