"""Kill and resume with a real Trainer: the next batches are those of an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from domainssl.datamodules import SSL4EOS12DataModule
from domainssl.errors import ConfigError
from domainssl.loading.source import Loading
from domainssl.sources.windows import Window

STEPS, EPOCHS = 5, 3  # 22 locations in batches of 4


class Recorder(pl.LightningModule):
    """Remembers what it was given, and may be killed in the middle of a step."""

    def __init__(self, dies_after: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, int, tuple[str, ...], float]] = []
        self.dies_after = dies_after

    def training_step(self, batch, batch_idx):
        if self.dies_after == len(self.seen):
            raise KeyboardInterrupt
        total = float(batch["s2"].double().sum())
        self.seen.append((self.trainer.current_epoch, batch_idx, tuple(batch["id"]), total))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.zeros(()), batch_size=1)

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0  # builds the loaders before the restore
        return torch.optim.SGD(self.parameters(), 0.1)


def data_of(root, workers=0, **changes):
    options = {"global_batch_size": 4, "window": Window(size=16),
               "loading": Loading(workers=workers, window_blocks=2), **changes}  # fmt: skip
    return SSL4EOS12DataModule(root=str(root), **options)


def fit(root, folder, *, workers=0, ckpt=None, model=None, callbacks=(), data=None, **options):
    model = model or Recorder()
    trainer = pl.Trainer(
        **{"max_epochs": EPOCHS, **options}, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(folder),
        callbacks=[*callbacks], enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    data = data or data_of(root, workers)
    trainer.fit(model, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return model.seen


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True,
        enable_version_counter=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(release_a, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fit(release_a, folder, callbacks=[every_step(folder)]), folder


def test_every_epoch_has_its_own_order(whole):
    seen, _ = whole
    assert [step[:2] for step in seen] == [(e, b) for e in range(EPOCHS) for b in range(STEPS)]
    assert len({step[2] for step in seen}) == EPOCHS * STEPS


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 8, 10, 14])
def test_a_checkpoint_of_any_step_goes_on_with_the_next_batch(whole, release_a, tmp_path, step):
    seen, folder = whole
    rest = fit(release_a, tmp_path, ckpt=folder / f"step={step}.ckpt")
    assert rest == seen[step:]


@pytest.mark.parametrize("step", [3, 5])
def test_resuming_with_workers_gives_the_same(whole, release_a, tmp_path, step):
    seen, folder = whole
    rest = fit(release_a, tmp_path, ckpt=folder / f"step={step}.ckpt", workers=2)
    assert rest == seen[step:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("killed_at", [2, 5, 7])
def test_a_killed_run_resumes_from_its_last_checkpoint(
    whole, release_a, tmp_path, killed_at, workers
):
    seen, _ = whole
    model = Recorder(dies_after=killed_at)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(release_a, tmp_path, workers=workers, model=model, callbacks=[every_step(tmp_path)])
    assert model.seen == seen[:killed_at]
    rest = fit(release_a, tmp_path, workers=workers, ckpt=tmp_path / "last.ckpt")
    assert rest == seen[killed_at:]


@pytest.mark.parametrize("where", ["on_train_epoch_end", "on_validation_end"])
def test_a_checkpoint_at_the_epoch_border_begins_the_next_epoch(whole, release_a, tmp_path, where):
    seen, _ = whole
    callback = ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=where == "on_train_epoch_end",
        monitor=None, every_n_epochs=1,
    )  # fmt: skip
    assert fit(release_a, tmp_path, callbacks=[callback], max_epochs=2) == seen[: 2 * STEPS]
    for epoch in range(2):
        [path] = tmp_path.glob(f"epoch={epoch}.ckpt")
        assert fit(release_a, tmp_path, ckpt=path) == seen[(epoch + 1) * STEPS :]


@pytest.mark.parametrize("step", [2, 4])
def test_validation_in_the_middle_of_an_epoch_does_not_move_the_position(
    whole, release_a, tmp_path, step
):
    seen, _ = whole
    callback = ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False, monitor=None
    )
    options = {"val_check_interval": 2, "max_epochs": 1}
    fit(release_a, tmp_path, callbacks=[callback], **options)
    rest = fit(release_a, tmp_path, ckpt=tmp_path / f"step={step}.ckpt", **options)
    assert rest == seen[step:STEPS]


def test_stopping_by_max_steps_and_going_on_gives_the_same(whole, release_a, tmp_path):
    seen, _ = whole
    first = fit(release_a, tmp_path, callbacks=[every_step(tmp_path)], max_steps=7, max_epochs=-1)
    assert first == seen[:7]
    assert fit(release_a, tmp_path, ckpt=tmp_path / "last.ckpt") == seen[7:]


@pytest.mark.parametrize("step", [2, 4, 5])
def test_accumulated_batches_resume_too(release_a, tmp_path, step):
    options = {"accumulate_grad_batches": 2, "max_epochs": 2}

    def data():
        return data_of(release_a, global_batch_size=8)

    seen = fit(release_a, tmp_path, data=data(), callbacks=[every_step(tmp_path)], **options)
    rest = fit(release_a, tmp_path, data=data(), ckpt=tmp_path / f"step={step}.ckpt", **options)
    assert rest == seen[-len(rest) :]
    assert len(rest) == {2: 6, 4: 3, 5: 1}[step]  # three steps of 2, 2 and 1 batches per epoch


def test_limited_epochs_resume_at_their_border(release_a, tmp_path):
    options = {"limit_train_batches": 3}
    seen = fit(release_a, tmp_path, callbacks=[every_step(tmp_path)], **options)
    for step in (2, 3, 4, 6):
        path = tmp_path / f"step={step}.ckpt"
        assert fit(release_a, tmp_path, ckpt=path, **options) == seen[step:]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"global_batch_size": 2}, "batch_size 4 then, 2 now"),
        ({"seed": 5}, "seed 0 then, 5 now"),
        ({"loading": Loading(workers=0, window_blocks=3)}, "window_blocks 2 then, 3 now"),
    ],
)
def test_a_position_counted_under_other_conditions_is_refused(
    whole, release_a, tmp_path, changes, text
):
    _, folder = whole
    with pytest.raises(ConfigError, match=f"epoch 0 after 3 batches.*{text}.*end of an epoch"):
        fit(release_a, tmp_path, data=data_of(release_a, **changes), ckpt=folder / "step=3.ckpt")


def test_conditions_may_change_at_the_end_of_an_epoch(whole, release_a, tmp_path):
    _, folder = whole
    data = data_of(release_a, seed=5)
    rest = fit(release_a, tmp_path, data=data, ckpt=folder / "step=5.ckpt")
    assert rest == fit(release_a, tmp_path, data=data_of(release_a, seed=5))[STEPS:]


def test_the_state_is_plain_and_counts_finished_batches_only(whole):
    _, folder = whole
    state = torch.load(folder / "step=8.ckpt", weights_only=True)["SSL4EOS12DataModule"]
    assert (state["epoch"], state["processed"]) == (1, 3)
    assert state["world_size"] == 1 and state["items"] == 22
    state = torch.load(folder / "step=10.ckpt", weights_only=True)["SSL4EOS12DataModule"]
    assert (state["epoch"], state["processed"]) == (2, 0)


def test_a_batch_that_cannot_be_divided_is_refused(release_a, tmp_path):
    with pytest.raises(ConfigError, match=r"global_batch_size=4 cannot be divided.*Use 3 or 6"):
        fit(release_a, tmp_path, accumulate_grad_batches=3)
