"""Every mistake of a configuration is reported at once, with its place and a way out."""

import pytest

from domainssl.cli.config.nodes import ConfigMistakes
from domainssl.cli.run.train import build, prepare

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
        (["--config", "tiles_mae"], "No configuration file", "mean 'recipes/tiles_mae.yaml'?"),
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


RENAMED = """\
data:
  class_path: SSL4EOS12DataModule
  init_args:
    products: {s2: S2L2A}
    crop:
      min_px: 64
    dates: views:3
    loading:
      max_bad_share: 0.1
callbacks:
  checkpoint:
    init_args:
      keep: 2
"""
MORE_RENAMED = """\
data:
  class_path: SentinelCubeDataModule
  init_args:
    layers: {}
    windows: {side_m: 640}
    dates: {take: one, most: 2, least_valid: 0.1}
    held_out: {share: 0.1, gap_m: 20}
    window: {size_m: 3}
"""


def test_old_keys_are_answered_with_their_new_names(cli, folder):
    (folder / "old.yaml").write_text(RENAMED)
    result = cli("fit", "--config", "recipes/ssl4eo_croma.yaml", "--config", "old.yaml")
    assert result.status == 2 and "Traceback" not in result.text
    expected = [
        (4, "data.init_args.products", "'products' is now 'modalities'."),
        (5, "data.init_args.crop", "'crop' is now 'window' (with `size`, `min_size`, `max_size`"),
        (7, "data.init_args.dates", "'dates' is now a mapping: {mode: views, max_dates: 3}."),
        (9, "data.init_args.loading.max_bad_share", "'max_bad_share' is now 'max_bad_fraction'."),
        (13, "callbacks.checkpoint.init_args.keep", "'keep' is now 'keep_last'."),
    ]
    blocks = result.err.split("\n- ")[1:]
    assert len(blocks) == len(expected)
    for block, (line, key, advice) in zip(blocks, expected, strict=True):
        assert f"'{key}'" in block and f"(old.yaml, line {line})" in block and advice in block


def test_old_keys_of_cubes_and_tiles_are_answered_too(cli, folder):
    (folder / "old.yaml").write_text(MORE_RENAMED)
    result = cli("fit", "--config", "recipes/cube_croma.yaml", "--config", "old.yaml")
    for old, new in (
        ("layers", "modalities"), ("windows", "window"), ("take", "mode"), ("most", "max_dates"),
        ("least_valid", "min_valid_fraction"), ("share", "val_fraction"), ("gap_m", "gap"),
        ("size_m", "size"),
    ):  # fmt: skip
        assert f"'{old}' is now '{new}'" in result.err
    words = ["--data.footprint.size_m=10", "--data.modalities=[s2, aerial]", "--data.dates.most=3"]
    result = cli("fit", "--config", "recipes/treesat_omnisat.yaml", *words)
    assert "'footprint' is now 'window' (with `size` and `unit: m` instead of `size_m`)." in (
        result.err
    )
    assert "'modalities' is now a mapping of keys to what they read: {s2: s2, aerial: aerial}." in (
        result.err
    )
    assert "(command line, --data.dates.most)" in result.err


REFUSED = """\
seed_everything: -5
trainer:
  max_epochs: 0
  accelerator: gpuu
  limit_train_batches: 0
  gradient_clip_val: .nan
callbacks:
  checkpoint:
    class_path: AtomicCheckpoint
    init_args:
      keep_last: 0
      every_n_epochs: -3
model:
  class_path: cli_fakes.FakeObjective
  init_args:
    mask_ratio: {class_path: os.getcwd}
    context_size: '64'
data:
  class_path: cli_fakes.FakeDataModule
  init_args:
    root: ""
    window: 999999999999999999999999
"""


def test_values_that_cannot_be_meant_are_reported_with_lines(cli, folder):
    from inspect import signature

    from domainssl.callbacks.checkpoint import AtomicCheckpoint

    text = REFUSED
    if "keep_last" not in signature(AtomicCheckpoint).parameters:
        text = text.replace("keep_last", "keep")
    (folder / "refused.yaml").write_text(text)
    result = cli("fit", "--config", "refused.yaml")
    assert result.status == 2 and "Traceback" not in result.text
    for line, words in (
        (1, "'seed_everything' is -5"),
        (3, "'trainer.max_epochs' is 0"),
        (5, "'trainer.limit_train_batches' is 0"),
        (4, "invalid accelerator name"),
        (6, "'trainer.gradient_clip_val' is nan"),
        (11, "AtomicCheckpoint.keep"),
        (12, "every_n_epochs: got -3, expected 1 or more, or 0 for never"),
        (16, "'model.init_args.mask_ratio.class_path' names a class, 'os.getcwd'"),
        (17, "'model.init_args.context_size' is '64'"),
        (21, "'data.init_args.root' is ''"),
        (22, "'data.init_args.window' is 999999999999999999999999"),
    ):
        block = next(b for b in result.err.split("\n- ") if words in b)
        assert f"(refused.yaml, line {line})" in block
    assert result.err.startswith("error: 11 mistakes")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--trainer.accelerator=gpuu"], "invalid accelerator name: `accelerator='gpuu'`"),
        (["--trainer.strategy=ddpp"], "invalid strategy name: `strategy='ddpp'`"),
        (["--trainer.devices=two"], "`devices` selected with `CPUAccelerator`"),
        (["--trainer=[1,2]"], "'trainer' holds [1, 2], not a mapping"),
        (["--callbacks=[Timer]"], "'callbacks' holds ['Timer'], not a mapping"),
        (["--data.root="], "Option '--data.root' has an empty value"),
        (["--run_dir= "], "Option '--run_dir' has an empty value"),
        (["--model.mask_ratio=" + "[" * 5000], "nested more than"),
        (["--model.mask_ratio=" + "[" * 80 + "]" * 80], "nested more than 50 levels"),
        (["--run_dir=tiny.yaml"], "'run_dir' is 'tiny.yaml', which is no folder"),
    ],
)
def test_refused_values_of_the_command_line_name_their_option(cli, recipe, words, found):
    result = cli("fit", "--config", recipe.name, *words)
    assert result.status == 2 and "Traceback" not in result.text
    assert found in result.err
    assert "(command line, --" in result.err
    assert len(result.err) < 2000


@pytest.mark.parametrize(
    ("key", "value", "place", "why"),
    [
        ("data.window.flips", "yes", "data.init_args.window.flips", "write true or false"),
        ("data.window.flips", "[true, yes]", "window.flips[1]", "write true or false"),
        ("data.window.size", "['64', 64]", "window.size[0]", "leave the quotes out"),
        ("model.optimization.betas", "['0.9', 0.9]", "betas[0]", "leave the quotes out"),
        ("model.optimization.betas", "[.nan, 0.9]", "betas[0]", "not a number (nan)"),
        ("model.loss_weights.contrastive", "'1'", "loss_weights.contrastive", "leave the quotes"),
    ],
)
def test_a_text_among_numbers_is_refused_at_its_place(repository, key, value, place, why):
    recipe = str(repository / "recipes" / "ssl4eo_croma.yaml")
    with pytest.raises(ConfigMistakes) as found:
        prepare("fit", ["--config", recipe, f"--{key}={value}"])
    text = str(found.value)
    assert text.startswith("1 mistake") and f"{place}' is " in text and why in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoding.patch_size", 0),
        ("encoding.patch_size", "[8, -1]"),
        ("encoding.architecture.width", -1),
        ("encoding.architecture.heads", 0),
        ("encoding.architecture.depth", -2),
        ("encoding.architecture.decoder_width", 0),
    ],
)
def test_sizes_that_nothing_can_be_built_of_are_refused_with_their_place(repository, key, value):
    recipe = str(repository / "recipes" / "ssl4eo_croma.yaml")
    words = ["--config", recipe, "--trainer.accelerator=cpu", f"--model.{key}={value}"]
    with pytest.raises(ConfigMistakes, match=rf"model\.init_args\.{key}: got .*command line"):
        build("fit", words)
