"""Runs over seeds: what is kept, what is repeated, and the page that is written."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from domainssl.cli import main
from domainssl.matrix.runs import Finished, Outcome, Run, train_all
from domainssl.matrix.tables import BEGIN, END, markdown, write_page

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
    return json.loads((folder / f"runs/learning/tiny/seed_{seed}/learning.json").read_text())


def stop(finished: Finished) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_call_that_was_stopped_is_taken_up_and_writes_the_page(folder, capsys):
    (folder / "hold_1").touch()
    both = [Run(folder / "tiny.yaml", seed) for seed in (0, 1)]
    with pytest.raises(KeyboardInterrupt):
        train_all(both, folder / "runs/learning", jobs=2, report=stop)
    assert "outcome" in result(folder, 0) and "outcome" not in result(folder, 1)
    kept = result(folder, 0)
    (folder / "hold_1").unlink()
    page = folder / "page.md"
    page.write_text(f"# Page\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    status = main(["learning", "tiny.yaml", "--seeds", "0", "1", "--write=page.md"])
    said = capsys.readouterr().out
    assert "[1/2] tiny, seed 0:" in said and "known from an earlier call" in said
    assert "[2/2] tiny, seed 1:" in said and said.count("known from") == 1
    assert result(folder, 0) == kept
    other = result(folder, 1)
    assert other["outcome"]["metrics"] != kept["outcome"]["metrics"]  # another seed was trained
    assert other["outcome"]["items"] == 60 and other["outcome"]["contrastive"]
    assert kept["cost"]["cpu_seconds"] > 1
    text = page.read_text()
    assert text.startswith("# Page\n\nBefore.\n") and text.endswith("\n\nAfter.\n")
    assert "old" not in text
    assert "`python -m domainssl learning tiny.yaml --seeds 0 1`" in text
    rows = [line for line in text.splitlines() if line.startswith("| `tiny` | joint |")]
    assert len(rows) == 1 and rows[0].startswith("| `tiny` | joint | 33.3 |")
    missed = [
        c
        for s in (0, 1)
        for c in Outcome(**result(folder, s)["outcome"]).criteria()
        if not c.passed
    ]
    assert status == int(bool(missed))


def test_another_text_of_the_recipe_is_another_run(folder):
    run = Run(folder / "tiny.yaml", 0)
    target = run.folder(folder / "runs")
    target.mkdir(parents=True)
    outcome = {"metrics": made_up(0.9), "items": 64, "contrastive": True}
    content = {"identity": run.identity(), "outcome": outcome, "cost": {}, "surroundings": {}}
    (target / "learning.json").write_text(json.dumps(content))
    assert train_all([run], folder / "runs")[0].is_known
    (folder / "tiny.yaml").write_text(RECIPE.format(folder=folder) + "unknown: 1\n")
    (again,) = train_all([run], folder / "runs")
    assert not again.is_known and again.outcome is None
    assert "fit ended with status 2" in again.error and "Unknown config key" in again.error


def test_a_folder_of_somebody_else_is_not_touched(folder, capsys):
    path = folder / "runs/learning/tiny/seed_0/thesis.txt"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert main(["learning", "tiny.yaml", "--seeds=0"]) == 2
    assert "holds something that is no run of `matrix`" in capsys.readouterr().err
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_a_killed_call_takes_its_runs_with_it_and_is_taken_up(folder, capsys):
    os.mkfifo(folder / "hold_0")
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    command = [sys.executable, "-m", "domainssl", "learning", "tiny.yaml", "--seeds=0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    with (folder / "hold_0").open() as run:
        assert run.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert run.read() == ""  # returns when the run has ended, too
    assert "outcome" not in result(folder, 0)
    (folder / "hold_0").unlink()
    main(["learning", "tiny.yaml", "--seeds=0"])
    assert "outcome" in result(folder, 0)
    assert "### Criteria" in capsys.readouterr().out


def made_up(joint: float) -> dict[str, float]:
    """Metrics of a run that meets every criterion for `joint` from 0.55."""
    metrics = {"val/items": 64.0, "val/classes": 3.0}
    for name, trained in (("s1", 0.8), ("s2", 0.8), ("s1+s2", 0.1), ("joint", joint)):
        metrics[f"val/probe/{name}"] = trained
        metrics[f"val/untrained/probe/{name}"] = 0.5
        metrics[f"val/raw/probe/{name}"] = 0.4
        metrics[f"val/rankme/{name}"] = 3.0
    for pair in ("s1-s2", "s2-s1"):
        metrics |= {f"val/{s}retrieval/{pair}/R@1": v for s, v in (("", 0.5), ("untrained/", 0.0))}
    return metrics


def finished(seed: int, joint: float, contrastive: bool = True) -> Finished:
    versions = {"domainssl": "1.2", "python": "3.11", "torch": "2.15"}
    git = {"commit": "0123456789abcdef", "has_local_changes": seed == 1}
    return Finished(
        run=Run(Path("a.yaml"), seed),
        outcome=Outcome(made_up(joint), 64, contrastive),
        cost={"cpu_seconds": 99.6},
        surroundings={"versions": versions, "git": git},
    )


def test_the_tables_hold_spread_verdicts_cost_and_versions():
    failed = Finished(run=Run(Path("b.yaml"), 0), outcome=None, error="fit ended with status 1")
    text = markdown([finished(0, 0.8), finished(1, 0.52), failed], "the command")
    lines = text.splitlines()
    assert "| `a` | 0 | 8 of 8 |  | 100 |" in lines
    missed = "probe of joint over untrained + 0.05 (52.0, needed at least 55.0)"
    assert f"| `a` | 1 | 7 of 8 | {missed} | 100 |" in lines
    assert "| `b` | 0 | the run failed | all |  |" in lines
    assert "| `a` | joint | 33.3 | 40.0 ± 0.0 | 50.0 ± 0.0 | 66.0 ± 19.8 | 1 of 2 |" in lines
    assert "| `a` | s1+s2 | 33.3 | 40.0 ± 0.0 | 50.0 ± 0.0 | 10.0 ± 0.0 | not judged |" in lines
    assert "| `a` | s1 | s2 | 1.6 | 0.0 ± 0.0 | 50.0 ± 0.0 | 2 of 2 |" in lines
    assert "* domainssl 1.2 at 0123456789, python 3.11, torch 2.15" in lines
    assert "* domainssl 1.2 at 0123456789 with local changes, python 3.11, torch 2.15" in lines


def test_retrieval_across_scanners_has_a_table_where_runs_measured_it():
    run = finished(0, 0.8)
    assert "### Retrieval across scanners" not in markdown([run], "the command")
    for source, value in (("raw/", 0.3), ("untrained/", 0.4), ("", 0.6)):
        run.outcome.metrics[f"val/{source}retrieval/ct-mr/mAP"] = value
    run.outcome.metrics["val/retrieval/ct-mr/chance"] = 0.25
    lines = markdown([run], "the command").splitlines()
    assert "| `a` | ct | mr | 25.0 | 30.0 | 40.0 | 60.0 |" in lines


def test_one_seed_has_no_spread_and_others_methods_are_not_asked_to_retrieve():
    lines = markdown([finished(0, 0.8, contrastive=False)], "the command").splitlines()
    assert "| `a` | 0 | 6 of 6 |  | 100 |" in lines
    assert "| `a` | s2 | s1 | 1.6 | 0.0 | 50.0 | not judged |" in lines


def test_a_page_that_is_not_there_is_begun(tmp_path):
    write_page(tmp_path / "new.md", "text")
    assert (tmp_path / "new.md").read_text() == f"# Learning\n\n{BEGIN}\n\ntext\n\n{END}\n"
    write_page(tmp_path / "new.md", "other")
    assert (tmp_path / "new.md").read_text() == f"# Learning\n\n{BEGIN}\n\nother\n\n{END}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ssl4eo_crom"], "unknown recipe 'ssl4eo_crom'. Did you mean 'ssl4eo_croma'?"),
        (["tiny.yaml", "--seeds", "1", "1"], "--seeds: got 1 1, expected different numbers"),
        (["tiny.yaml", "--seeds", "-1"], "--seeds: got -1, expected different numbers"),
        (["tiny.yaml", "--jobs=0"], "--jobs: got 0, expected at least 1"),
        (["tiny.yaml", "tiny.yaml"], "'tiny' is named 2 times"),
        (["tiny.yaml", "--write=page.md"], "has no place for the tables"),
        (["tiny.yaml", "--write=nowhere/page.md"], "the folder nowhere does not exist"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(folder, capsys, words, said):
    (folder / "page.md").write_text(f"{END}\n{BEGIN}\n")
    assert main(["learning", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "runs").exists()
