"""Runs over seeds, each a process: what is kept, what is repeated, what is not touched."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from domainssl.errors import ConfigError
from domainssl.matrix.runs import Finished, Run, train_all

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = """\
# A tiny run
seed_everything: 0
trainer: {{max_epochs: 8, accelerator: cpu, devices: 1, enable_model_summary: false}}
callbacks:
  evaluation: OnlineEvaluation
model:
  class_path: tiny.TinyObjective
  init_args: {{execution: {{seed: 0}}}}
data:
  class_path: learning_fakes.SeededData
  init_args: {{folder: {folder}, seed: 0}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the recipe `tiny.yaml`."""
    # Lightning's log handler keeps the stderr of the test that imported it
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def result(folder: Path, seed: int) -> dict:
    return json.loads((folder / f"runs/tiny/seed_{seed}/learning.json").read_text())


def stop(finished: Finished) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_call_that_was_stopped_is_taken_up(folder):
    (folder / "hold_1").touch()
    both = [Run(folder / "tiny.yaml", seed) for seed in (0, 1)]
    with pytest.raises(KeyboardInterrupt):
        train_all(both, folder / "runs", jobs=2, report=stop)
    assert "outcome" in result(folder, 0) and "outcome" not in result(folder, 1)
    kept = result(folder, 0)
    (folder / "hold_1").unlink()
    first, second = train_all(both, folder / "runs")
    assert first.is_known and not second.is_known
    assert result(folder, 0) == kept
    assert second.outcome.metrics != first.outcome.metrics  # another seed was trained
    assert second.outcome.items == 60 and second.outcome.contrastive
    assert first.cost["cpu_seconds"] > 1 and first.cost["memory_mb"] > 100


def test_another_text_of_the_recipe_is_another_run(folder):
    run = Run(folder / "tiny.yaml", 0)
    target = run.folder(folder / "runs")
    target.mkdir(parents=True)
    metrics = {"val/probe/s1": 0.9, "val/untrained/probe/s1": 0.5, "val/raw/probe/s1": 0.4}
    outcome = {"metrics": metrics, "items": 64, "contrastive": False}
    content = {"identity": run.identity(), "outcome": outcome, "cost": {}, "surroundings": {}}
    (target / "learning.json").write_text(json.dumps(content))
    assert train_all([run], folder / "runs")[0].is_known
    (folder / "tiny.yaml").write_text(RECIPE.format(folder=folder) + "unknown: 1\n")
    (again,) = train_all([run], folder / "runs")
    assert not again.is_known and again.outcome is None
    assert "fit ended with status 2" in again.error and "Unknown config key" in again.error


def test_other_code_makes_another_run(folder):
    identity = Run(folder / "tiny.yaml", 0).identity()
    assert len(identity["source_sha256"]) == 64 and identity["seed"] == 0


def test_a_folder_of_somebody_else_is_not_touched(folder):
    path = folder / "runs/tiny/seed_0/thesis.txt"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match="holds something that is no run of `matrix`"):
        train_all([Run(folder / "tiny.yaml", 0)], folder / "runs")
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_a_killed_call_takes_its_runs_with_it_and_is_taken_up(folder):
    os.mkfifo(folder / "hold_0")
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    code = (
        "from pathlib import Path; from domainssl.matrix.runs import Run, train_all; "
        "train_all([Run(Path('tiny.yaml').resolve(), 0)], Path('runs'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    with (folder / "hold_0").open() as run:
        assert run.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert run.read() == ""  # returns when the run has ended, too
    assert "outcome" not in result(folder, 0)
    (folder / "hold_0").unlink()
    train_all([Run(folder / "tiny.yaml", 0)], folder / "runs")
    assert "outcome" in result(folder, 0)
