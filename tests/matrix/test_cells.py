"""Which cells there are, how they are composed, and what the record of their runs keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from domainssl.cli import main
from domainssl.errors import ConfigError
from domainssl.matrix.cells import Cell, column_of, find_cells
from domainssl.matrix.page import BEGIN, END, check_page, markdown, write_page
from domainssl.matrix.picture import gain, write_picture
from domainssl.matrix.record import Entry, merged, read_record, write_record
from domainssl.matrix.runs import Finished, Outcome, Run


def recipe(objective: str, data: str, modalities: list[str], **model: Any) -> dict[str, Any]:
    arguments = {"modalities": {m: {"unit": 1} for m in modalities}, "window": {"size": 64}}
    return {
        "trainer": {"max_epochs": 3},
        "callbacks": {"panels": "P", "summary": "S"},
        "model": {"class_path": objective, "init_args": model},
        "data": {"class_path": data, "init_args": arguments},
    }


def recipes() -> dict[str, dict[str, Any]]:
    croma = {"encoding": {"radar": "s1", "patch_size": 8, "normalization": "zscore"}}
    volumes = {"encoding": {"radar": "pet", "patch_size": 4, "normalization": "item"}}
    found = {
        "ssl4eo_croma": recipe("CROMA", "SSL4EO", ["s1", "s2"], **croma),
        "petct_croma": recipe("a.CROMA", "Volumes", ["ct", "pet"], **volumes),
        "ssl4eo_simclr": recipe(
            "SimCLR",
            "SSL4EO",
            ["s1", "s2"],
            encoding={"sizes": {"patch_size": 8}, "normalization": "zscore"},
            views={"s1": {"area": 1, "group": "x"}, "s2": {"area": 2}},
            view_size=48,
        ),
        "ssl4eo_mae": recipe("MAE", "SSL4EO", ["s2"], encoding={"patch_size": 8}),
    }
    found["petct_croma"]["data"]["init_args"]["window"]["size"] = 32
    found["petct_croma"]["data"]["init_args"]["limits"] = {"ct": 1, "pet": 2}
    return found


def no_refusal(config: Any) -> str:
    return ""


def by_name(cells: list[Cell]) -> dict[str, Cell]:
    return {cell.name: cell for cell in cells}


def test_recipes_are_cells_and_every_other_pair_is_composed():
    cells = by_name(find_cells(recipes(), no_refusal))
    assert set(cells) == {
        "ssl4eo_croma", "ssl4eo_simclr", "ssl4eo_mae", "petct_croma", "petct_simclr", "petct_mae",
    }  # fmt: skip
    assert cells["ssl4eo_croma"].is_recipe and cells["ssl4eo_croma"].column == "S1/S2 images"
    assert cells["petct_croma"].objective == "CROMA"  # by short name
    composed = cells["petct_simclr"]
    assert not composed.is_recipe and composed.recipes == ("ssl4eo_simclr", "petct_croma")
    assert composed.column == "CT and MR volumes"


def test_a_composed_cell_has_the_model_of_one_recipe_and_the_data_of_another():
    config = by_name(find_cells(recipes(), no_refusal))["petct_simclr"].config
    model = config["model"]["init_args"]
    assert model["views"] == {"ct": {"area": 1}, "pet": {"area": 1}}  # `group` is of other data
    assert model["view_size"] == 24  # half the window, half the view
    assert model["encoding"]["normalization"] == "item"
    assert config["data"]["init_args"]["modalities"].keys() == {"ct", "pet"}
    assert config["trainer"] == {"max_epochs": 3}
    assert config["callbacks"] == {"summary": "S"}  # panels are of the other method


def test_a_method_of_one_modality_takes_one_of_the_data_everywhere():
    cell = by_name(find_cells(recipes(), no_refusal))["petct_mae"]
    arguments = cell.config["data"]["init_args"]
    assert arguments["modalities"].keys() == {"ct"} and arguments["limits"] == {"ct": 1}
    assert cell.config["model"]["init_args"]["encoding"]["patch_size"] == 4


def test_the_first_modalities_that_can_be_used_are_taken_else_the_reason_is_kept():
    def refuses_ct(config: Any) -> str:
        return "no CT" if "ct" in config["data"]["init_args"]["modalities"] else ""

    cells = by_name(find_cells(recipes(), refuses_ct))
    assert list(cells["petct_mae"].config["data"]["init_args"]["modalities"]) == ["pet"]
    assert cells["petct_mae"].reason == "" and cells["petct_simclr"].reason == "no CT"
    assert cells["petct_croma"].reason == ""  # a recipe is not tried


def test_names_of_modalities_are_replaced_by_place():
    found = recipes() | {"mri_croma": recipe("Other", "Volumes", ["t1", "flair"], encoding={})}
    del found["petct_croma"]
    cells = [cell for cell in find_cells(found, no_refusal) if cell.objective == "CROMA"]
    (composed,) = (cell for cell in cells if not cell.is_recipe)
    assert composed.recipes == ("ssl4eo_croma", "mri_croma")
    assert composed.config["model"]["init_args"]["encoding"]["radar"] == "t1"


def test_a_new_kind_of_data_is_a_column_of_its_own():
    found = recipes() | {"drones_mae": recipe("MAE", "Drones", ["rgb"], encoding={})}
    cells = by_name(find_cells(found, no_refusal))
    assert cells["drones_mae"].column == "drones"
    assert cells["drones_croma"].recipes == ("ssl4eo_croma", "drones_mae")


def test_several_dates_are_a_series_and_a_composed_cell_takes_no_name_of_a_recipe():
    found = recipes()
    found["ssl4eo_simclr"]["data"]["init_args"]["dates"] = {"mode": "views"}
    assert column_of("ssl4eo_simclr", found["ssl4eo_simclr"]) == "series"
    assert column_of("ssl4eo_mae", found["ssl4eo_mae"]) == "S1/S2 images"
    cells = by_name(find_cells(found, no_refusal))
    assert cells["ssl4eo_simclr"].column == "series" and cells["ssl4eo_simclr"].is_recipe
    assert cells["images_simclr"].column == "S1/S2 images"
    assert cells["images_simclr"].recipes == ("ssl4eo_simclr", "ssl4eo_croma")
    assert "dates" not in cells["images_simclr"].config["data"]["init_args"]


def test_a_composed_cell_keeps_the_normalization_of_its_model_where_that_of_the_data_cannot_be():
    def refuses_item(config: Any) -> str:
        encoding = config["model"]["init_args"].get("encoding", {})
        return "no" if encoding.get("normalization") == "item" else ""

    cell = by_name(find_cells(recipes(), refuses_item))["petct_simclr"]
    assert not cell.reason
    assert cell.config["model"]["init_args"]["encoding"]["normalization"] == "zscore"


def test_a_composed_cell_trains_longer_where_its_model_did_for_more_than_twice_as_many_steps():
    found = recipes()
    found["petct_croma"]["trainer"] = {"max_epochs": 6, "log_every_n_steps": 5}
    found["petct_croma"]["callbacks"] = {"evaluation": {"init_args": {"every_n_epochs": 3}}}
    for epochs, factor in ((30, 1), (31, 3)):
        found["ssl4eo_simclr"]["trainer"] = {"max_epochs": epochs, "log_every_n_steps": 2}
        config = by_name(find_cells(found, no_refusal))["petct_simclr"].config
        assert config["trainer"] == {"max_epochs": 6 * factor, "log_every_n_steps": 5}
        assert config["callbacks"]["evaluation"]["init_args"]["every_n_epochs"] == 3 * factor


def outcome(trained: float, untrained: float = 0.5) -> Outcome:
    metrics = {"val/items": 64.0, "val/classes": 4.0, "val/loss": 1.23456789}
    for name in ("s1", "s2", "joint"):
        metrics[f"val/probe/{name}"] = trained
        metrics[f"val/untrained/probe/{name}"] = untrained
        metrics[f"val/raw/probe/{name}"] = 0.3
    metrics |= {f"val/{s}retrieval/s1-s2/R@1": v for s, v in (("", 0.5), ("untrained/", 0.0))}
    return Outcome(metrics, 64, contrastive=True)


def finished(name: str, seed: int, trained: float | None) -> Finished:
    git = {"commit": "0123456789abcdef", "has_local_changes": False}
    return Finished(
        run=Run(Path(f"{name}.yaml"), seed),
        outcome=None if trained is None else outcome(trained),
        cost={"cpu_seconds": 61.4, "wall_seconds": 70.0, "memory_mb": 812.3},
        surroundings={"versions": {"torch": "2.15", "other": "1"}, "git": git},
        error="" if trained is not None else "long\nfit ended badly",
    )


def test_the_record_keeps_runs_of_the_same_configuration_and_is_read_back(tmp_path):
    cells = find_cells(recipes(), no_refusal)
    first = merged(cells, [], [finished("ssl4eo_mae", s, 0.8) for s in (1, 0)])
    write_record(tmp_path / "m.json", first)
    assert read_record(tmp_path / "m.json") == first
    (entry,) = (e for e in first if e.name == "ssl4eo_mae")
    assert [run.seed for run in entry.runs] == [0, 1]
    assert "val/loss" not in entry.runs[0].outcome.metrics  # only what the page shows
    assert entry.runs[0].commit == "0123456789" and entry.runs[0].versions == {"torch": "2.15"}
    again = merged(cells, first, [finished("ssl4eo_mae", 1, 0.9), finished("petct_mae", 0, None)])
    kept = {e.name: e for e in again}
    assert [r.outcome.metrics["val/probe/s1"] for r in kept["ssl4eo_mae"].runs] == [0.8, 0.9]
    assert kept["petct_mae"].runs[0].error == "fit ended badly"
    changed = [dataclasses.replace(c, config={**c.config, "x": 1}) for c in cells]
    assert all(not e.runs for e in merged(changed, again, []))  # other configurations


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / "m.json").write_text('{"cells": 1}')
    with pytest.raises(ConfigError, match="no record of the matrix"):
        read_record(tmp_path / "m.json")


def entries() -> list[Entry]:
    def refuses(config: Any) -> str:
        is_mae = config["model"]["class_path"] == "MAE"
        return "MAE takes no volumes | here" if is_mae else ""

    runs = [finished("ssl4eo_croma", 0, 0.8), finished("ssl4eo_croma", 1, 0.52),
            finished("petct_croma", 0, None)]  # fmt: skip
    return merged(find_cells(recipes(), refuses), [], runs)


def test_the_page_shows_gain_verdicts_cost_reasons_and_versions():
    lines = markdown(entries(), "matrix.png").splitlines()
    assert lines[0].startswith("![Gain") and lines[0].endswith("(matrix.png)")
    (row,) = (line for line in lines if line.startswith("| `ssl4eo_croma` | CROMA |"))
    sha = next(e for e in entries() if e.name == "ssl4eo_croma").sha256[:10]
    assert row == (
        "| `ssl4eo_croma` | CROMA | S1/S2 images | 30.0 ± 0.0 | 50.0 ± 0.0 | 66.0 ± 19.8 | +16 | "
        f"1 of 2 | met | 61 | 812 | `{sha}` |"
    )
    assert "| `MAE` | CT and MR volumes | MAE takes no volumes / here |" in lines
    assert "* `petct_croma`, seed 0: the run failed. fit ended badly" in lines
    missed = [line for line in lines if line.startswith("* `ssl4eo_croma`, seed 1: probe of s1")]
    assert len(missed) == 1 and "(52.0, needed at least 55.0)" in missed[0]
    assert not any("mean of 2 seeds" in line for line in lines)
    (failed,) = (line for line in lines if line.startswith("| `petct_croma` | CROMA |"))
    assert "| 0 of 1 | missed |" in failed
    lower = [finished("ssl4eo_croma", seed, trained) for seed, trained in ((0, 0.56), (1, 0.52))]
    page = markdown(merged(find_cells(recipes(), no_refusal), [], lower))
    assert "`ssl4eo_croma`, mean of 2 seeds: probe of s1 over untrained + 0.05 (54.0, need" in page
    metrics = {
        **{k: v for k, v in outcome(0.8).metrics.items() if not k.endswith(("/s2", "/joint"))},
        "val/rankme/s1": 6.1, "val/untrained/rankme/s1": 12.74,
    }  # fmt: skip
    taught = Outcome(metrics, 64, contrastive=False, self_distilling=True)
    run = dataclasses.replace(finished("ssl4eo_mae", 0, 0.8), outcome=taught)
    page = markdown(merged(find_cells(recipes(), no_refusal), [], [run]), "matrix.png")
    assert "effective rank of s1 over half (6.1, needed at least 6.4)" in page
    assert (
        "| `ssl4eo_croma` | s1 | 25.0 | 30.0 ± 0.0 | 50.0 ± 0.0 | 66.0 ± 19.8 | 1 of 2 |" in lines
    )
    assert "| `ssl4eo_croma` | s1 | s2 | 1.6 | 0.0 ± 0.0 | 50.0 ± 0.0 | 2 of 2 |" in lines
    waiting = lines[lines.index("### Not trained yet") + 2]
    assert waiting == "`ssl4eo_mae`, `ssl4eo_simclr`, `petct_simclr`."
    assert any(line == "* `ssl4eo_croma`: commit 0123456789; torch 2.15" for line in lines)


def test_the_picture_has_a_square_per_pair(tmp_path):
    found = entries()
    assert gain(next(e for e in found if e.name == "ssl4eo_croma")) == pytest.approx(0.16)
    write_picture(tmp_path / "m.png", found)
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.size[0] > 500 and picture.size[1] > 300
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert (217, 217, 217) in colours and (244, 165, 130) in colours  # impossible, failed


def test_a_page_keeps_its_prose(tmp_path):
    page = tmp_path / "new.md"
    write_page(page, "text")
    assert page.read_text() == f"# The matrix\n\n{BEGIN}\n\ntext\n\n{END}\n"
    page.write_text(f"Before.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    write_page(page, "other")
    assert page.read_text() == f"Before.\n\n{BEGIN}\n\nother\n\n{END}\n\nAfter.\n"
    page.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(ConfigError, match="has no place for the tables"):
        check_page(page)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds=0"], "got --seeds=0 --jobs=1, expected at least 1"),
        (["--seeds=-1", "--write=page.md"], "got --seeds=-1 --jobs=1, expected at least 1"),
        (["--jobs=0"], "got --seeds=3 --jobs=0, expected at least 1"),
        (["--write=nowhere/page.md"], "the folder nowhere does not exist"),
        (["--write=page.txt"], "expected a Markdown page"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["matrix", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_only_cells_that_a_pattern_names_are_composed():
    def never(config: Any) -> str:
        raise AssertionError(config)

    asked: list[Any] = []
    cells = find_cells(recipes(), lambda config: asked.append(config) or "", ("petct_mae",))
    assert len(asked) == 1 and by_name(cells)["petct_mae"].config == asked[0]
    every = find_cells(recipes(), no_refusal)
    assert [c.name for c in cells] == [c.name for c in every]
    assert find_cells(recipes(), never, ("ssl4eo_*", "CROMA"))[0].is_recipe


def test_an_unknown_cell_is_answered_with_the_nearest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["matrix", "--cells", "ssl4eo_crom"]) == 2
    assert "Did you mean 'ssl4eo_croma'?" in capsys.readouterr().err


def test_the_list_of_named_cells_builds_no_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["matrix", "--list", "--cells", "ssl4eo_croma"]) == 0  # a recipe: nothing is built
    assert capsys.readouterr().out == "ssl4eo_croma  CROMA, S1/S2 images: recipe\n"
