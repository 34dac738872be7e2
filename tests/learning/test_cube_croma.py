"""Does the recipe on cubes learn, judged as the one on SSL4EO-S12 is, on 64 held-out windows."""

from __future__ import annotations

import pytest
from recipe_runs import RECIPES, assert_learned, train


@pytest.mark.slow
def test_the_recipe_on_cubes_learns_from_one_date_at_a_time(tmp_path):
    assert_learned(train(tmp_path / "run", RECIPES / "cube_croma.yaml"))
