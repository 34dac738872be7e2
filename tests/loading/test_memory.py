"""Memory is used again only when nobody can see it any more."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from stream_fakes import LargeSource, stream_of

from domainssl.loading.memory import KeptMemory, SharedPool, empty
from domainssl.loading.source import Loading, Rows

MIB = 2**20


def served(memory: KeptMemory, *shape: int) -> torch.Tensor:
    with memory.serving():
        return empty(shape, torch.float32)


def test_memory_comes_back_when_the_last_tensor_in_it_ends() -> None:
    memory = KeptMemory()
    first = served(memory, 2, MIB)
    place = first.data_ptr()
    assert first.shape == (2, MIB) and first.is_contiguous() and place % 64 == 0
    del first
    assert served(memory, 2, MIB).data_ptr() == place


@pytest.mark.parametrize(
    "see",
    [
        lambda t: t[1, 5:],
        lambda t: t.numpy(),
        lambda t: t.view(-1).detach(),
        lambda t: t.T.chunk(2),
    ],
    ids=["slice", "numpy", "detached", "chunks"],
)
def test_a_view_of_any_kind_keeps_its_memory(see) -> None:
    memory = KeptMemory()
    first = served(memory, 2, MIB)
    place, view = first.data_ptr(), see(first)
    del first
    assert served(memory, 2, MIB).data_ptr() != place
    del view
    assert place in {t.data_ptr() for t in (served(memory, 2, MIB), served(memory, 2, MIB))}


def test_never_more_is_held_than_was_in_use_at_once() -> None:
    memory = KeptMemory()
    most = 0
    for step in range(12):  # sizes that do not fit each other
        held = [served(memory, 3 ** (step % 4), MIB) for _ in range(1 + step % 3)]
        most = max(most, sum(t.nbytes + 64 for t in held))
        assert memory.num_bytes <= most
        held.clear()
    memory.clear()
    assert memory.num_bytes == 0


def test_what_is_in_use_when_a_pool_is_cleared_stays_whole() -> None:
    memory = KeptMemory()
    mine = served(memory, 2, MIB).fill_(7)
    memory.clear()
    others = [served(memory, 2, MIB).fill_(0) for _ in range(3)]
    assert (mine == 7).all() and len(others) == 3
    del mine
    assert memory.num_bytes == sum(t.nbytes + 64 for t in others)


def sent(pool: SharedPool, worker: SharedPool, **data: torch.Tensor) -> Rows:
    return pickle.loads(ForkingPickler.dumps(worker.pack(Rows(data=dict(data), count=1))))


def pool_and_worker() -> tuple[SharedPool, SharedPool]:
    pool = SharedPool(1)
    return pool, pickle.loads(ForkingPickler.dumps(pool))


def test_a_shared_buffer_is_sent_once_and_free_when_its_object_ends() -> None:
    pool, worker = pool_and_worker()
    places = set()
    for value in range(5):
        with worker.serving():
            x = worker.take(4 * MIB).view(torch.float32).view(2, -1).fill_(value)
        there = sent(pool, worker, x=x, small=torch.tensor([value]))
        assert torch.equal(there.data["x"], x) and there.data["small"].item() == value
        places.add(there.data["x"].data_ptr())
        del there
    assert len(places) == 1
    pool.close()


def test_objects_alive_at_once_have_buffers_of_their_own() -> None:
    pool, worker = pool_and_worker()
    alive = []
    for value in range(4):
        with worker.serving():
            x = worker.take(2 * MIB).fill_(value)
        alive.append(sent(pool, worker, x=x.view(2, MIB)[1:]))  # a part, with an offset
    for value, there in enumerate(alive):
        assert there.data["x"].shape == (1, MIB) and (there.data["x"] == value).all()
    pool.close()
    assert all((there.data["x"] == value).all() for value, there in enumerate(alive))


def test_buffers_of_a_failed_load_are_free_and_others_grow() -> None:
    pool, worker = pool_and_worker()
    with pytest.raises(ValueError), worker.serving():
        place = worker.take(MIB).data_ptr()
        raise ValueError
    with worker.serving():
        again, larger = worker.take(MIB), worker.take(3 * MIB)
    assert again.data_ptr() == place and len(larger) == 3 * MIB
    pool.close()


def test_a_buffer_that_is_not_sent_is_left_to_whoever_has_it() -> None:
    pool, worker = pool_and_worker()
    with worker.serving():
        hidden = worker.take(MIB).fill_(3)
    sent(pool, worker)
    with worker.serving():
        assert worker.take(MIB).fill_(0).data_ptr() != hidden.data_ptr()
    assert (hidden == 3).all()
    pool.close()


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (1, "forkserver")])
def test_batches_that_are_kept_stay_as_they_were(workers, method) -> None:
    stream = stream_of(
        LargeSource((6, 6, 6, 6)), window_blocks=1, batch_size=4,
        loading=Loading(workers=workers, start_method=method, prefetch=1),
    )  # fmt: skip
    kept = [batch for _ in range(3) for batch in stream]
    assert len(kept) == 18
    for batch in kept:
        expected = batch["index"].float()[:, None].expand(-1, LargeSource.WIDTH)
        assert torch.equal(batch["x"], expected)
    stream.close()
    assert np.isfinite(kept[0]["x"].numpy()).all()


def test_the_buffers_of_workers_do_not_grow_in_number() -> None:
    stream = stream_of(
        LargeSource((6,) * 8), window_blocks=2, batch_size=4, loading=Loading(workers=1)
    )
    counts = []
    for _ in range(3):
        assert sum(len(batch["index"]) for batch in stream) == 48
        counts.append(len(stream._reader._pool._mapped))
    assert 0 < counts[0] <= 8 and counts[2] <= 8
    stream.close()


def test_an_abandoned_epoch_gives_its_buffers_back() -> None:
    stream = stream_of(
        LargeSource((6,) * 8), window_blocks=2, batch_size=4, loading=Loading(workers=1)
    )
    for _ in range(6):
        next(iter(stream))
    assert len(list(stream)) == 12
    assert len(stream._reader._pool._mapped) <= 10
    stream.close()
