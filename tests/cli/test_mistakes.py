"""Every mistake of a configuration is reported at once, with its place and a way out."""

import pytest

BROKEN = """\
seed_everything: 0
trainer:
  max_epocs: 1
  precision: bf16-true
  callbacks: []
  devices: {}
calbacks:
  progress: ProgressBar
max_steps: 4
mask_ratio: 0.5
callbacks:
  timer: Timmer
  empty:
    init_args: {}
model:
  class_path: cli_fakes.FakeObjective
  size: tiny
  init_args:
    mask_ratoi: 0.5
    size: tinny
    context_size: many
    optimization: {lrr: 1e-2, lr: fast}
data:
  class_path: cli_fakes.FakeDataModule
  init_args:
    rot: !!python/name:os.system
"""


def test_all_mistakes_are_reported_at_once_with_lines(cli, folder):
    (folder / "broken.yaml").write_text(BROKEN)
    result = cli("fit", "--config", "broken.yaml", "--trainer.max_epochs=many")
    assert result.status == 2
    assert "Traceback" not in result.text
    assert result.err.startswith("error: 19 mistakes in the configuration; nothing was run.")
    expected = [
        (3, "Unknown config key 'trainer.max_epocs'", "Did you mean 'max_epochs'? Trainer accepts"),
        (4, "trainer.precision 'bf16-true' is refused", "It would round digital numbers"),
        (5, "'trainer.callbacks' is not set here", "Write callbacks at the top level, by name"),
        (6, "'trainer.devices' is {}, which is not accepted", "Accepted: "),
        (7, "Unknown config key 'calbacks'", "Did you mean 'callbacks'? Accepted: trainer, model"),
        (9, "Unknown config key 'max_steps'", "It belongs to the trainer: trainer.max_steps"),
        (
            10,
            "Unknown config key 'mask_ratio'",
            "It belongs to FakeObjective: model.init_args.mask",
        ),
        (12, "Unknown callback class 'Timmer' in 'callbacks.timer.class_path'", "Did you mean 'Ti"),
        (13, "'callbacks.empty' names no class", "Give class_path, or write null"),
        (17, "Unknown config key 'model.size'", "one level deeper: model.init_args.size"),
        (19, "Unknown config key 'model.init_args.mask_ratoi'", "Did you mean 'mask_ratio'? Fake"),
        (
            20,
            "'model.init_args.size' is 'tinny', which is not accepted",
            "Did you mean 'tiny'? Acc",
        ),
        (21, "'model.init_args.context_size' is 'many', which is not", "Accepted: a whole number."),
        (22, "Unknown config key 'model.init_args.optimization.lrr'", "Did you mean 'lr'? FakeOpt"),
        (22, "'model.init_args.optimization.lr' is 'fast'", "Accepted: a number."),
        (23, "FakeDataModule needs 'root'", "Write data.init_args.root: text"),
        (26, "The YAML tag '!!python/name:os.system' is refused", "plain data only; nothing was"),
        (26, "Unknown config key 'data.init_args.rot'", "Did you mean 'root'? FakeDataModule acce"),
    ]
    blocks = result.err.split("\n- ")[1:]
    for block, (line, found, advice) in zip(blocks, expected, strict=False):
        assert found in block and f"(broken.yaml, line {line})" in block and advice in block
    assert "'trainer.max_epochs' is 'many'" in blocks[-1]
    assert "(command line, --trainer.max_epochs)" in blocks[-1]
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "found", "advice"),
    [
        (
            ["--model=CROMO", "--data=FakeData"],
            "Unknown model class 'CROMO'",
            "Did you mean 'CROMA'?",
        ),
        (["--model=nowhere.Model"], "'nowhere' cannot be imported", "Check the dotted path"),
        (["--model=cli_fakes.FakeObjectiv"], "has no class 'FakeObjectiv'", "'FakeObjective'"),
        (["--model=cli_fakes.FakeDataModule"], "'FakeDataModule' is no model", "LightningModule"),
        (["--model.mask_ratoi=1"], "Unknown config key 'model.init_args.mask_ratoi'", "mask_ratio"),
        (["--model.mask_ratio", "lots"], "'model.init_args.mask_ratio' is 'lots'", "a number"),
        (["--model.optimization.lrr=1"], "model.init_args.optimization.lrr'", "Did you mean 'lr'"),
        (["--trainer.max_epochs"], "Option '--trainer.max_epochs' has no value", "=VALUE"),
        (["other.yaml"], "Stray word 'other.yaml'", "Write --config other.yaml"),
        (["--trainer.use_distributed_sampler=true"], "not set here", "deal the samples"),
        (["--trainer.logger=true"], "'trainer.logger' is not set here", "Write loggers at the top"),
        (["--model=null"], "No model is given", "--config"),
        (["--matmul_precision=fast"], "'matmul_precision' is 'fast'", "'highest', 'high' or"),
        (["--data.root=[a"], "Not valid YAML", "quotes and brackets"),
        (["--trainer..max_epochs=1"], "'--trainer..max_epochs' is no key", "Keys look like"),
        (["--ckpt_path=none.ckpt"], "'ckpt_path' is 'none.ckpt', which does not exist", "newest"),
        (["--config", "tiny"], "No configuration file 'tiny' here", "recipes` lists"),
        (["--config", "recipes/ssl4eo_crom.yaml"], "No configuration file", "ssl4eo_croma.yaml"),
    ],
)
def test_one_mistake_names_the_found_and_the_expected(cli, recipe, words, found, advice):
    result = cli("fit", "--config", recipe.name, *words)
    assert result.status == 2
    assert found in result.err and advice in result.err
    assert "Traceback" not in result.text


def test_a_broken_file_does_not_hide_the_mistakes_of_another(cli, recipe, folder):
    (folder / "broken.yaml").write_text("trainer: [1\n")
    (folder / "over.yaml").write_text("trainer:\n  max_epocs: 3\n")
    result = cli("fit", "--config", recipe.name, "--config", "broken.yaml", "--config", "over.yaml")
    assert result.status == 2
    assert "Not valid YAML" in result.err
    assert "'trainer.max_epocs' (over.yaml, line 2)" in result.err
    assert "No model is given" not in result.err


def test_a_file_that_is_no_mapping_is_refused(cli, folder):
    (folder / "list.yaml").write_text("- 1\n")
    result = cli("fit", "--config", "list.yaml")
    assert result.status == 2
    assert "A configuration is a mapping of keys" in result.err


def test_a_datamodule_without_modalities_is_refused_with_the_way_out(cli, recipe):
    result = cli("fit", "--config", recipe.name, "--data=cli_fakes.UndescribedDataModule")
    assert result.status == 2
    assert "UndescribedDataModule does not say which modalities it yields" in result.err
    assert "model.init_args.modalities" in result.err


def test_arguments_that_a_class_passes_on_have_a_place_of_their_own(cli, recipe):
    words = ["--data=cli_fakes.UndescribedDataModule", "--data.root=x"]
    result = cli("fit", "--config", recipe.name, *words)
    assert result.status == 2
    assert "UndescribedDataModule accepts: batch_size. It passes others on" in result.err
    assert "data.dict_kwargs" in result.err


def test_debug_shows_where_an_error_arose(cli, recipe):
    from domainssl.cli.config.nodes import ConfigMistakes

    with pytest.raises(ConfigMistakes):
        cli("fit", "--config", recipe.name, "--model.mask_ratoi=1", "--debug")


def test_ckpt_path_last_without_an_earlier_run_is_refused(cli, recipe):
    result = cli("fit", "--config", recipe.name, "--ckpt_path=last")
    assert result.status == 2
    assert "--ckpt_path last: no checkpoints/last.ckpt in 'runs/tiny'" in result.err
