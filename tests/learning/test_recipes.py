"""Recipes learn, and every cell of the matrix trains, resumes and is probed.

Each kind of data and each objective is trained to its end at least once, by a run that is kept for
other tests (`recipe_runs.kept`) and judged by what it logs; `docs/matrix.md` has all of them with
several seeds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from recipe_runs import RECIPES, assert_learned, kept, train

from domainssl.cli import main
from domainssl.cli.verbs.matrix import find_all
from domainssl.matrix.cells import COLUMNS, Cell
from domainssl.matrix.runs import read_outcome

COVERED = {"ssl4eo_croma", "cube_croma"}  # they have files of their own beside this one
# They train, but that they learn their sample is not shown yet; docs/matrix.md lists them.
NOT_SHOWN = {
    "ct_swinunetr_ssl",
    "cube_galileo",
    "ssl4eo_data2vec",
    "ssl4eo_hyper_mae",
    "ssl4eo_mae",
    "terramesh_csip",
}
# one per objective, and one per kind of data
LEARN = (
    "ct_conv_mae", "ct_vitautoenc", "ctmr_simdino", "mri_multicontrast_mae", "slides_titan",
    "ssl4eo_barlow_twins", "ssl4eo_clip", "ssl4eo_decur", "ssl4eo_dino", "ssl4eo_moco",
    "ssl4eo_moco2", "ssl4eo_simclr", "ssl4eo_vicreg", "tiles_mae", "treesat_maestro",
    "treesat_omnisat",
)  # fmt: skip
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
    assert names.keys() > trained and not NOT_SHOWN & trained
    here = Path(__file__).parent
    assert all((here / f"test_{name}.py").is_file() for name in COVERED)
    never = {_objective(names[name]) for name in NOT_SHOWN}
    missing = {_objective(path) for path in FOUND} - {_objective(names[n]) for n in trained}
    assert missing <= never  # an objective none of whose recipes is shown to learn
    prefixes = {name.partition("_")[0] for name in trained}
    shown = {name.partition("_")[0] for name in names.keys() - NOT_SHOWN}
    for column in COLUMNS:
        assert prefixes & set(column.prefixes) or not shown & set(column.prefixes), column.title


def test_the_page_says_of_which_recipes_learning_is_not_shown():
    page = (Path(__file__).parents[2] / "docs/matrix.md").read_text(encoding="utf-8")
    listed = page.split("## Not shown")[1].split("\n## ")[0]
    assert {name for name in (p.stem for p in FOUND) if f"`{name}`" in listed} == NOT_SHOWN


def test_the_recipe_that_learns_soonest_has_learned_after_two_thirds_of_it(tmp_path):
    short = ["--trainer.max_epochs=40", "--trainer.check_val_every_n_epoch=40"]
    quiet = ["--callbacks.panels=null", "--callbacks.evaluation.every_n_epochs=40"]
    outcome = train(tmp_path / "run", RECIPES / "ssl4eo_simclr.yaml", 0, *short, *quiet)
    assert outcome.items == 64 and outcome.contrastive and len(outcome.criteria()) == 8
    assert_learned(outcome)
    for name in ("s1", "s2", "joint"):  # labels are hidden from histograms
        assert outcome.metrics[f"val/raw/probe/{name}"] <= 0.4
        assert outcome.metrics[f"val/untrained/probe/{name}"] <= 0.65


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARN)
def test_a_recipe_learns(name):
    assert_learned(read_outcome(kept(name)))


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
