"""Does the recipe on cubes learn, judged as the one on SSL4EO-S12 is, on 64 held-out windows."""

from __future__ import annotations

import pytest
from recipe_runs import assert_learned, kept

from domainssl.matrix.runs import read_outcome


@pytest.mark.slow
def test_the_recipe_on_cubes_learns_from_one_date_at_a_time():
    assert_learned(read_outcome(kept("cube_croma")))
