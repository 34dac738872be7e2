"""Kill -9 at any moment of a real run, and go on: nothing is lost, doubled or different.

One run is killed and continued again and again, so that every resume but the first is that of a
resumed run. What it writes down is compared with one run that nobody disturbed.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import run_session

STEPS, EPOCHS = 6, 4  # 96 locations in batches of 16
WORDS = [
    "--config=recipes/ssl4eo_croma.yaml",
    f"--trainer.max_epochs={EPOCHS}",
    "--trainer.accelerator=cpu",
    "--trainer.check_val_every_n_epoch=1",
    "--model.encoding.architecture={width: 16, depth: 2, heads: 2, decoder_width: 16}",
    "--data.global_batch_size=16",
    "--data.window={size: 16, flips: true, quarter_turns: true}",
    "--callbacks.evaluation=null",
    "--callbacks.panels=null",
    "--callbacks.checkpoint.every_n_epochs=1",
    "--callbacks.checkpoint.every_n_train_steps=2",
    "--loggers.tensorboard=null",
]


def points(seed: int) -> list[str]:
    """Five moments in the order of the run, drawn anew for every seed."""
    draw = random.Random(seed)
    writing = draw.choice(["write", "fsync", "rename", "link"])
    border = draw.choice([f"epoch_end:{1}", f"epoch_start:{2}", f"validation:{1}"])
    return [
        f"step:{draw.randint(2, 5)}",
        f"{writing}:{draw.choice([8, 10])}",  # a checkpoint is due after every second step
        border,
        f"batch_end:{draw.randint(13, 17)}",
        f"{draw.choice(['write', 'step'])}:{draw.choice([20, 22])}",
    ]


class Run:
    """Starts the command line in a folder of its own."""

    def __init__(self, folder: Path, workers: int, words: list[str] = WORDS) -> None:
        self.folder = folder
        folder.mkdir()
        self.diary = folder / "diary.jsonl"
        self.words = [
            *words,
            f"--data.loading.workers={workers}",
            f"--run_dir={folder / 'run'}",
            "--callbacks.diary=kill_points.Diary",
            f"--callbacks.diary.path={self.diary}",
        ]

    def start(self, *more: str, kill: str | None = None) -> int:
        """Run to the end or to the kill; no process of it is left afterwards."""
        environment = {} if kill is None else {"DOMAINSSL_TEST_KILL": kill}
        return run_session(
            ["fit", *self.words, *more],
            self.folder / "output.txt",
            paths=[Path(__file__).parent],
            environment=environment,
        )

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.diary.read_text().splitlines()]

    def weights(self) -> dict[str, torch.Tensor]:
        last = self.folder / "run" / "checkpoints" / "last.ckpt"
        return dict(torch.load(last, weights_only=True)["state_dict"])

    def card(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "run" / "backbone" / "backbone.json").read_text()))


def check_whole(run: Run, whole: Run, steps: int = STEPS * EPOCHS) -> None:
    """Every line written by `run`, repeated steps included, stands in `whole` bit for bit."""
    expected = {line["step"]: line for line in whole.lines()}
    assert sorted(expected) == list(range(1, steps + 1))
    for line in run.lines():
        assert line == expected[line["step"]]
    assert {line["step"] for line in run.lines()} == set(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "seed", "how"), [(0, 1, "--ckpt_path=last"), (2, 2, "--auto_resume")]
)
def test_a_run_killed_five_times_equals_one_that_was_not(workers, seed, how, tmp_path, sample_root):
    whole = Run(tmp_path / "whole", workers)
    assert whole.start() == 0, whole.output
    run = Run(tmp_path / "killed", workers)
    words: list[str] = []
    for number, point in enumerate(points(seed)):
        assert run.start(*words, kill=point) == -signal.SIGKILL, f"{point}: {run.output}"
        hidden = list((run.folder / "run" / "checkpoints").glob(".*.part-*"))
        assert bool(hidden) == point.startswith(("write", "fsync", "rename")), point
        assert "run_dir" not in run.output, f"{number}: {run.output}"
        words = [how]
    assert run.start(*words) == 0, run.output
    check_whole(run, whole)
    ours, theirs = run.weights(), whole.weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert run.card()["sha256"] == whole.card()["sha256"]
    assert not list((run.folder / "run" / "checkpoints").glob(".*.part-*"))


def test_the_kill_points_of_the_tests_come_in_the_order_of_the_run():
    for seed in (1, 2):
        kinds = [point.partition(":")[0] for point in points(seed)]
        assert set(kinds) & {"write", "fsync", "rename", "link"}
        assert set(kinds) & {"epoch_end", "epoch_start", "validation"}
    assert points(1) != points(2)


FINETUNING = [
    "--config=recipes/finetune_tiles.yaml",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.check_val_every_n_epoch=1",
    "--model.head={kind: attentive, hidden: 8, dropout: 0.1}",  # dropout: random numbers go on, too
    "--data.global_batch_size=32",
    "--data.loading.train_fraction=0.25",
    "--callbacks.checkpoint.every_n_epochs=1",
    "--callbacks.checkpoint.every_n_train_steps=1",
]


@pytest.mark.slow
def test_a_killed_fine_tuning_equals_one_that_was_not(tmp_path, sample_root):
    whole, run = (Run(tmp_path / name, 0, FINETUNING) for name in ("whole", "killed"))
    assert whole.start() == 0, whole.output
    steps = max(line["step"] for line in whole.lines())
    assert steps >= 4
    assert run.start(kill=f"step:{steps // 2}") == -signal.SIGKILL, run.output
    assert run.start("--ckpt_path=last") == 0, run.output
    check_whole(run, whole, steps)
    ours, theirs = run.weights(), whole.weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    cards = [
        json.loads((each.folder / "run" / "task" / "task.json").read_text())
        for each in (run, whole)
    ]
    assert cards[0]["sha256"] == cards[1]["sha256"]
