"""A run from the command line: its folder, its record, its checkpoints."""

import csv
import json

import pytest
import torch

from domainssl.cli.config.nodes import parse
from domainssl.cli.run.train import build, prepare


def only_run(folder, name="tiny"):
    runs = list((folder / "runs" / name).iterdir())
    assert len(runs) == 1
    return runs[0]


@pytest.fixture
def finished(cli, recipe, folder):
    """A finished run of the tiny recipe."""
    result = cli("fit", "--config", recipe.name)
    assert result.status == 0, result.text
    return only_run(folder), result


def test_a_run_writes_everything_into_one_folder(finished):
    run, _ = finished
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "run.json", "metrics.csv", "checkpoints", "tensorboard"} <= names
    assert (run / "checkpoints" / "last.ckpt").is_file()
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert len([row for row in rows if row["train/loss"]]) == 3


def test_a_run_says_at_its_start_what_was_found_and_what_is_trained(finished):
    run, result = finished
    assert "12 random vectors from 'sample'" in result.out
    assert "FakeObjective, 4 parameters" in result.out
    assert "1 epoch, 4 samples per step, 1 x CPU, 32-true" in result.out
    assert f"runs/tiny/{run.name}" in result.out


def test_a_run_records_versions_revision_and_data_identity(finished):
    run, _ = finished
    record = json.loads((run / "run.json").read_text())
    assert record["config_files"] == ["tiny.yaml"]
    assert record["data"] == {"root": "sample", "files": []}
    assert record["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert {"python", "lightning", "numpy"} <= set(record["versions"])
    assert record["git"] is None or len(record["git"]["commit"]) == 40


def test_checkpoints_load_without_unpickling_and_hold_plain_hyperparameters(finished):
    run, _ = finished
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["mask_ratio"] == 0.5
    assert content["hyper_parameters"]["modalities"]["a"]["channels"] == ["r", "g", "b"]
    assert not [key for key in content["hyper_parameters"] if key.startswith("_")]


def test_the_model_takes_modalities_and_context_size_from_the_data(finished):
    run, _ = finished
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["context_size"] == 64
    saved = read(run / "config.yaml")
    assert "modalities" not in saved["model"]["init_args"]


def read(path):
    mistakes = []
    tree = parse(path.read_text(), path.name, mistakes)
    assert mistakes == []
    return tree.plain()


def test_the_saved_configuration_runs_again_and_saves_itself(finished, cli, folder):
    run, _ = finished
    result = cli("fit", "--config", run / "config.yaml")
    assert result.status == 0, result.text
    again = next(path for path in (folder / "runs" / "tiny").iterdir() if path != run)
    assert read(again / "config.yaml") == read(run / "config.yaml")
    assert (again / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def test_the_saved_configuration_holds_every_default_and_no_place(finished):
    run, _ = finished
    saved = read(run / "config.yaml")
    assert saved["name"] == "tiny" and saved["seed_everything"] == 0
    assert saved["model"]["init_args"]["options"]["warmup_steps"] is None
    assert saved["trainer"]["gradient_clip_val"] is None
    assert "dirpath" not in saved["callbacks"]["checkpoint"]["init_args"]
    assert str(run.name) not in (run / "config.yaml").read_text().partition("name:")[2]


def test_validate_and_predict_read_a_checkpoint(finished, cli, folder):
    run, _ = finished
    words = ["--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt"]
    validated = cli("validate", *words)
    assert validated.status == 0 and "val/loss" in validated.out
    assert cli("predict", *words).status == 0
    assert cli("test", *words).status == 2  # FakeObjective has no test_step
    endings = {path.name.rpartition("_")[2] for path in (folder / "runs" / "tiny").iterdir()}
    assert {"validate", "predict"} <= endings


def test_a_pickled_checkpoint_is_refused_and_nothing_runs(finished, cli, folder):
    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "touched"), "w"))

    torch.save({"state_dict": {}, "evil": Evil()}, folder / "evil.ckpt")
    run, _ = finished
    result = cli("validate", "--config", run / "config.yaml", "--ckpt_path=evil.ckpt")
    assert result.status == 2
    assert "Checkpoint 'evil.ckpt' holds pickled Python objects" in result.err
    assert "Traceback" not in result.text
    assert not (folder / "touched").exists()


def test_ckpt_path_last_continues_the_newest_run_of_that_name(finished, cli, recipe):
    run, _ = finished
    request = prepare("fit", ["--config", recipe.name, "--ckpt_path=last"])
    assert request.config["ckpt_path"].endswith(f"{run.name}/checkpoints/last.ckpt")
    again = cli("fit", "--config", recipe.name, "--ckpt_path=last", "--trainer.max_epochs=2")
    assert again.status == 0, again.text
    assert "epoch=1-step=6" in str(list(run.parent.rglob("*.ckpt")))


def test_explicit_modalities_win_over_the_data(recipe):
    text = (
        "{a: {name: a, kind: image, channels: [x, y], value_unit: rgb8, size: [8, 8], gsd_m: 1.0}}"
    )
    run = build("fit", ["--config", recipe.name, f"--model.modalities={text}"])
    assert run.model.modalities["a"].channels == ("x", "y")


def test_a_configuration_is_built_from_plain_python(recipe):
    run = build("fit", ["--config", recipe.name, "--model.mask_ratio=0.25"])
    assert run.model.hparams["mask_ratio"] == 0.25
    assert run.trainer.max_epochs == 1
    assert run.datamodule.root == "sample"


def test_a_datamodule_of_others_takes_what_it_passes_on(recipe):
    text = (
        "{a: {name: a, kind: image, channels: [x, y], value_unit: rgb8, size: [8, 8], gsd_m: 1.0}}"
    )
    words = [f"--model.modalities={text}", "--data=cli_fakes.UndescribedDataModule"]
    run = build("fit", ["--config", recipe.name, *words, "--data.dict_kwargs.root=/data"])
    assert run.datamodule.kwargs == {"root": "/data"}


def test_print_config_prints_a_configuration_that_reads_back(cli, recipe, folder):
    result = cli("fit", "--config", recipe.name, "--print_config")
    assert result.status == 0
    (folder / "printed.yaml").write_text(result.out)
    assert read(folder / "printed.yaml")["model"]["init_args"]["mask_ratio"] == 0.5
    assert not (folder / "runs").exists()


def test_a_chosen_run_dir_is_used_as_it_stands(cli, recipe, folder):
    result = cli("fit", "--config", recipe.name, "--run_dir=here", "--loggers.tensorboard=null")
    assert result.status == 0, result.text
    assert (folder / "here" / "checkpoints" / "last.ckpt").is_file()
    assert not (folder / "here" / "tensorboard").exists()
    assert read(folder / "here" / "config.yaml")["loggers"]["tensorboard"] is None
    assert "run_dir" not in read(folder / "here" / "config.yaml")


def test_wandb_is_a_logger_by_configuration_and_writes_into_the_run(recipe):
    pytest.importorskip("wandb")
    words = ["--loggers.wandb=WandbLogger", "--loggers.wandb.offline=true"]
    request = prepare("fit", ["--config", recipe.name, *words])
    spec = request.arguments()["trainer"]["logger"][-1]
    assert spec["class_path"] == "lightning.pytorch.loggers.WandbLogger"
    assert spec["init_args"] == {
        "offline": True,
        "save_dir": str(request.run_dir),
        "name": "tiny",
    }


def test_a_bar_that_is_turned_off_is_not_replaced_by_that_of_lightning(cli, recipe, folder):
    recipe.write_text(recipe.read_text().replace("  enable_progress_bar: false\n", ""))

    def asked(*words: str) -> object:
        request = prepare("fit", ["--config", recipe.name, *words])
        return request.arguments()["trainer"].get("enable_progress_bar")

    assert asked("--callbacks.progress=null") is False
    assert asked("--callbacks.progress=ProgressBar") is None
    own = ["--callbacks.progress=null", "--trainer.enable_progress_bar=true"]
    assert asked(*own) is True
    assert cli("fit", "--config", recipe.name, "--run_dir=here", own[0]).status == 0
    assert read(folder / "here" / "config.yaml")["trainer"]["enable_progress_bar"] is None


def test_matmul_precision_is_set_by_the_command_line_only(cli, recipe):
    before = torch.get_float32_matmul_precision()
    try:
        build("fit", ["--config", recipe.name])
        assert torch.get_float32_matmul_precision() == before
        build("fit", ["--config", recipe.name, "--matmul_precision=high"])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_cpu_threads_hold_for_the_run_alone(cli, recipe, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    before = torch.get_num_threads()
    assert cli("fit", "--config", recipe.name, "--cpu_threads=1").status == 0
    assert asked == [1, before]


def test_a_requeued_job_keeps_its_folder_and_its_metrics(cli, recipe, folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert prepare("fit", ["--config", recipe.name]).run_dir.as_posix() == "runs/tiny/slurm_77"
    run = folder / "runs" / "tiny" / "slurm_77"
    run.mkdir(parents=True)
    for name in ("metrics.csv", "run.json"):
        (run / name).write_text("{}")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    trainer = prepare("fit", ["--config", recipe.name]).arguments()["trainer"]
    assert trainer["default_root_dir"] == "runs/tiny/slurm_77"
    assert trainer["logger"][0]["init_args"]["version"] == "resumed_1"


def test_a_folder_with_a_run_is_not_written_over(cli, recipe):
    words = ["--config", recipe.name, "--run_dir=here"]
    assert cli("fit", *words).status == 0
    refused = cli("fit", *words)
    assert refused.status == 2
    assert "run_dir 'here' holds a run already" in refused.err
    assert "--ckpt_path=last" in refused.err


def test_a_run_continues_in_its_folder_and_keeps_what_was_there(cli, recipe, folder):
    words = ["--config", recipe.name, "--run_dir=here"]
    assert cli("fit", *words).status == 0
    before = {name: (folder / "here" / name).read_text() for name in ("metrics.csv", "run.json")}
    again = cli("fit", *words, "--ckpt_path=last", "--trainer.max_epochs=2")
    assert again.status == 0, again.text
    assert (folder / "here" / "metrics.csv").read_text() == before["metrics.csv"]
    assert (folder / "here" / "run.1.json").read_text() == before["run.json"]
    rows = list(csv.DictReader((folder / "here" / "resumed_1" / "metrics.csv").open()))
    assert min(int(row["step"]) for row in rows) >= 3
    assert json.loads((folder / "here" / "run.json").read_text())["ckpt_path"].endswith("last.ckpt")
