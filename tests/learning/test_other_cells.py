"""Every cell of the matrix whose learning is not tested trains, resumes and is probed.

In a file of its own, so that the recipes of `test_recipes.py` train in the other process.
"""

from __future__ import annotations

import pytest
import yaml
from recipe_runs import COVERED, LEARN

from domainssl.cli import main
from domainssl.cli.verbs.matrix import find_all
from domainssl.matrix.cells import Cell
from domainssl.matrix.runs import read_outcome


@pytest.fixture(scope="module")
def cells() -> tuple[Cell, ...]:
    """All cells of the matrix."""
    return find_all()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_other_cell_trains_resumes_and_is_probed(cells, part, tmp_path):
    others = [c for c in cells if not c.reason and c.name not in {*LEARN, *COVERED}]
    assert len(others) > 30
    for cell in others[part::8]:
        path, run = tmp_path / f"{cell.name}.yaml", tmp_path / cell.name
        config = {**cell.config, "callbacks": {"evaluation": "OnlineEvaluation"}}
        config["callbacks"]["checkpoint"] = {
            "class_path": "AtomicCheckpoint",
            "init_args": {"every_n_train_steps": 10},
        }
        path.write_text(yaml.safe_dump(config))
        words = ["fit", f"--config={path}", f"--run_dir={run}", "--trainer.accelerator=cpu"]
        words += ["--trainer.max_epochs=null", "--trainer.val_check_interval=null"]
        assert main([*words, "--trainer.max_steps=10"]) == 0, cell.name
        assert main([*words, "--trainer.max_steps=20", "--auto_resume=true"]) == 0, cell.name
        metrics = read_outcome(run).metrics
        assert any(key.startswith("val/probe/") for key in metrics), cell.name
