"""One rank of two ends, fails or stops answering: the other one ends soon and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runs import RECIPE, run_session

from domainssl.distributed import is_lost_connection


def run(folder: Path, rank: int, how: str) -> tuple[int, str]:
    """Return status and output; nothing of the run is left afterwards."""
    # A rank that is gone is noticed at once, or this run would hang; only one that does not answer
    # needs the time limit, which must leave enough time for both to start on a busy machine.
    limit = "0:05:00" if how == "hang" else "10:00:00"
    (folder / "two.yaml").write_text(RECIPE)
    strategy = "{class_path: DDPStrategy, init_args: {process_group_backend: gloo, timeout: '%s'}}"
    words = [
        "--config=two.yaml",
        "--trainer.max_epochs=4",
        "--trainer.devices=2",
        f"--trainer.strategy={strategy % limit}",
        "--callbacks.lose=lost_rank.LoseRank",
        f"--callbacks.lose.rank={rank}",
        f"--callbacks.lose.how={how}",
        "--run_dir=here",
    ]
    output = folder / "output.txt"
    paths = [Path(__file__).parent]
    status = run_session(["fit", *words], output, cwd=folder, paths=paths)
    return status, output.read_text()


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
def test_the_others_end_soon_with_a_message(tmp_path, rank, how, message):
    status, output = run(tmp_path, rank, how)
    assert status != 0
    assert message in output, output
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
