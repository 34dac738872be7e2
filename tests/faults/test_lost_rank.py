"""One rank of two ends, fails or stops answering: the other one ends soon and says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from domainssl.distributed import is_lost_connection

RECIPE = """\
seed_everything: 0
trainer:
  max_epochs: 4
  accelerator: cpu
  devices: 2
  strategy: {class_path: DDPStrategy, init_args: {process_group_backend: gloo, timeout: "0:00:08"}}
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
loggers: {tensorboard: null}
callbacks:
  checkpoint: AtomicCheckpoint
model: cli_fakes.FakeObjective
data: {class_path: cli_fakes.FakeDataModule, init_args: {root: sample}}
"""


def run(folder: Path, repository: Path, rank: int, how: str) -> tuple[int, str, float]:
    """Return status, output and the seconds it took; nothing of the run is left afterwards."""
    (folder / "two.yaml").write_text(RECIPE)
    words = [f"--callbacks.lose.rank={rank}", f"--callbacks.lose.how={how}", "--run_dir=here"]
    path = [str(repository), str(repository / "tests"), str(Path(__file__).parent)]
    start = time.monotonic()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "domainssl", "fit", "--config=two.yaml",
             "--callbacks.lose=lost_rank.LoseRank", *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
            cwd=folder, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout=90)
            deadline = time.monotonic() + 30
            with suppress(ProcessLookupError):
                while time.monotonic() < deadline:
                    os.killpg(process.pid, 0)
                    time.sleep(0.1)
                pytest.fail("a rank is still there")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return status, (folder / "output.txt").read_text(), time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "message"),
    [
        (1, "kill", "Rank 0 of 2 lost the others"),
        (0, "kill", "Rank 1 of 2 lost the others"),
        (1, "error", "error on local rank 1: file.zarr.zip: not a complete zip"),
        (1, "hang", "Rank 0 of 2 lost the others"),
    ],
)
def test_the_others_end_soon_with_a_message(tmp_path, repository, rank, how, message):
    status, output, seconds = run(tmp_path, repository, rank, how)
    assert status != 0
    assert message in output, output
    assert seconds < 90
    if how != "error":
        assert "Resume with --auto_resume" in output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[../pair.cc:534] Connection closed by peer [127.0.0.1]:1234", True),
        ("[../unbound_buffer.cc:81] Timed out waiting 8000ms for recv operation to complete", True),
        ("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x1)", False),
    ],
)
def test_a_lost_connection_is_told_from_other_errors(text, expected):
    assert is_lost_connection(RuntimeError(text)) is expected
