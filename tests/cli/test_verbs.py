"""The verb table, help without torch, and the verbs that run nothing."""

import json
import os
import statistics
import subprocess
import sys

import pytest
from cli_runs import HANG_S
from scan_files import ramp, write_nifti

from domainssl.cli import main, verb_table

VERBS = (
    "fit", "validate", "test", "predict",
    "inspect", "stats", "recipes", "export", "doctor", "cache", "matrix", "gains",
)  # fmt: skip


def test_the_table_holds_every_verb_with_a_line_of_help():
    table = verb_table()
    assert set(VERBS) <= set(table)
    assert all(len(line) > 10 for line in table.values())


def test_help_lists_every_verb(cli):
    result = cli("--help")
    assert result.status == 0
    for verb, line in verb_table().items():
        assert f"  {verb:<10} {line}" in result.out


def test_an_unknown_verb_names_the_nearest(cli):
    result = cli("fitt")
    assert result.status == 2
    assert "Unknown verb 'fitt'. Did you mean 'fit'?" in result.err


def test_a_verb_that_was_replaced_is_answered_with_the_new_one(cli):
    result = cli("learning")
    assert result.status == 2
    assert "The verb 'learning' was replaced by 'matrix'" in result.err


def test_an_option_before_the_verb_is_explained(cli):
    result = cli("--config", "x.yaml", "fit")
    assert result.status == 2
    assert "Option '--config' stands before the verb" in result.err


@pytest.mark.parametrize("words", [["--help"], *[[verb, "--help"] for verb in VERBS]])
def test_help_answers_without_torch(spawn, words):
    code = (
        "import sys\nfrom domainssl.cli import main\n"
        f"status = main({words!r})\n"
        "heavy = {'torch', 'lightning', 'torchgeo', 'monai', 'zarr'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy or status else 0)"
    )
    done = spawn("-c", code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200


def seconds(*words):
    """Processor seconds of a child process, which do not grow with the load of the machine."""
    before = os.times()
    subprocess.run([sys.executable, *words], check=True, capture_output=True, timeout=HANG_S)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


@pytest.mark.slow
def test_help_is_a_small_part_of_importing_lightning(repository, monkeypatch):
    monkeypatch.chdir(repository)
    commands = {
        "bare": ("-c", "import lightning.pytorch.cli"),
        "help": ("-m", "domainssl", "--help"),
        "fit": ("-m", "domainssl", "fit", "--help"),
    }
    rounds = [{name: seconds(*words) for name, words in commands.items()} for _ in range(3)]
    median = {name: statistics.median(row[name] for row in rounds) for name in commands}
    assert median["help"] < 0.5 * median["bare"], rounds
    assert median["fit"] < 1.5 * median["bare"], rounds


def test_class_help_shows_arguments_types_and_defaults(cli):
    result = cli("fit", "--model.help", "cli_fakes.FakeObjective")
    assert result.status == 0
    assert "--model.mask_ratio\n      a number (default 0.75)" in result.out
    assert "keys of FakeOptions: lr, betas, warmup_steps" in result.out
    assert "(required, taken from the data)" in result.out


def test_class_help_for_an_unknown_name_names_the_nearest(cli):
    result = cli("fit", "--model.help=CROMO")
    assert result.status == 2
    assert "Did you mean 'CROMA'?" in result.err


def test_short_names_are_found_without_importing_their_modules(spawn):
    code = (
        "import sys\nfrom domainssl.cli.config.catalog import find_classes\n"
        "assert find_classes('model')['CROMA'] == 'domainssl.objectives.croma.CROMA'\n"
        "name = 'domainssl.datamodules.ssl4eo.SSL4EOS12DataModule'\n"
        "assert find_classes('data')['SSL4EOS12DataModule'] == name\n"
        "assert find_classes('callbacks')['ProgressBar'].startswith('domainssl.')\n"
        "assert 'Timer' in find_classes('callbacks') and 'torch' not in sys.modules"
    )
    done = spawn("-c", code)
    assert done.returncode == 0, done.stderr


def test_recipes_lists_what_there_is_with_its_needs(cli, folder):
    (folder / "configs").mkdir()
    (folder / "configs" / "mine.yaml").write_text("# My overlay\n# needs: a lake\ntrainer: {}\n")
    result = cli("recipes")
    assert result.status == 0
    assert "recipes/ssl4eo_croma.yaml" in result.out and "CROMA" in result.out
    assert "configs/trainer/slurm.yaml" in result.out
    assert "My overlay" in result.out and "needs: a lake" in result.out


def test_doctor_reports_status_and_remedy(cli, folder, monkeypatch):
    monkeypatch.setenv("DOMAINSSL_CACHE", str(folder / "cache"))
    result = cli("doctor", "--json")
    rows = {row["check"]: row for row in json.loads(result.out)}
    assert rows["Python"]["status"] == "ok"
    assert rows["cache"]["status"] in ("ok", "warning") and "GiB free" in rows["cache"]["found"]
    assert {"CPU", "distributed", "start method", "GDAL", "extra geo", "runs"} <= set(rows)
    assert result.status == int(any(row["status"] == "broken" for row in rows.values()))
    table = cli("doctor")
    assert "what to do" in table.out and "/dev/shm" in table.out


def test_doctor_fails_when_the_cache_cannot_be_written(cli, folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("DOMAINSSL_CACHE", str(folder / "file" / "cache"))
    result = cli("doctor", "--json")
    assert result.status == 1
    row = next(row for row in json.loads(result.out) if row["check"] == "cache")
    assert row["status"] == "broken"
    assert "Set DOMAINSSL_CACHE to a writable folder" in row["remedy"]


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.15.0+cpu", ">=2.11,<2.16", True),
        ("2.16.0", ">=2.11,<2.16", False),
        ("2.10.1", ">=2.11,<2.16", False),
        ("1.4.3", "", True),
        ("3.0", "==3.0.0", True),
    ],
)
def test_doctor_compares_versions_with_bounds(version, bounds, fits):
    from domainssl.cli.checkup import _fits

    assert _fits(version, bounds) is fits


def test_doctor_names_packages_of_an_extra_that_are_too_old(monkeypatch):
    from domainssl.cli import checkup

    real = checkup.metadata.version
    monkeypatch.setattr(
        checkup.metadata, "version", lambda name: "2.18.3" if name == "zarr" else real(name)
    )
    row = next(row for row in checkup._extras() if row.check == "extra geo")
    assert row.status == "warning" and "zarr 2.18.3" in row.found  # others may be newer than tested
    assert row.remedy.startswith("Tested with: pip install 'zarr") and ">=3.0" in row.remedy


def test_export_refuses_what_it_cannot_read(cli, folder):
    missing = cli("export", "--checkpoint", "none.ckpt", "--output", "out")
    assert missing.status == 2 and "--checkpoint 'none.ckpt' does not exist" in missing.err
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "a.ckpt").touch()
    (folder / "run" / "checkpoints" / "b.ckpt").touch()
    unclear = cli("export", "--checkpoint", "run", "--output", "out")
    assert unclear.status == 2
    assert "Found: checkpoints/a.ckpt, checkpoints/b.ckpt" in unclear.err


def test_inspect_describes_the_embedded_sample(cli, sample_root):
    result = cli("inspect", "sample", "--json")
    assert result.status == 0, result.text
    report = json.loads(result.out)
    assert (report["kind"], report["release"], report["problems"]) == ("ssl4eo", "A", [])
    assert report["splits"]["train"]["products"]["S2L2A"]["bands"][0] == "B01"
    table = cli("inspect", sample_root)
    assert table.status == 0
    assert "release A" in table.out and "no problems found" in table.out and "VV VH" in table.out


@pytest.mark.parametrize("name", ["tiles", "slide"])
def test_inspect_of_samples_counts_neither_padding_nor_a_lone_slide_as_problems(cli, name):
    result = cli("inspect", f"sample:{name}", "--json")
    report = json.loads(result.out)
    assert result.status == 0 and report["problems"] == []
    he = report["splits"]["train"]["modalities"]["he"]
    assert he["size"] == [64, 64] and he["valid_fraction"] > 0.95
    has_val = name == "tiles"
    assert any("no split 'val'" in text for text in report["notes"]) is not has_val


def test_inspect_of_nothing_mentions_the_sample(cli, folder):
    result = cli("inspect", folder / "nowhere")
    assert result.status == 2
    assert "nothing lies there" in result.err and "'sample'" in result.err


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["embed", "--help"], ["recipes"], ["inspect", "PATH", "--json"]],
)
def test_output_that_nobody_reads_any_more_is_no_failure(words, tmp_path, monkeypatch, capfd):
    path = write_nifti(tmp_path / "a.nii", ramp())
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert main([str(path) if word == "PATH" else word for word in words]) == 141
    assert capfd.readouterr().err == ""
