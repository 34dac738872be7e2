"""Every cell of the matrix is named; those whose learning is not tested train, resume, are probed.

In a file of its own, so that the recipes of `test_recipes.py` train in the other process; composing
all cells takes a minute, so that all tests that need them stand here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from recipe_runs import COVERED, LEARN

from domainssl.cli import main
from domainssl.cli.verbs.matrix import find_all
from domainssl.matrix.cells import Cell
from domainssl.matrix.record import read_record
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
        words += ["--data.global_batch_size=8"]  # steps of a fourth of the cell's
        first = ["--trainer.max_steps=10", "--trainer.limit_val_batches=0"]
        assert main([*words, *first]) == 0, cell.name
        assert main([*words, "--trainer.max_steps=20", "--auto_resume=true"]) == 0, cell.name
        metrics = read_outcome(run).metrics
        assert any(key.startswith("val/probe/") for key in metrics), cell.name


@pytest.mark.slow
def test_the_page_names_every_cell_of_the_registry_and_no_other(cells):
    page = Path(__file__).parents[2] / "docs/matrix.md"
    text = page.read_text(encoding="utf-8")
    remedy = "python -m domainssl matrix --seeds 0 --write docs/matrix.md names the cells anew"
    known = {entry.name: entry for entry in read_record(page.with_suffix(".json"))}
    assert known.keys() == {cell.name for cell in cells}, remedy
    trained, _, rest = text.partition("### Linear probe")
    waiting = rest.partition("### Not trained yet")[2].partition("###")[0]
    for cell in cells:
        name, entry = cell.name, known[cell.name]
        assert entry.reason == cell.reason, (name, remedy)
        if cell.reason:
            assert f"| `{cell.objective}` | {cell.column} | {cell.reason}" in text, (name, remedy)
        elif entry.runs:
            assert entry.sha256 == cell.sha256, (name, "the configuration has changed; train it")
            assert f"| `{name}` | {cell.objective} | {cell.column} |" in trained, (name, remedy)
        else:
            assert f"`{name}`" in waiting, (name, remedy)


@pytest.mark.slow
def test_the_list_gives_a_reason_for_every_cell_that_cannot_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["matrix", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ssl4eo_croma  CROMA, S1/S2 images: recipe" in lines
    refused = [line for line in lines if line.startswith("ssl4eo_swinunetr_ssl ")]
    assert len(refused) == 1 and "SwinUNETRSSL takes one volume" in refused[0]
    assert not any("yaml" in line or "Traceback" in line for line in lines)
    assert json.dumps(lines).count("recipe") >= 20
