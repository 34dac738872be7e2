"""`fit --auto_resume` finds the run's own last checkpoint, or begins the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import RECIPE

from domainssl.cli import main
from domainssl.cli.run.rundir import sole_writer
from domainssl.cli.run.train import prepare
from domainssl.errors import ConfigError


@pytest.fixture(autouse=True)
def recipe(folder: Path) -> None:
    (folder / "tiny.yaml").write_text(RECIPE)


def fit(*words: str) -> int:
    return main(["fit", "--config", "tiny.yaml", *words])


def chosen(*words: str):
    request = prepare("fit", ["--config", "tiny.yaml", *words])
    return request.run_dir.as_posix(), request.config.get("ckpt_path")


def step_of(path: Path | str) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_one_command_begins_a_run_and_goes_on_with_it(folder):
    words = ["--run_dir=here", "--auto_resume"]
    last = folder / "here" / "checkpoints" / "last.ckpt"
    assert fit(*words) == 0
    assert step_of(last) == 3
    assert fit(*words, "--trainer.max_epochs=3") == 0
    assert step_of(last) == 9
    first = (folder / "here" / "resumed_1" / "metrics.csv").read_text().splitlines()[1]
    assert "3" in first.split(",")  # the first step logged after the resume


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_ends_at_once_and_stays_as_it_is(folder, capsys, caplog):
    caplog.set_level("INFO")
    assert fit("--run_dir=here", "--auto_resume") == 0
    before = contents(folder / "here")
    assert fit("--run_dir=here", "--auto_resume") == 0
    assert contents(folder / "here") == before
    text = " ".join(capsys.readouterr().out.split())
    assert "last.ckpt stands at epoch 1, step 3, and the run ends there" in text
    assert "(trainer.max_epochs=1): nothing was trained" in text
    assert "Trainer.fit" not in caplog.text  # Lightning's own words for it
    assert "nothing was written. To go on, repeat the command with a larger number" in text


@pytest.mark.parametrize("loggers", [[], ["--loggers.tensorboard=TensorBoardLogger"]])
def test_a_refused_resume_leaves_the_folder_as_it_was(folder, capsys, loggers):
    words = ["--trainer.max_epochs=2", *loggers]
    assert fit(*words, "--run_dir=here") == 0
    before = contents(folder / "here")
    assert fit(*words, "--run_dir=here", "--ckpt_path=last", "--model.mask_ratio=0.25") == 2
    assert "mask_ratio: checkpoint 0.75, configuration 0.25" in capsys.readouterr().err
    assert contents(folder / "here") == before
    last = folder / "here" / "checkpoints" / "last.ckpt"
    elsewhere = ["--run_dir=there", f"--ckpt_path={last}"]
    assert fit(*words, *elsewhere, "--model.mask_ratio=0.25") == 2
    assert not (folder / "there").exists()
    assert fit(*words, "--run_dir=here", "--auto_resume", "--trainer.max_epochs=3") == 0
    assert contents(folder / "here").keys() >= {"config.1.yaml", "resumed_1/metrics.csv"}


def test_a_run_killed_before_its_first_checkpoint_begins_anew_in_its_folder(folder):
    (folder / "here").mkdir()
    (folder / "here" / "run.json").write_text("{}")
    (folder / "here" / "metrics.csv").write_text("epoch,step\n")
    assert fit("--run_dir=here") == 2  # without being asked, nothing is written over
    assert fit("--run_dir=here", "--auto_resume=true") == 0
    assert step_of(folder / "here" / "checkpoints" / "last.ckpt") == 3


def test_a_start_that_failed_before_training_does_not_block_its_folder(folder):
    (folder / "here").mkdir()
    (folder / "here" / "run.json").write_text("{}")
    assert fit("--run_dir=here") == 0


def test_last_means_the_folder_that_was_named_and_no_other_run(folder, capsys):
    other = folder / "runs" / "tiny" / "other" / "checkpoints" / "last.ckpt"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"")
    assert fit("--run_dir=here", "--ckpt_path=last") == 2
    assert "run_dir 'here' holds no checkpoint" in " ".join(capsys.readouterr().err.split())


def test_without_a_folder_the_newest_run_of_the_name_goes_on_in_its_own(folder):
    run, path = chosen("--auto_resume")
    assert path is None and run.startswith("runs/tiny/")
    for number, name in enumerate(("old", "new", "between")):
        last = folder / "runs" / "tiny" / name / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True)
        last.write_bytes(b"")
        os.utime(last, (0, {"old": 10, "new": 30, "between": 20}[name] + number))
    assert chosen("--auto_resume") == ("runs/tiny/new", "runs/tiny/new/checkpoints/last.ckpt")
    assert chosen()[1] is None
    assert chosen("--auto_resume", "false")[1] is None


@pytest.mark.parametrize("tasks", ["1", "8"])
def test_a_requeued_slurm_job_goes_on_with_the_newest_of_its_checkpoints(
    folder, monkeypatch, tasks
):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    other = folder / "runs" / "tiny" / "other" / "checkpoints" / "last.ckpt"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"")
    assert chosen("--auto_resume") == ("runs/tiny/slurm_77", None)  # not the run of another job
    last = folder / "runs" / "tiny" / "slurm_77" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"")
    os.utime(last, (0, 10))
    assert chosen("--auto_resume")[1] == "runs/tiny/slurm_77/checkpoints/last.ckpt"
    signalled = last.parents[1] / "hpc_ckpt_1.ckpt"  # what Lightning saves on SLURM's signal
    signalled.write_bytes(b"")
    os.utime(signalled, (0, 20))
    assert chosen("--auto_resume")[1] == "runs/tiny/slurm_77/hpc_ckpt_1.ckpt"
    assert chosen("--ckpt_path=last", "--run_dir=runs/tiny/slurm_77")[1].endswith("hpc_ckpt_1.ckpt")


def test_auto_resume_and_another_checkpoint_contradict_each_other(folder, capsys):
    (folder / "a.ckpt").write_bytes(b"")
    assert fit("--auto_resume", "--ckpt_path=a.ckpt") == 2
    assert "auto_resume and ckpt_path='a.ckpt' are both given" in capsys.readouterr().err


def test_auto_resume_can_stand_in_a_configuration_file(folder):
    assert fit("--run_dir=here") == 0
    (folder / "overlay.yaml").write_text("auto_resume: true\n")
    assert chosen("--config=overlay.yaml", "--run_dir=here")[1] == "here/checkpoints/last.ckpt"


def test_two_processes_do_not_write_one_run(folder):
    script = (
        "import sys, pathlib\nfrom domainssl.cli.run.rundir import sole_writer\n"
        "with sole_writer(pathlib.Path('here')):\n    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as other:  # fmt: skip
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="'here': another process is writing this run"):
            with sole_writer(Path("here")):
                pass
        other.kill()
        other.wait()
    with sole_writer(Path("here")):  # a killed process holds nothing
        pass


def test_a_checkpoint_that_was_cut_off_is_named_with_those_beside_it(folder, capsys):
    words = ["--run_dir=here", "--trainer.max_epochs=2"]
    assert fit(*words) == 0
    last = folder / "here" / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        last.unlink()
        last.write_bytes(content)
        capsys.readouterr()
        assert fit(*words, "--auto_resume") == 2
        error = capsys.readouterr().err
        assert "last.ckpt' is not complete" in error
        assert "Beside it lie step_0000003.ckpt, step_0000006.ckpt" in error
