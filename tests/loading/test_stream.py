from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from stream_fakes import FakeSource, ids, plan_of, stream_of

from domainssl.errors import DataError
from domainssl.loading.source import Loading

SIZES = (7, 7, 7, 7, 4, 7, 7)


@pytest.fixture(scope="module")
def expected():
    return ids(stream_of(FakeSource(SIZES)))


@pytest.mark.parametrize(
    ("workers", "method"), [(1, "fork"), (3, "fork"), (12, "fork"), (1, "spawn"), (1, "forkserver")]
)
def test_order_and_content_do_not_depend_on_workers(expected, workers, method):
    loading = Loading(workers=workers, start_method=method)
    stream = stream_of(FakeSource(SIZES), loading=loading)
    batches = list(stream)
    stream.close()
    assert [b["index"].tolist() for b in batches] == expected
    alone = list(stream_of(FakeSource(SIZES)))
    for a, b in zip(alone, batches, strict=True):
        assert torch.equal(a["draw"], b["draw"])
        assert torch.equal(a["x"], b["x"])
        assert a["id"] == b["id"]


def test_workers_serve_several_epochs_and_survive_an_abandoned_one():
    position = [0, 0]
    source = FakeSource(SIZES)
    stream = stream_of(source, loading=Loading(workers=2))
    stream._position = lambda: tuple(position)
    iterator = iter(stream)
    next(iterator)
    position[0] = 1
    second = ids(stream)
    stream.close()
    alone = stream_of(source, position=(1, 0))
    assert second == ids(alone)
    with pytest.raises(RuntimeError, match="iterated anew"):
        next(iterator)


def test_a_row_holds_what_its_index_says(expected):
    for batch in stream_of(FakeSource(SIZES)):
        assert torch.equal(batch["x"][:, 0, 0, 0], batch["index"].float())
        assert batch["id"] == [f"i{i}" for i in batch["index"].tolist()]
        assert batch["x"].is_contiguous()


def test_each_item_comes_once_and_each_block_is_decoded_once(expected):
    stream = stream_of(FakeSource(SIZES))
    seen = [i for batch in stream for i in batch["index"].tolist()]
    assert len(seen) == len(set(seen)) == sum(SIZES) // 5 * 5
    assert stream.tally.blocks == len(SIZES)
    assert stream.read_amplification == 1.0


def test_batches_mix_blocks(expected):
    mixed = [len(set(b["block"].tolist())) for b in stream_of(FakeSource(SIZES))]
    assert min(mixed[:4]) > 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 4, 5, 8, 9])
def test_resuming_goes_on_with_the_next_batch_and_decodes_only_what_is_open(
    expected, workers, done
):
    stream = stream_of(FakeSource(SIZES), position=(0, done), loading=Loading(workers=workers))
    assert len(stream) == len(expected)
    assert ids(stream) == expected[done:]
    window = plan_of(FakeSource(SIZES))(0).locate(done)[0]
    assert stream.tally.blocks == (len(SIZES) - 3 * window if done < len(expected) else 0)
    stream.close()


def test_a_finished_epoch_yields_nothing(expected):
    assert ids(stream_of(FakeSource(SIZES), position=(0, len(expected)))) == []


def test_ranks_together_read_everything_once_in_validation():
    seen = []
    for rank in range(3):
        stream = stream_of(FakeSource(SIZES), world_size=3, rank=rank, shuffle=False)
        seen += [i for batch in ids(stream) for i in batch]
    assert sorted(seen) == list(range(sum(SIZES)))


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    stream = stream_of(FakeSource(SIZES), loading=Loading(workers=2))
    list(stream)
    stream.close()
    assert torch.equal(before, torch.get_rng_state())


def test_a_bad_block_is_named_when_bad_samples_raise():
    with pytest.raises(DataError, match=r"block 2: array 'bands' is damaged.*on_bad_sample"):
        list(stream_of(FakeSource(SIZES, bad_blocks=[2])))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_items_are_replaced_by_the_next_good_ones_in_order(workers):
    source = FakeSource((4, 4, 4), bad_items=[1, 2, 7])
    stream = stream_of(
        source, policy="replace", window_blocks=1, shuffle=False, batch_size=4,
        loading=Loading(workers=workers, max_bad_fraction=0.5),
    )  # fmt: skip
    assert ids(stream) == [[0, 3, 4, 3], [4, 5, 6, 8], [8, 9, 10, 11]]
    assert len(stream.tally.bad) == 3
    stream.close()


def test_a_bad_block_is_replaced_by_different_items_of_the_next_one():
    source = FakeSource((4, 4, 4), bad_blocks=[0])
    loading = Loading(workers=0, max_bad_fraction=0.5)
    stream = stream_of(source, policy="replace", window_blocks=1, shuffle=False, batch_size=4,
                       loading=loading)  # fmt: skip
    assert ids(stream)[0] == [4, 5, 6, 7]


def test_a_bad_last_block_is_replaced_by_what_came_before_it_in_its_window():
    source = FakeSource((4, 4), bad_blocks=[1])
    loading = Loading(workers=0, max_bad_fraction=0.5)
    stream = stream_of(source, policy="replace", window_blocks=2, shuffle=False, batch_size=4,
                       loading=loading)  # fmt: skip
    assert ids(stream)[1] == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_blocks_at_the_end_are_replaced_by_the_first_good_ones_of_the_epoch(workers):
    """A held-out file that is damaged ended the run where it was the last one."""
    source = FakeSource((4, 4, 4, 4), bad_blocks=(0, 3))
    stream = stream_of(
        source, policy="replace", window_blocks=1, shuffle=False, batch_size=4,
        loading=Loading(workers=workers, max_bad_fraction=0.6),
    )  # fmt: skip
    expected = [[4, 5, 6, 7], [4, 5, 6, 7], [8, 9, 10, 11], [4, 5, 6, 7]]
    assert ids(stream) == ids(stream) == expected
    stream.close()


def test_replacement_is_the_same_after_a_resume():
    loading = Loading(workers=0, max_bad_fraction=0.5)
    source = FakeSource(SIZES, bad_blocks=[3], bad_items=[0, 1])
    whole = ids(stream_of(source, policy="replace", loading=loading))
    rest = ids(stream_of(source, policy="replace", loading=loading, position=(0, 5)))
    assert rest == whole[5:]


def test_too_many_bad_items_end_the_run_with_the_list():
    stream = stream_of(FakeSource((100, 100), bad_items=[3, 4, 150]), policy="replace")
    with pytest.raises(DataError, match="3 of 200 train items") as info:
        list(stream)
    assert all(f"item {i} is damaged" in str(info.value) for i in (3, 4, 150))


def test_one_percent_of_bad_items_is_allowed():
    stream = stream_of(FakeSource((100, 100), bad_items=[3, 150]), policy="replace")
    assert len(ids(stream)) == 40


def test_a_worker_that_dies_ends_with_a_message():
    stream = stream_of(FakeSource(SIZES, dies_at=2), loading=Loading(workers=2))
    with pytest.raises(DataError, match=r"worker process of the train data died.*workers: 0"):
        list(stream)


def test_mistakes_in_loading_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="Did you mean 'spawn'"):
        Loading(start_method="spwan")
    with pytest.raises(ValueError, match="loading.workers: got -1"):
        Loading(workers=-1)


def test_the_stream_counts_the_time_in_which_batches_are_waited_for(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        "domainssl.loading.stream.time", SimpleNamespace(perf_counter=lambda: clock.now)
    )

    class Slow(FakeSource):
        def load(self, piece, epoch):
            clock.now += 3.0  # of each of the four blocks
            return super().load(piece, epoch)

    stream = stream_of(Slow([4] * 4))
    for _ in stream:
        clock.now += 100.0  # a step is no waiting
    assert stream.waited_s == 12.0
