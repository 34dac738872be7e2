"""Run the command line in process, in an empty folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_runs import HANG_S, REPOSITORY, TRAINING

from domainssl.cli import main

RECIPE = f"""\
# A tiny run
{TRAINING}\
callbacks:
  checkpoint:
    class_path: ModelCheckpoint
    init_args: {{save_last: true}}
  timer: Timer
model:
  class_path: cli_fakes.FakeObjective
  init_args:
    mask_ratio: 0.5
    optimization: {{lr: 1e-2}}
data:
  class_path: cli_fakes.FakeDataModule
  init_args:
    root: sample
"""


@dataclass
class Result:
    """Exit status and output of one call."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both streams."""
        return self.out + self.err


@pytest.fixture
def recipe(folder: Path) -> Path:
    """A recipe that trains the fake objective in a second."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def cli(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call `main` and return status and output."""

    def call(*words: object) -> Result:
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture
def spawn() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in a new process with the package importable."""

    def call(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=cwd or REPOSITORY,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )

    return call
