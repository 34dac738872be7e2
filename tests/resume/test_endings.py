"""How runs end that something ends from outside, and what they leave to go on with."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cli_runs import RECIPE
from lightning import Callback
from tiny import TinyData, TinyObjective, tiny_modalities, tiny_trainer

from domainssl.backbones.card import export_backbone
from domainssl.callbacks.checkpoint import AtomicCheckpoint
from domainssl.callbacks.evaluation import OnlineEvaluation
from domainssl.callbacks.export import ExportBackbone
from domainssl.cli import main


class Happening(Callback):
    """Does something at one optimiser step of the fake run."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        if self.what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.what == "interrupt":
            raise KeyboardInterrupt
        else:  # what torch's handler of SIGCHLD raises
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def fit(folder: Path, *words: str) -> int:
    (folder / "tiny.yaml").write_text(RECIPE)
    return main(["fit", "--config", "tiny.yaml", "--run_dir=here", *words])


def happening(step: int, what: str) -> list[str]:
    path = "--callbacks.happening"
    return [f"{path}=test_endings.Happening", f"{path}.step={step}", f"{path}.what={what}"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "test_endings", sys.modules[__name__])


def test_sigterm_saves_the_step_and_ends_with_143(folder, capsys):
    words = ["--trainer.max_epochs=3", "--callbacks.checkpoint.every_n_epochs=5"]
    handler = signal.getsignal(signal.SIGTERM)
    assert fit(folder, *words, *happening(4, "term")) == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert "Terminated by SIGTERM" in capsys.readouterr().err
    last = folder / "here" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 5


def test_an_interrupt_ends_with_130_and_one_line(folder, capsys):
    assert fit(folder, "--callbacks.summary=Summary", *happening(1, "interrupt")) == 130
    printed = capsys.readouterr()
    assert printed.err.strip().endswith("error: Interrupted.")
    assert "interrupt after step 1" in printed.out
    assert "no checkpoint was written yet" in printed.out


def test_a_data_worker_that_dies_while_the_main_process_computes_is_named(folder, capsys):
    assert fit(folder, *happening(1, "death")) == 2
    text = capsys.readouterr().err
    assert "error: A worker process of the data died while reading (DataLoader worker (pid 7)" in (
        text
    )
    assert "Traceback" not in text


def run(folder: Path, *callbacks, ckpt_path: str | None = None, **options):
    torch.manual_seed(0)
    model = TinyObjective(tiny_modalities())
    settings = {"max_epochs": 3, "enable_checkpointing": True, **options}
    trainer = tiny_trainer(folder, callbacks=list(callbacks), **settings)
    trainer.fit(model, datamodule=TinyData(), ckpt_path=ckpt_path)
    return model, trainer


class Values(Callback):
    """Notes what validations measure, and fails in one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.seen = fails_at, {}

    def on_validation_batch_end(self, trainer, *arguments):
        if trainer.global_step == self.fails_at:
            raise RuntimeError("killed")

    def on_validation_end(self, trainer, pl_module):
        self.seen[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}], ids=["epoch", "within"])
def test_a_validation_that_a_kill_cut_short_is_done_after_the_resume(tmp_path, options):
    def saving() -> AtomicCheckpoint:
        return AtomicCheckpoint(every_n_epochs=0, every_n_train_steps=1)

    whole = Values()
    expected, _ = run(tmp_path / "whole", whole, saving(), **options)
    for step in whole.seen:
        folder, values = tmp_path / str(step), Values(step)
        with pytest.raises(RuntimeError, match="killed"):
            run(folder, values, saving(), **options)
        last = str(folder / "checkpoints" / "last.ckpt")
        assert torch.load(last, weights_only=True)["global_step"] == step - 1
        later = Values()
        model, _ = run(folder, later, saving(), ckpt_path=last, **options)
        assert values.seen | later.seen == whole.seen and step in later.seen
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), expected.state_dict().values())
        )


class Term(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *arguments):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "saved", "options"),
    [
        (1, 2, {}),
        (2, 3, {"val_check_interval": 2}),
        (3, 4, {}),  # in the validations from here on
        (5, 6, {"val_check_interval": 2}),
        (7, 8, {}),
        (11, 12, {}),  # in the last one
    ],
)
def test_a_run_that_sigterm_ended_goes_on_as_if_it_had_not(tmp_path, step, saved, options):
    values, later, whole = Values(), Values(), Values()
    expected, _ = run(tmp_path / "whole", whole, **options)
    with pytest.raises(SystemExit):
        run(tmp_path, values, Term(step), AtomicCheckpoint(), **options)
    last = tmp_path / "checkpoints" / "last.ckpt"
    path = str(last) if last.exists() else None
    assert saved == (torch.load(last, weights_only=True)["global_step"] if path else None)
    model, _ = run(tmp_path, later, AtomicCheckpoint(), ckpt_path=path, **options)
    assert values.seen | later.seen == whole.seen
    assert model.losses_seen == expected.losses_seen[saved or 0 :]


def test_what_the_table_at_the_end_shows_survives_a_resume(tmp_path):
    evaluation = OnlineEvaluation()
    run(tmp_path, evaluation, AtomicCheckpoint(), max_epochs=1)
    state = OnlineEvaluation()
    state.load_state_dict(evaluation.state_dict())
    assert state.metrics == evaluation.metrics and state.metrics["val/items"] == 24
    assert state._evaluated_at == 4


def test_an_export_that_a_kill_prevented_is_made_up_for(folder, capsys):
    words = ["--callbacks.export=ExportBackbone", "--auto_resume"]
    path = folder / "here" / "backbone"

    def fail(*arguments, **options):
        raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExportBackbone, "on_train_end", fail)
        assert fit(folder, *words) == 1
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExportBackbone, "on_train_end", lambda self, t, m: made.append(t.global_step))
        assert fit(folder, *words) == 0
    assert made == [3] and not path.exists()


def test_what_a_killed_export_left_is_cleared_by_the_next(tmp_path):
    (tmp_path / ".backbone.safetensors.0123.tmp").write_bytes(b"half")
    (tmp_path / ".backbone.json.0123.tmp").write_bytes(b"")
    export_backbone(TinyObjective(tiny_modalities()).backbone, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backbone.json", "backbone.safetensors"]


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
)
def test_a_worker_that_reads_ends_with_the_main_process(method, repository):
    folders = os.pathsep.join(map(str, (repository, repository / "tests")))
    script = (
        "import stream_fakes as s\nif __name__ == '__main__':\n"
        f"    loading = s.Loading(workers=2, start_method={method!r})\n"
        "    next(iter(s.stream_of(s.SleepingSource((5, 5)), loading=loading)))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        workers = [int(process.stdout.readline()) for _ in range(2)]
        assert process.pid not in workers
        process.kill()
        process.stdout.read()  # its end: every worker holds the pipe until it is gone
    while any(_is_running(pid) for pid in workers):  # for ever where it fails
        time.sleep(0.05)
    # named by the process that made them; tests beside this one have some of their own
    own = tuple(f"torch_{pid}_" for pid in (process.pid, *workers))
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(own)]


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_process_without_parent_watches_nothing():
    from domainssl.loading.workers import end_with_main_process

    assert multiprocessing.parent_process() is None
    count = threading.active_count()
    end_with_main_process(0)
    assert threading.active_count() == count
