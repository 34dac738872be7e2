"""The helper that all tests with two processes stand on."""

from __future__ import annotations

import os

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks


def identity() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def total() -> torch.Tensor:
    value = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(value)
    return value


def fail_on_the_second() -> None:
    print("before the failure", flush=True)
    if dist.get_rank() == 1:
        raise ValueError("as the test wants it")
    dist.barrier()  # waits for ever


def end_the_second() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def test_jobs_run_on_the_same_ranks_one_after_another():
    assert run_ranks(identity) == run_ranks(identity)
    assert [rank for rank, _ in run_ranks(identity)] == [0, 1]
    assert [float(value) for value in run_ranks(total)] == [3, 3]


def test_where_ranks_cannot_be_started_no_later_job_tries_it_again(monkeypatch):
    tried: list[int] = []

    def full(world: int) -> None:
        tried.append(world)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ranks, "_running", {})
    monkeypatch.setattr(ranks, "_not_started", [])
    monkeypatch.setattr(ranks, "_Ranks", full)
    with pytest.raises(OSError, match="No space left"):
        run_ranks(identity)
    with pytest.raises(RankError, match=r"could not be started: .*No space left"):
        run_ranks(identity)
    assert tried == [2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "message"),
    [
        (fail_on_the_second, r"rank 1 failed:[\s\S]*ValueError: as the test wants it[\s\S]*before"),
        (end_the_second, "rank 1 ended with 7|rank 0 failed"),
    ],
)
def test_a_job_that_fails_is_reported_and_the_next_one_gets_new_ranks(job, message):
    before = run_ranks(identity)
    with pytest.raises(RankError, match=message):
        run_ranks(job)
    after = run_ranks(identity)
    assert {pid for _, pid in before}.isdisjoint(pid for _, pid in after)
