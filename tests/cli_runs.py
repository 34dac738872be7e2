"""Runs of the command line: recipes of the fake objective, and processes that leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["HANG_S", "RECIPE", "TRAINING", "run_session"]

REPOSITORY = Path(__file__).resolve().parents[1]
HANG_S = 600.0  # ends what waits for ever; on a busy machine a run of seconds takes minutes

TRAINING = """\
seed_everything: 0
trainer:
  max_epochs: 1
  accelerator: cpu
  devices: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""

RECIPE = f"""\
{TRAINING}\
loggers: {{tensorboard: null}}
callbacks:
  checkpoint: AtomicCheckpoint
model: cli_fakes.FakeObjective
data: {{class_path: cli_fakes.FakeDataModule, init_args: {{root: sample}}}}
"""


def run_session(
    words: Iterable[str],
    output: Path,
    *,
    cwd: Path = REPOSITORY,
    paths: Iterable[Path] = (),
    environment: dict[str, str] | None = None,
    timeout: float = HANG_S,
) -> int:
    """Run `python -m domainssl` in a session of its own; none of its processes is left.

    Args:
        words: The command line.
        output: File for both streams.
        cwd: Working directory.
        paths: What is importable besides the package and the tests' own folder.
        environment: Variables besides those of this process.
        timeout: Seconds until the run counts as hanging.

    Returns:
        The exit status. A process of the run that stays after its end fails the test.
    """
    path = os.pathsep.join(str(p) for p in (REPOSITORY, REPOSITORY / "tests", *paths))
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})}
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "domainssl", *words],
            env=variables, cwd=cwd, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout=timeout)
            _wait_for_the_end_of(process.pid)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return status


def _wait_for_the_end_of(session: int) -> None:
    """Wait until data workers and other ranks have noticed."""
    deadline = time.monotonic() + HANG_S
    with suppress(ProcessLookupError):
        while True:
            os.killpg(session, 0)
            assert time.monotonic() < deadline, "a process of the run is still there"
            time.sleep(0.1)
