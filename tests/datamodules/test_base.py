from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from stream_fakes import FakeSource

from domainssl.datamodules.base import DomainDataModule
from domainssl.errors import ConfigError
from domainssl.loading.source import Loading
from domainssl.modality import Modality


class FakeDataModule(DomainDataModule):
    """Items without files."""

    modalities = {
        "x": Modality(
            name="x", kind="image", channels=("a", "b"), value_unit="arbitrary", size=(3, 3)
        )
    }
    context_size = 3

    def __init__(self, num_bytes: int = 0, **options) -> None:
        super().__init__(**options)
        self.num_bytes = num_bytes

    def open_sources(self):
        train, val = FakeSource([6] * 9), FakeSource([5, 2])
        train.num_bytes = self.num_bytes
        return {"train": train, "val": val}

    def identity(self):
        return {}


def trainer_of(world_size=1, rank=0, accumulate=1, replicas=None, devices=1):
    kwargs = {"num_replicas": replicas or world_size, "rank": rank % (replicas or world_size)}
    return SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        num_devices=devices,
        accumulate_grad_batches=accumulate,
        current_epoch=0,
        state=SimpleNamespace(fn=None),
        strategy=SimpleNamespace(
            distributed_sampler_kwargs=kwargs, root_device=torch.device("cpu")
        ),
    )


def ready(trainer=None, **options):
    data = FakeDataModule(**{"global_batch_size": 12, **options})
    data.trainer = trainer
    data.setup("fit")
    return data


def test_the_global_batch_is_divided_over_devices_and_accumulation():
    data = ready(trainer_of(world_size=3, rank=1, accumulate=2))
    assert data.batch_size == 2
    assert len(data.train_dataloader()) == 54 // 3 // 2
    assert "2 items on each of 3 ranks, 2 accumulated = 12" in "\n".join(data.describe())


def test_tensor_parallel_ranks_read_the_same_items():
    shards = [ready(trainer_of(world_size=4, rank=r, replicas=2)) for r in range(4)]
    orders = [[b["index"].tolist() for b in data.train_dataloader()] for data in shards]
    assert orders[0] == orders[2] != orders[1] == orders[3]


@pytest.mark.parametrize(("world", "batch", "advice"), [(5, 12, "10 or 15"), (5, 3, "Use 5")])
def test_a_batch_that_does_not_divide_is_refused_with_those_that_do(world, batch, advice):
    with pytest.raises(ConfigError, match=f"cannot be divided by {world} device.*{advice}"):
        ready(trainer_of(world_size=world), global_batch_size=batch)


def test_ranks_train_on_disjoint_items():
    seen = []
    for rank in range(2):
        data = ready(trainer_of(world_size=2, rank=rank), global_batch_size=6)
        seen += [i for batch in data.train_dataloader() for i in batch["index"].tolist()]
    assert sorted(seen) == list(range(54))


def test_small_data_are_read_without_worker_processes(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert ready().train_dataloader().loading.workers == 0
    assert ready(num_bytes=10**10).train_dataloader().loading.workers == 7
    shared = ready(trainer_of(world_size=4, devices=4), num_bytes=10**10)
    assert shared.train_dataloader().loading.workers == 1
    asked = ready(num_bytes=10**10, loading=Loading(workers=3))
    assert asked.train_dataloader().loading.workers == 3


def test_epochs_follow_the_attribute_without_a_trainer():
    data = ready()
    orders = []
    for epoch in (0, 1, 0):
        data.epoch = epoch
        orders.append([b["index"].tolist() for b in data.train_dataloader()])
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize(("cores", "workers"), [(4, 3), (1, 1), (None, 1)])
def test_cores_are_counted_where_the_system_knows_no_affinity(monkeypatch, cores, workers):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    data = FakeDataModule(num_bytes=10**9, global_batch_size=4)
    data.setup("fit")
    assert data.train_dataloader().loading.workers == workers


def test_arguments_are_recorded_as_plain_data():
    data = FakeDataModule(global_batch_size=4, loading=Loading(workers=1))
    assert data.arguments["global_batch_size"] == 4
    assert data.arguments["loading"]["workers"] == 1


def test_an_absent_split_is_named():
    with pytest.raises(ConfigError, match="no 'predict' split here, only"):
        ready().predict_dataloader()
    with pytest.raises(ConfigError, match="call setup"):
        FakeDataModule(global_batch_size=4).train_dataloader()


def test_a_saved_position_is_kept_until_it_is_used():
    data = ready()
    state = {**data.state_dict(), "epoch": 0, "processed": 2}
    data.load_state_dict(state)
    assert data.state_dict() == state
    whole = [b["index"].tolist() for b in ready().train_dataloader()]
    assert [b["index"].tolist() for b in data.train_dataloader()] == whole[2:]


def test_a_position_of_other_world_size_is_refused():
    data = ready(trainer_of(world_size=2))
    data.load_state_dict({**ready().state_dict(), "processed": 2})
    with pytest.raises(ConfigError, match="world_size 1 then, 2 now"):
        next(iter(data.train_dataloader()))
