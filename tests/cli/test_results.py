"""`inspect` of what this library has written: what it is, its facts, and the next command."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cube_files import coded, write_geotiff
from evaluation_fakes import exported
from PIL import Image
from small_tasks import task

from domainssl.backbones.vit import ViTBackbone
from domainssl.cli.run import results
from domainssl.cli.run.results import result_at, runs_below
from domainssl.inference.run import embed
from domainssl.inspection import following
from domainssl.io.slide.features import Bag, write_bag
from domainssl.tasks.export import export_task

S2 = {
    "kind": "image", "channels": ("B02", "B03", "B04"), "value_unit": "dn", "size": (32, 32),
    "gsd_m": 10.0, "mean": (2000.0,) * 3, "std": (1500.0,) * 3,
}  # fmt: skip


def described(cli, path: Path) -> tuple[dict, str]:
    """The report as data, and what a person reads."""
    found = cli("inspect", path, "--json")
    assert found.status == 0, found.text
    return json.loads(found.out), cli("inspect", path).out


def test_a_run_its_checkpoints_and_the_folder_of_runs(cli, recipe, folder):
    assert cli("fit", "--config", recipe, "--run_dir=runs/tiny/a").status == 0
    report, text = described(cli, Path("runs/tiny/a"))
    assert report["kind"] == "run" and report["facts"]["recipe"] == [str(recipe)]
    assert "runs/tiny/a: the folder of a run of fit" in text
    assert report["facts"]["state"].endswith("not finished, can be continued")  # nothing exported
    assert "last.ckpt" in report["facts"]["checkpoints"] and report["facts"]["steps"] > 0
    checkpoint = "--ckpt_path=runs/tiny/a/checkpoints/last.ckpt"
    assert report["next"][0] == (
        "python -m domainssl fit --config runs/tiny/a/config.yaml --run_dir=runs/tiny/a "
        + checkpoint
    )
    Path("runs/tiny/a/panels").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save("runs/tiny/a/panels/s1.png")  # the folder was called pictures
    report, text = described(cli, Path("runs"))
    assert report["runs"].keys() == {"tiny/a"} and "tiny/a" in text
    assert report["next"] == ["python -m domainssl inspect runs/tiny/a"]
    (folder / "nothing").mkdir()
    refused = cli("inspect", "nothing")
    assert refused.status == 2 and "It holds: nothing" in refused.err


def test_a_run_with_a_backbone_is_evaluated_and_embedded_next(folder):
    run = folder / "run"
    exported(run / "backbone")
    (run / "config.yaml").write_text("")
    (run / "run.json").write_text('{"verb": "fit", "started": "2026-01-02T03:04:05"}')
    (run / "metrics.csv").write_text("step,val/probe/s1,val/raw/probe/s1\n0,,\n9,0.5,0.3\n")
    report = result_at(str(run))
    assert report["facts"]["state"] == "fit, 2026-01-02T03:04, finished: backbone"
    assert report["facts"]["steps"] == 10
    assert report["facts"]["last metrics"] == {"val/probe/s1": 0.5}  # none of baselines
    assert report["next"][0] == f"python -m domainssl evaluate {run} --output evaluation"
    assert runs_below(str(folder))["facts"] == {"runs": 1}


@pytest.mark.parametrize("name", ["", "backbone.json", "backbone.safetensors"])
def test_an_exported_backbone(cli, folder, name):
    exported(folder / "one")
    report, text = described(cli, folder / "one" / name)
    assert report["kind"] == "backbone" and report["facts"]["class"] == "CROMABackbone"
    assert report["facts"]["features"] == {"s1": 32, "s2": 32, "joint": 32}
    assert report["modalities"]["s2"]["channels"] == ["B04", "B03", "B02"]
    assert "an exported backbone" in text and "takes s2" in text
    assert any("domainssl embed" in command for command in report["next"])


def test_a_damaged_export_is_a_problem(cli, folder):
    exported(folder / "one")
    (folder / "one" / "backbone.safetensors").write_bytes(b"short")
    found = cli("inspect", folder / "one")
    assert found.status == 1 and "the file is damaged or of another export" in found.out


def test_a_task_names_its_classes_and_predict(cli, folder):
    export_task(task(), folder / "task")
    report, text = described(cli, folder / "task")
    assert report["kind"] == "task" and report["facts"]["classes"] == ["glands", "nests", "mucin"]
    assert f"python -m domainssl predict {folder / 'task'} INPUT" in report["next"][0]
    assert "a fine-tuned task" in text


def test_weights_of_others_say_how_they_are_loaded(cli, folder):
    torch.save({"patch.weight": torch.zeros(3, 2)}, folder / "w.pth")
    report, _ = described(cli, folder / "w.pth")
    assert report["facts"]["parameters"] == "6"
    assert report["facts"]["first"] == {"patch.weight": [3, 2]}
    torch.save({"state_dict": {}}, folder / "w.ckpt")
    refused = cli("inspect", folder / "w.ckpt")
    assert refused.status == 2 and "no checkpoint of this library" in refused.err


def test_embeddings_of_rasters_and_their_folder(cli, folder):
    torch.manual_seed(0)
    backbone = ViTBackbone({"s2": S2}, {"width": 12, "depth": 1, "heads": 2}, patch_size=8).eval()
    values = (coded(1, 3, 64)[0] + 500).astype("uint16")
    scene = write_geotiff(folder / "in" / "scene.tif", values, S2["channels"], nodata=0)
    options = {"stored_unit": "dn"}
    for name, form in (("e.zarr", "zarr"), ("e.tif", "cog")):
        embed(backbone, scene, folder / "out" / name, form=form, **options)
        report, text = described(cli, folder / "out" / name)
        assert report["kind"] == "embedding" and report["facts"]["feature"] == "s2"
        assert (
            "an embedding" in text and report["next"][0] == f"look at {folder / 'out' / name}.png"
        )
    report, _ = described(cli, folder / "out")
    assert report["kind"] == "embeddings" and report["facts"]["embeddings"] == 2
    embed(backbone, scene, folder / "p.parquet", pooled=True, **options)
    report, text = described(cli, folder / "p.parquet")
    assert report["facts"]["items"] == 1 and "embedding" in report["facts"]["columns"]
    (folder / "e.zarr.json").unlink(missing_ok=True)
    os.rename(folder / "out" / "e.zarr", folder / "alone.zarr")  # without its record
    assert described(cli, folder / "alone.zarr")[0]["kind"] == "embedding"


def test_other_tables_and_json_are_no_results(folder):
    import pandas

    pandas.DataFrame({"a": [1]}).to_parquet(folder / "t.parquet")
    (folder / "run.json").write_text("[1]")
    (folder / "config.yaml").write_text("")
    assert result_at(str(folder)) is None and result_at(str(folder / "t.parquet")) is None
    assert result_at("https://example.org/a.zarr") is None and result_at("nowhere") is None
    assert runs_below(str(folder)) is None


@pytest.mark.parametrize(
    ("files", "kind", "facts"),
    [
        (
            {"predict.json": '{"weights": "ab", "classes": ["x", "y"]}', "a.tif": ""},
            "predictions",
            {"weights": "ab", "classes": ["x", "y"], "files": 1, "first": ["a.tif"]},
        ),
        (
            {
                "evaluation.json": json.dumps(
                    {"rows": [{"backbone": "a"}, {"backbone": "raw"}], "classes": ["x"],
                     "data": {"test_items": 7}}
                )
            },
            "evaluation",
            {"backbones": ["a", "raw"], "classes": ["x"], "test items": 7, "rows": 2},
        ),
        (
            {"tiling.json": '{"options": {"size": 64, "mpp": null}}', "encoders/uni.json": "{}"},
            "grids",
            {"slides": 0, "size": 64, "features": ["uni"]},
        ),
        (
            {
                "encoder.onnx.json": '{"format": "domainssl.graph/1", "backbone": "V", '
                '"file": "f", "outputs": [{"name": "logits", "axes": "B K"}], '
                '"task": {"names": ["a"]}}'
            },
            "graph",
            {"backbone": "V", "file": "f", "outputs": ["logits (B K)"], "classes": ["a"]},
        ),
    ],
)  # fmt: skip
def test_outputs_of_other_verbs(folder, files, kind, facts):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    report = result_at(str(folder))
    assert (report["kind"], report["facts"]) == (kind, facts) and report["next"]


def test_features_of_tiles_are_trained_on_with_their_width_and_resolution(folder):
    (folder / "tiling.json").write_text('{"options": {"size": 8}}')
    (folder / "encoders").mkdir()
    (folder / "encoders" / "uni.json").write_text("{}")
    features, coords = np.eye(2, 3, dtype=np.float32), np.array([[0, 0], [16, 0]])
    bag = Bag(slide="a", features=features, coords=coords, patch_size_level0=16, patch_size=8,
              mpp_um=0.25, encoder="uni")  # fmt: skip
    write_bag(folder, bag, "trident")
    own = "--data.modalities.tile_features"
    report = result_at(str(folder))
    assert report["kind"] == "grids"
    assert report["next"][1] == (
        "python -m domainssl fit --config recipes/slides_titan.yaml "
        f"--data.root={folder} {own}.dim=3 {own}.mpp_um=0.25"
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [(("a.tif", "a.tif.png"), "look at {}/a.tif.png"),
     (("a.geojson", "a_tiles.parquet"), "open {}/a.geojson in QuPath (File, Import objects)")],
)  # fmt: skip
def test_predictions_are_looked_at_as_pictures(folder, names, said):
    for name in (*names, "predict.json"):
        (folder / name).write_text('{"weights": "ab"}')
    assert result_at(str(folder))["next"] == [said.format(folder)]


def test_commands_that_are_named_are_verbs_of_the_command_line():
    from domainssl.cli import verb_table

    modules = (results, following)
    text = "".join(Path(sys.modules[m.__name__].__file__ or "").read_text() for m in modules)
    named = {part.split()[0].rstrip('"]') for part in text.split('f"{COMMAND} ')[1:]} - {
        "{record['verb']}"
    }
    assert named and named <= set(verb_table())
