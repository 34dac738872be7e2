"""Evaluation, guard and presence on two gloo processes with unequal batches."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import TinyData, TinyObjective, tiny_modalities, tiny_trainer

from domainssl.callbacks.evaluation import OnlineEvaluation
from domainssl.distributed import rank, world_size
from domainssl.errors import DomainSSLError
from domainssl.evaluation.report import measure, measure_raw
from domainssl.training.guard import FiniteGuard, NotFiniteError
from domainssl.training.presence import PresenceRecord

NAMES = ("s1", "s2")


def _scores() -> dict[str, float]:
    torch.manual_seed(0)
    model = TinyObjective(tiny_modalities()).eval()
    trainer = tiny_trainer(".")
    trainer.strategy.connect(model)
    callback = OnlineEvaluation()
    batches = TinyData(held_out=44).val_dataloader().batches  # 6 batches, the last one of 4
    with torch.no_grad():
        for batch in batches[rank() :: world_size()]:
            callback._collect(trainer, model, batch, with_raw=True)
    found = callback._gathered(model)
    assert found is not None
    return {**measure(found, NAMES), **measure_raw(found, NAMES)}


def _guarded() -> str:
    guard = FiniteGuard()
    for counter in range(3):
        is_bad = rank() == 1 and counter == 1
        losses = {"a": torch.tensor(1.0), "b": torch.tensor(float("nan" if is_bad else "1"))}
        guard.watch(losses, counter, [f"item_{rank()}_{counter}"])
    try:
        guard.check(3)
    except NotFiniteError as error:
        return str(error)
    return ""


def _presence() -> list[list[str]]:
    record, steps = PresenceRecord(), []
    here = torch.ones(2, 1)
    for on_first, on_second in ((True, True), (False, True), (False, False)):
        batch: dict[str, Any] = {"s1": here, "s2": here}
        is_present = on_first if rank() == 0 else on_second
        if not is_present:  # the rank that has all items carries no companion at all
            batch["s1.present"] = torch.zeros(2, dtype=torch.bool)
        record.note(batch, NAMES, torch.device("cpu"))
        steps.append(record.absent(NAMES))
    return steps


def watch() -> dict[str, Any]:
    return {"scores": _scores(), "message": _guarded(), "absent": _presence()}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return list(run_ranks(watch))


def test_scores_of_two_ranks_equal_those_of_one(results):
    alone = _scores()
    for result in results:
        assert result["scores"].keys() == alone.keys()
        for name, value in alone.items():
            assert result["scores"][name] == pytest.approx(value, rel=1e-6), name


def test_every_rank_raises_and_names_the_items_of_the_rank_that_failed(results):
    for result in results:
        assert "loss 'b' in training batch 1 (ids: item_1_1)" in result["message"]
    assert issubclass(NotFiniteError, DomainSSLError)


def test_a_modality_is_absent_only_when_no_rank_has_it(results):
    for result in results:
        assert result["absent"] == [[], [], ["s1"]]
