import errno
import os

import pytest
import torch
from tiny import TinyData, TinyObjective, tiny_modalities, tiny_trainer

from domainssl.callbacks.checkpoint import AtomicCheckpoint, CheckpointError


def run(folder, callback, ckpt_path=None, **options):
    torch.manual_seed(0)
    model = TinyObjective(tiny_modalities())
    trainer = tiny_trainer(folder, enable_checkpointing=True, callbacks=[callback], **options)
    trainer.fit(model, datamodule=TinyData(), ckpt_path=ckpt_path)
    return model, trainer


def names(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_the_newest_files_stay_and_last_is_the_newest(tmp_path):
    run(tmp_path, AtomicCheckpoint(keep_last=2), max_epochs=4)
    assert names(tmp_path) == ["last.ckpt", "step_0000012.ckpt", "step_0000016.ckpt"]
    folder = tmp_path / "checkpoints"
    assert os.path.samefile(folder / "last.ckpt", folder / "step_0000016.ckpt")
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 16


def test_saving_in_steps_also_saves_the_end_of_each_epoch(tmp_path):
    run(tmp_path, AtomicCheckpoint(every_n_train_steps=3, keep_last=-1), max_epochs=2)
    steps = [n for n in names(tmp_path) if n != "last.ckpt"]
    assert steps == [f"step_000000{n}.ckpt" for n in (3, 4, 6, 8)]


def test_retention_holds_after_a_resume_and_losses_go_on_equally(tmp_path):
    whole, _ = run(tmp_path / "whole", AtomicCheckpoint(), max_epochs=4)

    class Stop(AtomicCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        run(tmp_path / "parts", Stop(), max_epochs=4)
    assert names(tmp_path / "parts")[-1] == "step_0000008.ckpt"
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    again, _ = run(tmp_path / "parts", AtomicCheckpoint(), ckpt_path=str(last), max_epochs=4)
    assert names(tmp_path / "parts") == ["last.ckpt", "step_0000012.ckpt", "step_0000016.ckpt"]
    assert again.losses_seen == whole.losses_seen[8:]


@pytest.mark.parametrize("kind", ["write", "fsync"])
def test_a_full_disk_leaves_no_half_file_and_the_earlier_checkpoint(tmp_path, monkeypatch, kind):
    run(tmp_path, AtomicCheckpoint(), max_epochs=1)
    before = names(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_some(checkpoint, file, **kwargs):
        file.write(b"x" * 100)
        full()

    if kind == "write":
        monkeypatch.setattr(torch, "save", save_some)
    else:
        monkeypatch.setattr(os, "fsync", full)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"No space left.*earlier checkpoints are untouched"):
        run(tmp_path, AtomicCheckpoint(), ckpt_path=last, max_epochs=2)
    assert names(tmp_path) == before
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_what_a_killed_process_left_is_cleared_and_never_taken_for_a_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".last.ckpt.part-123").write_bytes(b"half")
    (folder / ".step_0000004.ckpt.part-123").write_bytes(b"half")
    run(tmp_path, AtomicCheckpoint(), max_epochs=1)
    assert [n for n in names(tmp_path) if n.startswith(".")] == []


def test_no_file_appears_once_a_loss_was_not_finite(tmp_path):
    class Poisoned(TinyObjective):
        def forward(self, batch, draws, outputs=False):
            step = super().forward(batch, draws, outputs)
            if self._batch_counter > 5:
                step.losses["contrast"] = step.losses["contrast"] * float("nan")
            return step

    callback = AtomicCheckpoint(every_n_train_steps=1, keep_last=-1, save_on_exception=True)
    trainer = tiny_trainer(
        tmp_path, enable_checkpointing=True, callbacks=[callback], log_every_n_steps=100
    )
    with pytest.raises(ArithmeticError, match="'contrast' in training batch 5"):
        trainer.fit(Poisoned(tiny_modalities()), datamodule=TinyData())
    assert names(tmp_path)[-1] == "step_0000005.ckpt"


def test_keeping_no_checkpoint_is_refused():
    with pytest.raises(ValueError, match="keep_last: got 0"):
        AtomicCheckpoint(keep_last=0)
