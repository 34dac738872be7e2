"""Every recipe runs through the command line, and every overlay fits over it."""

import re
import signal
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from recipe_runs import LEARN, assert_exports

from domainssl.backbones.encoders.files import published_modality
from domainssl.cli.config import catalog
from domainssl.cli.run.train import build, prepare
from domainssl.matrix.gains import FEW
from domainssl.matrix.record import read_record
from domainssl.objectives.decur import DeCUR
from domainssl.objectives.joint_embedding import published_views

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*.yaml"))
OVERLAYS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
TRAINED = {*LEARN, *FEW}  # slow tests train them to the end and export them
SHORT = [recipe for recipe in RECIPES if Path(recipe).stem not in TRAINED]


def _first_ones(names: list[str]) -> set[str]:
    """Return the recipes that bring a method or a DataModule that no earlier one has."""
    found, seen = set[str](), set[str]()
    for name in names:
        config = yaml.safe_load((ROOT / name).read_text())
        kinds = {config[section]["class_path"] for section in ("model", "data")}
        if kinds - seen:
            found.add(name)
        seen |= kinds
    return found


FIRST = _first_ones(SHORT)  # slow tests run the others
TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
]
SMALL = ["--data.global_batch_size=8", "--callbacks.evaluation=null"]  # tests/learning evaluates


TIMES = {
    "about half a minute": 30, "about a minute": 60, "about a minute and a half": 90,
    "about two minutes": 120,
}  # fmt: skip
HOMES = {"volumes": "medical", "tiles": "pathology", "slides": "pathology"}  # others: geo
NEEDS = re.compile(
    r"# needs: pip install 'domainssl\[(\w+)\]'; the embedded sample is made on first use\. "
    r"A CPU takes (.*)\.$"
)


@pytest.fixture(scope="module")
def costs() -> dict[str, list[float]]:
    """Processor seconds of the runs of the matrix."""
    entries = read_record(ROOT / "docs/matrix.json")
    return {e.name: [run.cost["cpu_seconds"] for run in e.runs if run.cost] for e in entries}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_its_extra_and_how_long_it_takes(name, costs):
    """The one place of both: the list of recipes and the README repeat it."""
    text = (ROOT / name).read_text()
    found = NEEDS.match(text.splitlines()[1])
    assert found is not None, "expected: " + NEEDS.pattern
    data = yaml.safe_load(text)["data"]["class_path"].rpartition(".")[2]
    home = catalog.find_classes("data")[data].split(".")[-2]
    assert found[1] == HOMES.get(home, "geo")
    own, seconds = costs.get(Path(name).stem), TIMES[found[2]]
    assert not own or seconds / 2 < statistics.median(own) < 2 * seconds, own
    if name.endswith("/ssl4eo_croma.yaml"):
        readme = " ".join((ROOT / "README.md").read_text().split())
        assert f"Sentinel-2 images: {found[2]} on a CPU" in readme


def test_recipes_are_listed_by_domain_with_extra_and_time(cli):
    lines = cli("recipes").out.splitlines()
    place = {line.split()[0]: i for i, line in enumerate(lines) if line.startswith("  recipes/")}
    starts = [i for i, line in enumerate(lines) if "pip install" in line and line[0] != " "]
    assert [lines[i].partition(":")[0] for i in starts] == [
        "Earth observation", "CT, MR and PET", "Tiles and slides",
    ]  # fmt: skip
    assert starts[0] < place["recipes/ssl4eo_croma.yaml"] < starts[1]
    assert (
        starts[1] < place["recipes/petct_croma.yaml"] < starts[2] < place["recipes/tiles_mae.yaml"]
    )
    assert place.keys() == set(RECIPES)
    row = lines[place["recipes/tiles_mae.yaml"]]
    assert row.endswith("MAE on H&E tiles, small enough for a CPU (about a minute)")


def test_recipes_and_overlays_are_found():
    assert RECIPES and OVERLAYS
    assert set(RECIPES) <= set(catalog.recipes()) and set(OVERLAYS) <= set(catalog.configs())


@pytest.mark.parametrize("name", [*RECIPES, *OVERLAYS])
def test_a_configuration_says_first_what_it_is(name):
    lines = (ROOT / name).read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith("# needs: ")


@pytest.mark.parametrize("recipe", sorted({*TRAINED, *(Path(r).stem for r in {*SHORT} - FIRST)}))
def test_a_recipe_that_slow_tests_run_has_no_mistakes(folder, recipe):
    request = prepare("fit", [f"--config=recipes/{recipe}.yaml"])
    assert request.name == recipe and set(request.classes) >= {"model", "data"}


@pytest.mark.parametrize(
    "recipe", [r if r in FIRST else pytest.param(r, marks=pytest.mark.slow) for r in SHORT]
)
def test_a_recipe_runs_and_exports(cli, folder, recipe, sample_root):
    result = cli("fit", "--config", recipe, *TINY, *SMALL, "--run_dir=run")
    assert result.status == 0, result.text
    assert_exports(Path("run"), Path("out"))
    if not recipe.endswith("_croma.yaml"):
        return  # refusals are the same of all
    refused = cli("export", "--checkpoint", "run", "--output", "out")
    assert refused.status == 2 and "add --overwrite" in refused.err
    assert cli("export", "--checkpoint", "run", "--output", "out", "--overwrite").status == 0


def recipe_of(overlay: str) -> str:
    """Return the recipe that an overlay is made for: a model's size names its method."""
    if overlay.endswith("_pastis.yaml"):
        return "pastis_maestro"
    if overlay.endswith("_mri.yaml"):
        return f"mri_{Path(overlay).stem.split('_')[0]}"
    if overlay.endswith("_tiles.yaml"):
        method = Path(overlay).stem.partition("_")[0]
        names = [Path(recipe).stem for recipe in RECIPES]
        return next(n for n in (f"tiles_{method}", f"stains_{method}") if n in names)
    if not overlay.startswith("configs/model/"):
        return "ssl4eo_croma"
    if overlay.endswith("_volumes.yaml"):  # of a method that images have too
        return f"ctmr_{Path(overlay).stem.partition('_')[0]}"
    fitting = []
    for recipe in map(Path, RECIPES):
        data, _, method = recipe.stem.partition("_")
        if Path(overlay).stem.startswith(f"{method}_"):
            fitting.append((-len(method), data not in ("ssl4eo", "treesat"), recipe.stem))
    return min(fitting)[-1]


def published(recipe: str) -> str:
    """Return the words that the head of a recipe gives for published sizes."""
    found = re.search(r"^# Published sizes: +… (.+)$", (ROOT / recipe).read_text(), re.MULTILINE)
    return found[1] if found else ""


NAMED = {(Path(recipe).stem, words) for recipe in RECIPES if (words := published(recipe))}
OTHERS = {
    (recipe_of(overlay), f"--config {overlay}")
    for overlay in OVERLAYS
    if not any(overlay in words for _, words in NAMED)
}


@pytest.mark.parametrize(("recipe", "words"), sorted(NAMED | OTHERS))
def test_overlays_fit_over_the_recipe_that_names_them_or_has_their_method(folder, recipe, words):
    request = prepare("fit", ["--config", f"recipes/{recipe}.yaml", *words.split()])
    assert request.name == recipe


@pytest.mark.parametrize("method", ["simclr", "clip", "barlow_twins", "vicreg"])
def test_the_siblings_overlays_hold_the_published_values(folder, method):
    overlay = f"configs/model/{method}_resnet50.yaml"
    words = ["--config", f"recipes/ssl4eo_{method}.yaml", "--config", overlay]
    config = prepare("fit", words).config
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    rates = {name: model["optimization"][name] for name in ("optimizer", "lr", "lr_bias")}
    assert rates == {"optimizer": "lars", "lr": 0.2, "lr_bias": 0.0048}
    assert (
        model["encoding"]["encoder"] == "resnet50"
        and model["encoding"]["normalization"] == "mean2std8"
    )
    wide = method in ("barlow_twins", "vicreg")
    assert list(model["projector"]) == ([8192, 8192, 8192] if wide else [512, 128])
    assert model.get("temperature", 1.0) == 1.0
    assert data["modalities"] == {"s1": "S1GRD", "s2": "S2L1C"}
    assert (data["global_batch_size"], data["window"]["size"]) == (
        512 if method == "barlow_twins" else 256,
        264,
    )
    assert model["views"] is None and data["dates"] == {"mode": "all", "max_dates": None}


def test_published_sizes_stand_in_the_model_overlays(folder):
    words = ["--config", "recipes/ssl4eo_croma.yaml", "--config", "configs/model/croma_base.yaml"]
    config = prepare("fit", words).config
    arguments = config["model"]["init_args"]
    encoding = arguments["encoding"]
    assert (encoding["size"], encoding["patch_size"], arguments["mask_ratio"]) == (
        "base",
        8,
        0.75,
    )
    assert config["data"]["init_args"]["window"]["size"] == 120
    assert config["trainer"]["max_epochs"] == 300


# published parameters of a backbone of 2 and of 13 bands, and of the projector they share
DECUR = {
    "resnet50": (23_504_896, 23_539_392, 151_027_712),
    "resnet50_rda": (23_504_896, 23_539_392, 151_027_712),
    "vit_small": (21_567_360, 22_648_704, 137_396_224),
}


@pytest.mark.parametrize("size", DECUR)
def test_published_sizes_of_decur_stand_in_its_overlays(folder, size):
    words = ["--config", "recipes/ssl4eo_decur.yaml"]
    words += ["--config", f"configs/model/decur_{size}.yaml"]
    config = prepare("fit", words).config
    arguments, data = config["model"]["init_args"], config["data"]["init_args"]
    assert data["window"]["size"] == 264 and data["modalities"]["s2"] == "S2L1C"
    with torch.device("meta"):
        model = DeCUR({m.name: m for m in map(published_modality, (2, 13))}, **arguments)
    assert (model.common, model.view_size, model.off_diagonal) == (7168, (224, 224), 0.0051)
    assert model.views == {n: published_views(m) for n, m in model.backbone.modalities.items()}
    assert model.optimization.optimizer == ("lars" if size == "resnet50" else "adamw")
    parts = [*model.backbone.encoders.values(), model.heads["shared"]]
    counts = tuple(sum(p.numel() for p in part.parameters()) for part in parts)
    assert counts == DECUR[size]
    assert set(model.backbone.attention) == ({"shared"} if size.endswith("rda") else set())


def test_published_sizes_of_omnisat_build_the_published_model(folder, sample_root):
    words = ["--config", "recipes/treesat_omnisat.yaml"]
    words += ["--config", "configs/model/omnisat_base.yaml"]
    sensors = "--data.modalities.s1_des=null"
    model = build("fit", [*words, sensors, "--trainer.accelerator=cpu"]).model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 11_621_072  # counted in the published network for these three sensors
    assert (model.backbone.grid, model.backbone.patch_size["aerial"]) == ((6, 6), 50)
    assert model.backbone.series.dropout == 0.2 and model.max_frames == 50


@pytest.mark.parametrize(
    ("recipe", "overlay", "cells", "size"),
    [
        ("treesat_maestro", "maestro_base", 96, None),
        ("pastis_maestro", "maestro_base_pastis", 256, 160),
    ],
)
def test_the_maestro_overlays_restore_what_the_recipes_shrink(
    folder, sample_root, recipe, overlay, cells, size
):
    words = ["--config", f"recipes/{recipe}.yaml", "--config", f"configs/model/{overlay}.yaml"]
    # the published grid and fusion build; width and depth are checked as numbers
    small = ["--model.encoding.architecture.width=64", "--model.encoding.architecture.depth=4"]
    assert build("fit", [*words, *small, "--trainer.accelerator=cpu"]).model
    config = prepare("fit", words).config
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    encoding = model["encoding"]
    sizes = encoding["architecture"]
    assert (sizes["width"], sizes["depth"], sizes["decoder_width"]) == (768, 12, 512)
    assert (encoding["shared_depth"], model["masking"]["ratio"], model["loss"]) == (
        3,
        0.75,
        "l1_norm",
    )
    assert {given["patch_size"] for n, given in encoding["inputs"].items() if n != "aerial"} == {2}
    assert (encoding["position_cells"], data["window"]["size"]) == (cells, size)
    assert data["dates"]["max_dates"] == {"s2": 16, "s1_asc": 4, "s1_des": 4}
    assert data["dates"]["choice"] == "typical" and data["global_batch_size"] == 128


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


def test_no_recipe_keeps_names_of_exams_plain() -> None:
    """Samples are named plainly without being asked; on a hospital's data a recipe must not."""
    asked = [p.name for p in Path("recipes").glob("*.yaml") if "ids: plain" in p.read_text()]
    assert not asked
