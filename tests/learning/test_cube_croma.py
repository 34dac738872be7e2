"""Does the recipe on cubes learn, judged as the one on SSL4EO-S12 is, on 64 held-out windows."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from learning.test_ssl4eo_croma import check_learning, train

import domainssl

RECIPE = Path(domainssl.__file__).parent / "recipes" / "cube_croma.yaml"


@pytest.mark.slow
def test_the_recipe_on_cubes_learns_from_one_date_at_a_time(tmp_path, monkeypatch):
    # Lightning's log handler keeps the stderr of the test that imported it
    monkeypatch.setattr(logging, "raiseExceptions", False)
    check_learning(train(tmp_path / "run", 0, RECIPE))
