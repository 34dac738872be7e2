"""Recipe, overlays and command line add up in a fixed order."""

import pytest

from domainssl.cli.config.compose import compose, spec_path

OVERLAY = """\
trainer:
  max_epochs: 7
callbacks:
  timer: null
  checkpoint:
    init_args: {save_top_k: 0}
model:
  init_args:
    optimization: {warmup_steps: 5}
"""


def composed(*words):
    result = compose([str(word) for word in words])
    assert result.mistakes == []
    return result.tree.plain()


def test_overlays_are_merged_key_by_key(recipe, folder):
    (folder / "over.yaml").write_text(OVERLAY)
    config = composed("--config", recipe.name, "--config", "over.yaml")
    assert config["trainer"]["max_epochs"] == 7 and config["trainer"]["devices"] == 1
    assert config["model"]["init_args"]["optimization"] == {"lr": 1e-2, "warmup_steps": 5}
    assert config["callbacks"] == {
        "checkpoint": {
            "class_path": "ModelCheckpoint",
            "init_args": {"save_last": True, "save_top_k": 0},
        }
    }


def test_the_command_line_has_the_last_word(recipe, folder):
    (folder / "over.yaml").write_text(OVERLAY)
    words = ["--trainer.max_epochs", "9", "--config", recipe.name, "--config", "over.yaml"]
    config = composed(*words, "--model.optimization.lr=3e-4", "--callbacks.checkpoint.save_top_k=2")
    assert config["trainer"]["max_epochs"] == 9
    assert config["model"]["init_args"]["optimization"] == {"lr": 3e-4, "warmup_steps": 5}
    assert config["callbacks"]["checkpoint"]["init_args"]["save_top_k"] == 2


def test_a_change_of_class_drops_the_arguments_of_the_old_one(recipe):
    config = composed("--config", recipe.name, "--model", "other.Model", "--model.depth=2")
    assert config["model"] == {"class_path": "other.Model", "init_args": {"depth": 2}}


def test_naming_the_same_class_keeps_its_arguments(recipe):
    config = composed("--config", recipe.name, "--model=FakeObjective")
    assert config["model"]["init_args"]["mask_ratio"] == 0.5


def test_null_removes_a_default_logger(recipe):
    config = composed("--config", recipe.name, "--loggers.tensorboard=null")
    assert config["loggers"] == {"csv": {"class_path": "CSVLogger"}}


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("model.size", "model.init_args.size"),
        ("model.optimization.lr", "model.init_args.optimization.lr"),
        ("model.init_args.size", "model.init_args.size"),
        ("model.class_path", "model.class_path"),
        ("callbacks.timer.duration", "callbacks.timer.init_args.duration"),
        ("callbacks.timer", "callbacks.timer"),
        ("trainer.max_epochs", "trainer.max_epochs"),
        ("model", "model"),
    ],
)
def test_short_forms_of_arguments_are_completed(short, full):
    assert ".".join(spec_path(short.split("."))) == full


def test_an_overlay_before_its_recipe_is_refused_with_the_right_order(recipe, folder):
    (folder / "over.yaml").write_text(OVERLAY)
    mistakes = compose(["--config", "over.yaml", "--config", recipe.name]).mistakes
    assert [str(m) for m in mistakes] == [
        "The overlay 'over.yaml' stands before the recipe 'tiny.yaml' (command line).\n"
        "  Write --config tiny.yaml first, then --config over.yaml"
    ]


def test_a_second_recipe_is_refused(recipe, folder):
    (folder / "two.yaml").write_text(recipe.read_text())
    mistakes = compose(["--config", recipe.name, "--config", "two.yaml"]).mistakes
    assert "'two.yaml' is a second recipe after 'tiny.yaml'" in str(mistakes[0])


def test_a_list_in_an_overlay_replaces_the_whole_list(recipe, folder):
    for name, text in {"over": "[0.9, 0.95]", "last": "[0.8]"}.items():
        rest = f"model:\n  init_args:\n    optimization:\n      betas: {text}\n"
        (folder / f"{name}.yaml").write_text(rest)
    words = [
        word for name in (recipe.name, "over.yaml", "last.yaml") for word in ("--config", name)
    ]
    for count, expected in ((4, [0.9, 0.95]), (6, [0.8])):
        composition = compose(words[:count])
        assert composition.mistakes == []
        found = composition.tree.get("model", "init_args", "optimization", "betas")
        assert found.plain() == expected


def test_an_overlay_alone_is_told_to_go_over_a_recipe(cli, folder):
    (folder / "over.yaml").write_text("trainer:\n  max_epochs: 7\n")
    result = cli("fit", "--config", "over.yaml")
    assert result.status == 2
    assert "No model is given" in result.err and "No data is given" in result.err
    assert (
        "Start from a recipe: --config recipes/" in result.err
        and "--config over.yaml" in result.err
    )


def test_files_are_found_in_the_working_directory_before_the_package(folder):
    before = compose(["--config", "recipes/ssl4eo_croma.yaml"])
    assert before.mistakes == [] and before.name == "ssl4eo_croma"
    (folder / "recipes").mkdir()
    (folder / "recipes" / "ssl4eo_croma.yaml").write_text("model: other.Model\ndata: other.Data\n")
    after = compose(["--config", "recipes/ssl4eo_croma.yaml"])
    assert after.tree.plain()["model"] == {"class_path": "other.Model"}
