"""Memory of a long run stays where it was: that of the training process and of its workers."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 2000
ALLOWED_MB = 24.0  # a leak of 1 kB per step would be 2 MB, of one batch of windows 250 MB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="PSS is Linux's")
def test_memory_is_flat_over_two_thousand_steps(tmp_path, repository, sample_root):
    path = [str(repository), str(Path(__file__).parent)]
    words = [
        "--config=recipes/ssl4eo_croma.yaml",
        f"--trainer.max_steps={STEPS}",
        "--trainer.max_epochs=-1",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=10",
        "--trainer.check_val_every_n_epoch=20",  # at step 480 for the first time
        "--model.encoding.architecture={width: 16, depth: 2, heads: 2, decoder_width: 16}",
        "--data.window={size: 16, flips: true, quarter_turns: true}",
        "--data.global_batch_size=4",  # 24 steps per epoch: 83 epochs
        "--data.loading={workers: 2}",
        "--callbacks.evaluation.every_n_epochs=20",
        "--callbacks.panels.every_n_epochs=20",
        "--callbacks.checkpoint.every_n_epochs=20",
        "--callbacks.memory=memory_watch.MemoryWatch",
        f"--callbacks.memory.path={tmp_path / 'memory.jsonl'}",
        f"--run_dir={tmp_path / 'run'}",
    ]
    with (tmp_path / "output.txt").open("w") as output:
        done = subprocess.run(
            [sys.executable, "-m", "domainssl", "fit", *words], stdout=output, stderr=output,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
            timeout=2000, check=False,
        )  # fmt: skip
    assert done.returncode == 0, (tmp_path / "output.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(100, STEPS + 1, 100))
    assert {line["count"] for line in lines[4:]} == {4}  # two workers read, two hold out
    for who in ("parent", "workers"):
        early = statistics.median(line[who] for line in lines[4:10])  # steps 500 to 1000
        late = statistics.median(line[who] for line in lines[-6:])  # steps 1500 to 2000
        assert late - early < ALLOWED_MB, f"{who}: {[round(line[who], 1) for line in lines]}"
