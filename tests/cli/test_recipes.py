"""Every recipe runs through the command line, and every overlay fits over it."""

import signal
from pathlib import Path

import pytest

from domainssl.cli import catalog
from domainssl.cli.train import build, prepare

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*.yaml"))
OVERLAYS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
TINY = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]


def test_recipes_and_overlays_are_found():
    assert RECIPES and OVERLAYS
    assert set(RECIPES) <= set(catalog.recipes()) and set(OVERLAYS) <= set(catalog.configs())


@pytest.mark.parametrize("name", [*RECIPES, *OVERLAYS])
def test_a_configuration_says_first_what_it_is(name):
    lines = (ROOT / name).read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith("# needs: ")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_and_exports(cli, folder, recipe, sample_root):
    result = cli("fit", "--config", recipe, *TINY, "--run_dir=run")
    assert result.status == 0, result.text
    assert (folder / "run" / "config.yaml").is_file()
    exported = cli("export", "--checkpoint", "run", "--output", "out")
    assert exported.status == 0, exported.text
    from domainssl import load_backbone

    assert load_backbone(folder / "out").modalities
    refused = cli("export", "--checkpoint", "run", "--output", "out")
    assert refused.status == 2 and "add --overwrite" in refused.err
    assert cli("export", "--checkpoint", "run", "--output", "out", "--overwrite").status == 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_fits_over_the_recipe(folder, overlay):
    own = {"maestro": "treesat_maestro", "omnisat": "treesat_omnisat"}
    recipe = own.get(Path(overlay).stem.partition("_")[0], "ssl4eo_croma")
    request = prepare("fit", ["--config", f"recipes/{recipe}.yaml", "--config", overlay])
    assert request.name == recipe


def test_published_sizes_stand_in_the_model_overlays(folder):
    words = ["--config", "recipes/ssl4eo_croma.yaml", "--config", "configs/model/croma_base.yaml"]
    config = prepare("fit", words).config
    arguments = config["model"]["init_args"]
    assert (arguments["size"], arguments["patch_size"], arguments["mask_ratio"]) == (
        "base",
        8,
        0.75,
    )
    assert config["data"]["init_args"]["crop"]["size"] == 120
    assert config["trainer"]["max_epochs"] == 300


def test_published_sizes_of_omnisat_build_the_published_model(folder, sample_root):
    words = ["--config", "recipes/treesat_omnisat.yaml"]
    words += ["--config", "configs/model/omnisat_base.yaml"]
    sensors = "--data.modalities=[aerial,s2,s1_asc]"
    model = build("fit", [*words, sensors, "--trainer.accelerator=cpu"]).model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 11_621_072  # counted in the published network for these three sensors
    assert (model.backbone.grid, model.backbone.patch_size["aerial"]) == ((6, 6), 50)
    assert model.backbone.series.dropout == 0.2 and model.max_frames == 50


SLURM = ["--config", "recipes/ssl4eo_croma.yaml", "--config", "configs/trainer/slurm.yaml"]
ON_ONE_CPU = ["--trainer.accelerator=cpu", "--trainer.num_nodes=1", "--trainer.devices=1"]


def test_the_slurm_overlay_outside_a_job_says_how_to_submit(cli):
    result = cli("fit", *SLURM, *ON_ONE_CPU)
    assert result.status == 2
    assert "was not started by srun" in result.err
    assert "sbatch configs/trainer/slurm.sh" in result.err


def test_the_slurm_overlay_requeues_on_its_signal(folder, monkeypatch):
    facts = {"JOB_ID": 5, "NODEID": 0, "PROCID": 0, "LOCALID": 0, "NTASKS": 1, "JOB_NAME": "x"}
    for name, value in facts.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    run = build("fit", [*SLURM, *ON_ONE_CPU])
    environment = run.trainer.strategy.cluster_environment
    assert environment.auto_requeue and environment.requeue_signal is signal.SIGUSR1
    script = (ROOT / "configs" / "trainer" / "slurm.sh").read_text()
    assert "--signal=SIGUSR1@" in script and "--requeue" in script
