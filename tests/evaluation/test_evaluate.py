"""The verb `evaluate` from backbones and data to files."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_fakes import MODALITIES, data_file, exported

from domainssl.backbones.card import export_backbone
from domainssl.backbones.encoders.backbone import EncoderBackbone, EncoderSizes
from domainssl.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    exported(folder / "croma")
    exported(folder / "radar", ("s1",), seed=2)
    words = [f"one={folder / 'croma'}", str(folder / "radar"), "--config", str(data_file(folder))]
    assert main(["evaluate", *words, f"--output={folder / 'out'}", "--resamples=50"]) == 0
    return folder


def rows(folder: Path) -> dict[tuple[str, ...], dict[str, str]]:
    with open(folder / "evaluation.csv", newline="", encoding="utf-8") as file:
        keys = ("backbone", "features", "protocol", "metric")
        return {tuple(row[k] for k in keys): row for row in csv.DictReader(file)}


def test_all_backbones_subsets_and_protocols_have_rows(place: Path) -> None:
    found = rows(place / "out")
    labels = {"one", "radar", "untrained (one)", "untrained (radar)", "raw"}
    assert {key[0] for key in found} == labels
    assert {key[1] for key in found if key[0] == "one"} == {
        "s1", "s2", "s1+s2", "s1 to s2", "s2 to s1",
    }  # fmt: skip
    assert {key[1] for key in found if key[0] == "radar"} == {"s1"}
    protocols = {key[2] for key in found}
    assert protocols == {
        "kNN", "linear", "MLP", "k-means", "1-shot", "5-shot", "10-shot", "retrieval",
        "cross-modal (aligned)", "cross-modal (direct)", "dense linear",
    }  # fmt: skip
    best = found["raw", "s2", "linear", "accuracy"]  # classes are levels here
    assert float(best["value"]) == 1 and (best["train_items"], best["test_items"]) == ("36", "24")
    for row in found.values():
        low, value, high = (float(row[name]) for name in ("low", "value", "high"))
        assert (row["metric"] == "ARI" or low >= 0) and low <= value + 0.01, row
        assert value <= high + 0.01 and high <= 1, row
    gained = found["one", "s1", "linear", "accuracy"]
    base = found["untrained (one)", "s1", "linear", "accuracy"]
    assert float(gained["gain"]) == pytest.approx(
        float(gained["value"]) - float(base["value"]), abs=1e-5
    )
    assert not base["gain"] and not best["gain"]


def test_json_holds_the_same_with_confusion_and_notes(place: Path) -> None:
    content = json.loads((place / "out" / "evaluation.json").read_text())
    assert content["classes"] == ["<b>river</b>", "field & wood", "town"]
    assert len(content["rows"]) == len(rows(place / "out"))
    assert "radar: has no s2, which the data have; left out" in content["notes"]
    (linear,) = [
        r for r in content["rows"]
        if (r["backbone"], r["features"], r["protocol"], r["metric"])
        == ("raw", "s2", "linear", "accuracy")
    ]  # fmt: skip
    assert linear["confusion"] == [[8, 0, 0], [0, 8, 0], [0, 0, 8]] and linear["recalls"] == [1] * 3


def test_features_are_kept_for_the_next_call(place: Path, monkeypatch) -> None:
    from domainssl.datamodules.base import DomainDataModule

    kept = {path: path.stat().st_mtime_ns for path in (place / "out" / "features").iterdir()}
    assert len(kept) == 10  # two splits of two backbones, two untrained ones, and raw

    read: list[str] = []
    ordered = DomainDataModule.ordered_dataloader

    def noted(self: DomainDataModule, split: str) -> object:
        read.append(split)
        return ordered(self, split)

    monkeypatch.setattr(DomainDataModule, "ordered_dataloader", noted)
    words = [f"one={place / 'croma'}", str(place / "radar"), f"--config={place / 'data.yaml'}"]
    before = (place / "out" / "evaluation.csv").read_bytes()
    more = [f"--output={place / 'out'}", "--resamples=50"]
    assert main(["evaluate", *words, *more]) == 0
    assert read == ["val"]  # for the pictures of the report
    assert (place / "out" / "evaluation.csv").read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in (place / "out" / "features").iterdir()} == kept


def test_items_with_any_number_of_labels_get_map_and_f1(place: Path, tmp_path: Path) -> None:
    words = [str(place / "croma"), f"--config={data_file(tmp_path, labels='multi')}"]
    words += ["--protocols", "knn", "linear", "mlp", "kmeans", "--resamples=20", "--seeds=1"]
    assert main(["evaluate", *words, f"--output={tmp_path / 'out'}"]) == 0
    found = rows(tmp_path / "out")
    assert {key[2:] for key in found} == {
        (f"{name} multi-label", metric) for name in ("kNN", "linear", "MLP")
        for metric in ("mAP", "F1")
    }  # fmt: skip
    best = found["raw", "s2", "linear multi-label", "mAP"]  # labels are levels here
    assert float(best["value"]) == 1 and float(best["high"]) == 1
    assert float(found["raw", "s2", "linear multi-label", "F1"]["value"]) == 1
    # 16, 8 and 8 of 24 items have them; the third is known of 19, 6 of which have it
    assert float(best["chance"]) == pytest.approx((16 / 24 + 8 / 24 + 6 / 19) / 3, abs=1e-5)
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["labels"] == ["<b>river</b>", "field & wood", "town"]
    (linear,) = [
        r for r in content["rows"]
        if (r["backbone"], r["features"], r["protocol"], r["metric"])
        == ("raw", "s2", "linear multi-label", "mAP")
    ]  # fmt: skip
    assert linear["per_class"] == [1, 1, 1]
    assert "k-means, few-shot and retrieval are measured of one class" in str(content["notes"])


def test_slides_are_evaluated_from_bags_by_pooled_features_and_a_slide_encoder(
    tmp_path: Path,
) -> None:
    import torch
    import yaml

    from domainssl import export_backbone
    from domainssl.backbones.slide import TITANBackbone

    data = yaml.safe_load(Path("recipes/slides_titan.yaml").read_text())["data"]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    facts = {
        "tile_features": {
            "kind": "features", "channels": [f"f{i}" for i in range(32)], "mpp_um": 0.5,
            "value_unit": "arbitrary", "mean": [0.0] * 32, "std": [1.0] * 32,
        }
    }  # fmt: skip
    torch.manual_seed(0)
    export_backbone(TITANBackbone(facts, width=24, depth=1, heads=2), tmp_path / "titan")
    words = [str(tmp_path / "titan"), f"--config={tmp_path / 'data.yaml'}", "--protocols", "linear"]
    more = ["--resamples=20", "--no_baselines", "--thumbnails", f"--output={tmp_path / 'out'}"]
    assert main(["evaluate", *words, *more]) == 0
    found = rows(tmp_path / "out")
    titan = found["titan", "tile_features", "linear", "accuracy"]
    assert (titan["train_items"], titan["test_items"]) == ("96", "64")
    assert float(titan["value"]) > float(titan["chance"])  # where tiles lie tells the class


MISTAKES = {
    "none": ({"labels": "none", "with_mask": False}, "no labels in the data of"),
    "one": ({"labels": "one"}, "hold one class"),
    "few": ({"labels": "few"}, "too few labels"),
    "person": ({"same_person": True}, "1 persons have items in both splits"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_data_that_cannot_be_evaluated_get_one_message(place, tmp_path, capsys, name) -> None:
    arguments, text = MISTAKES[name]
    words = [str(place / "croma"), f"--config={data_file(tmp_path, **arguments)}"]
    assert main(["evaluate", *words, f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("error:") == 1 and "Traceback" not in error


REFUSED = {
    ("--protocols", "liner"): "Did you mean 'linear'?",
    ("--split=holdout",): "expected one of val",
    ("--seeds=0",): "expected 1 or more",
    ("--resamples=1",): "expected 10 or more",
    ("--device=tpu",): "expected auto, cpu, cuda",
    ("--frobnicate",): "there is no option '--frobnicate'",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_options_that_cannot_be_used_are_refused(place, tmp_path, capsys, words) -> None:
    start = ["evaluate", str(place / "croma"), f"--config={place / 'data.yaml'}"]
    assert main([*start, f"--output={tmp_path}", *words]) == 2
    assert REFUSED[words] in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_backbone_needs_data_and_a_modality_in_common(place, tmp_path, capsys) -> None:
    assert main(["evaluate", str(place / "croma"), f"--output={tmp_path}"]) == 2
    assert "which data?" in capsys.readouterr().err
    words = [str(place / "radar"), "--config", "recipes/tiles_mae.yaml", f"--output={tmp_path}"]
    assert main(["evaluate", *words]) == 2
    assert "no modality in common" in capsys.readouterr().err


def test_the_test_data_of_a_module_of_others_are_measured(place: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.yaml").write_text(
        "data:\n  class_path: DatasetDataModule\n  init_args:\n    root: .\n"
        "    dataset: {name: evaluation_fakes.Foreign, root: null}\n    modalities:\n"
        "      s1: {channels: [VV, VH], value_unit: arbitrary, size: [16, 16], mean: [0, 0],"
        " std: [1, 1]}\n    global_batch_size: 6\n    loading: {workers: 0}\n"
    )
    words = [str(place / "radar"), "--config", str(tmp_path / "foreign.yaml"), "--resamples=20"]
    words += ["--protocols", "knn", "--no_baselines"]
    assert main(["evaluate", *words, f"--output={tmp_path}"]) == 0
    counts = {(row["train_items"], row["test_items"]) for row in rows(tmp_path).values()}
    assert counts == {("30", "12")}  # not the 6 of val
    assert main(["evaluate", *words, f"--output={tmp_path / 'few'}", "--max_items=11"]) == 0
    counts = {(row["train_items"], row["test_items"]) for row in rows(tmp_path / "few").values()}
    assert counts == {("11", "11")}  # batches have 6
    assert json.loads((tmp_path / "evaluation.json").read_text())["data"]["test_split"] == "test"


def test_a_backbone_of_series_takes_an_image_as_one_date(place: Path, tmp_path: Path) -> None:
    kinds = {}
    for kind in ("image", "series"):
        torch.manual_seed(0)
        form = {"s1": replace(MODALITIES["s1"], kind=kind)}
        kinds[kind] = EncoderBackbone(
            form, "transformer", EncoderSizes(width=16, depth=1, heads=2, patch_size=4)
        )
        export_backbone(kinds[kind], tmp_path / kind)
    words = [str(tmp_path / kind) for kind in kinds]
    words += ["--config", str(place / "data.yaml"), "--resamples=20", "--protocols", "knn", "dense"]
    assert main(["evaluate", *words, f"--output={tmp_path}"]) == 0
    found = rows(tmp_path)
    same = [row for key, row in found.items() if key[0] == "series"]
    assert same and {row["features"] for row in same} == {"s1"}
    for row in same:
        other = found["image", row["features"], row["protocol"], row["metric"]]
        assert row["value"] == other["value"] and row["gain"] == other["gain"]
    assert len(same) == 4  # two metrics of kNN, two of the probe of patches
    notes = json.loads((tmp_path / "evaluation.json").read_text())["notes"]
    assert "series: images of s1 are taken as series of one date" in notes


def test_python_finds_the_same(place: Path, tmp_path: Path) -> None:
    import domainssl

    found = domainssl.evaluate(
        f"one={place / 'croma'}",
        config=place / "data.yaml",
        output=tmp_path / "out",
        resamples=50,
        baselines=False,
        protocols=("knn", "dense"),
        data={"train_items": 36},
    )
    assert found.files[0] == tmp_path / "out" / "evaluation.csv"
    same = rows(place / "out")
    assert len(found.rows) == 12  # two metrics of two protocols, for three subsets
    for row in found.rows:
        other = same[row.backbone, row.features, row.protocol, row.metric]
        assert f"{row.value:.6g} {row.low:.6g}" == f"{other['value']} {other['low']}"
    assert found.value("one", "s1", "kNN", "accuracy") == found.rows[0].value
