"""What every task promises, whatever it learns and whatever backbone is below it."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import rows
from ranks import run_ranks
from task_cases import TASKS, build_task, labelled_batch
from torch import Tensor
from torch.utils.data import DataLoader

from domainssl import export_task, load_task
from domainssl.distributed import rank, world_size
from domainssl.tasks.base import Task
from domainssl.training.guard import NotFiniteError

SIZE = 4


@pytest.fixture(scope="module", params=TASKS)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def task(case: str) -> Task:
    return build_task(case)


def _losses(task: Task, batch: dict[str, Any]) -> dict[str, Tensor]:
    return task.compute(batch, task.generators(0, 0)).losses


def test_hyperparameters_are_plain_and_rebuild_the_task(task: Task) -> None:
    file = io.BytesIO()
    torch.save(task.arguments, file)
    file.seek(0)
    arguments = torch.load(file, weights_only=True)
    again = type(task)(**arguments)
    assert again.arguments == task.arguments
    assert again.state_dict().keys() == task.state_dict().keys()


def test_an_export_predicts_bit_for_bit(task: Task, tmp_path: Path) -> None:
    batch = labelled_batch(task)
    task.eval()
    with torch.no_grad():
        expected = task.logits(batch)
        export_task(task, tmp_path)
        loaded = load_task(tmp_path)
        assert torch.equal(loaded.logits(batch), expected)
        assert torch.equal(task.logits(batch), expected)  # nothing random in evaluation mode
    assert loaded.classes == task.classes and expected.dtype == torch.float32


def test_the_batch_is_not_mutated(task: Task) -> None:
    batch = labelled_batch(task)
    before = {n: v.clone() if isinstance(v, Tensor) else list(v) for n, v in batch.items()}
    _losses(task, batch)
    assert batch.keys() == before.keys()
    for name, value in before.items():
        same = (
            torch.equal(batch[name].nan_to_num(), value.nan_to_num())
            if isinstance(value, Tensor)
            else batch[name] == value
        )
        assert same, name


def test_absent_modalities_train_and_their_filler_changes_nothing(task: Task) -> None:
    batch = labelled_batch(task)
    for name in list(task.modalities):
        given = dict(batch)
        given[f"{name}.present"] = torch.tensor([True, False, True, True])
        other = {**given, name: given[name].clone()}
        other[name][1] = other[name][1] * 0 + 7
        losses, again = _losses(task, given), _losses(task, other)
        for term, loss in losses.items():
            assert math.isfinite(float(loss)), name
            torch.testing.assert_close(again[term], loss)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())
        if len(task.modalities) > 1:
            left = {n: v for n, v in batch.items() if n.split(".")[0] != name}
            assert task.logits(left).isfinite().all()


def _one_rank(case: str, start: int, stop: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    task = build_task(case, **_WITHOUT_DROPOUT.get(case, {}))
    losses = _losses(task, rows(labelled_batch(task), start, stop, SIZE))
    torch.stack(list(losses.values())).sum().backward()
    grads = {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}
    return {n: loss.detach() for n, loss in losses.items()}, grads


# dropout falls differently over other ranks
_WITHOUT_DROPOUT: dict[str, dict[str, Any]] = {"finetune_slides": {"head": {"kind": "gated"}}}


def two_ranks(cases: list[str]) -> dict[str, Any]:
    """Split the batch 3 and 1 over two ranks, average as data-parallel training does."""
    results = {}
    for case in cases:
        start, stop = ((0, 3), (3, 4))[rank()]
        losses, grads = _one_rank(case, start, stop)
        for tensor in (*losses.values(), *grads.values()):
            torch.distributed.all_reduce(tensor)
            tensor /= world_size()
        results[case] = {"losses": losses, "grads": grads}
    return results


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, Any]:
    return dict(run_ranks(two_ranks, TASKS)[0])


@pytest.mark.slow
def test_two_processes_equal_one(on_two_ranks: dict[str, Any], case: str) -> None:
    losses, grads = _one_rank(case, 0, SIZE)
    for term, loss in losses.items():
        torch.testing.assert_close(on_two_ranks[case]["losses"][term], loss, rtol=1e-5, atol=1e-6)
    rounding = 1e-6 * max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        ours = on_two_ranks[case]["grads"][name]
        # instance norms of volumes, and those of their decoders, amplify rounding
        bound = 1e-3 * float(grad.abs().max()) + max(1e-7, rounding)
        assert float((ours - grad).abs().max()) <= bound, name


class _SaveEpochs(pl.Callback):
    """Saves a checkpoint after every epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        trainer.save_checkpoint(folder / f"{trainer.current_epoch}.ckpt")


def _fit(task: Task, folder: Path, path: Path | None = None) -> dict[str, Tensor]:
    """Train two epochs of one batch; a path goes on from there."""
    batch = labelled_batch(task)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_epochs=2, default_root_dir=folder, limit_val_batches=1,
        num_sanity_val_steps=0, callbacks=[_SaveEpochs()],
    )  # fmt: skip
    loader = DataLoader([rows(batch, 0, 2, SIZE)], batch_size=None)
    trainer.fit(task, loader, loader, ckpt_path=path, weights_only=True)
    return {n: t.clone() for n, t in task.state_dict().items()}


def test_a_resumed_run_is_the_same_bit_for_bit(case: str, tmp_path: Path) -> None:
    whole = _fit(build_task(case), tmp_path)
    torch.manual_seed(99)
    resumed = _fit(build_task(case), tmp_path, tmp_path / "0.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    start = build_task(case).state_dict()
    assert any(not torch.equal(start[name], value) for name, value in whole.items())
    loaded = load_task(tmp_path / "1.ckpt").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in whole.items())


def test_a_loss_that_is_not_finite_ends_the_run(task: Task, tmp_path: Path) -> None:
    with torch.no_grad():
        next(iter(reversed(list(task.parameters())))).fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="Not finite"):
        _fit(task, tmp_path)
