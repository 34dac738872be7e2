"""The parity and numerics tests again, with the instructions of an older processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_numbers_do_not_depend_on_wide_vector_instructions() -> None:
    """Without AVX, sums are rounded in another order, as on machines that have none."""
    old = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    folders = [str(TESTS / name) for name in ("parity", "nn", "losses")]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "not slow and not gpu"]
    done = subprocess.run(
        [*command, *folders],
        cwd=TESTS.parent,
        env={**os.environ, **old},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
