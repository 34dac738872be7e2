"""Several processes of one command write one folder and speak once."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_two_processes_share_one_run_folder_and_one_voice(recipe, folder, repository):
    words = ["--trainer.devices=2", "--trainer.strategy=ddp", "--loggers.tensorboard=null"]
    path = os.pathsep.join([str(repository), str(repository / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "domainssl", "fit", "--config", recipe.name, *words],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 random vectors") == 1
    runs = list((folder / "runs" / "tiny").iterdir())
    assert len(runs) == 1
    assert json.loads((runs[0] / "run.json").read_text())["world_size"] == 2
    assert (runs[0] / "checkpoints" / "last.ckpt").is_file()
