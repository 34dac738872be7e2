from __future__ import annotations

import pytest

from domainssl.loading.plan import EpochPlan, Piece, deal

EQUAL = (8,) * 10
UNEQUAL = (8, 3, 8, 8, 1, 8, 5)


def plan(sizes=EQUAL, **changes):
    options = {"seed": 1, "epoch": 0, "world_size": 1, "rank": 0, "batch_size": 4,
               "window_blocks": 2, "shuffle": True, **changes}  # fmt: skip
    return EpochPlan(sizes=tuple(sizes), **options)


def items(pieces):
    return [(p.block, i) for p in pieces for i in range(p.start, p.stop)]


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL, (7,)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_are_disjoint_complete_and_of_equal_size(sizes, world_size):
    shards = [plan(sizes, world_size=world_size, rank=r) for r in range(world_size)]
    read = [item for shard in shards for item in items(shard.pieces)]
    assert sorted(read) == [(b, i) for b, size in enumerate(sizes) for i in range(size)]
    counts = [len(items(shard.pieces)) for shard in shards]
    assert max(counts) - min(counts) <= 1
    assert counts == [shard.num_items for shard in shards]
    assert len({len(shard.batch_sizes) for shard in shards}) == 1


def test_only_the_remainder_of_equal_files_is_split():
    shards = deal(EQUAL, 4, range(10))
    split = {p.block for shard in shards for p in shard if len(p) < 8}
    assert split == {8, 9}
    assert [p.block for p in shards[1][:2]] == [1, 5]


def test_no_file_is_split_when_they_divide_evenly():
    assert all(len(p) == 8 for shard in deal(EQUAL, 5, range(10)) for p in shard)


def test_epochs_differ_and_repeat_for_equal_seeds():
    assert plan(epoch=3).pieces == plan(epoch=3).pieces
    assert plan(epoch=3).pieces != plan(epoch=4).pieces
    assert plan(seed=2).pieces != plan(seed=3).pieces
    assert plan().window_order(0).tolist() != plan().window_order(1).tolist()


def test_the_number_of_steps_is_the_same_in_every_epoch():
    steps = {
        len(plan(UNEQUAL, epoch=e, world_size=3, rank=r).batch_sizes)
        for e in range(5)
        for r in range(3)
    }
    assert steps == {41 // 3 // 4}


def test_validation_batches_drop_nothing_and_differ_by_at_most_one():
    for rank in range(3):
        sizes = plan(UNEQUAL, world_size=3, rank=rank, shuffle=False).batch_sizes
        assert len(sizes) == 4
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == plan(UNEQUAL, world_size=3, rank=rank, shuffle=False).num_items


def test_validation_gives_every_rank_a_batch_when_batches_hold_one_item():
    shards = [plan((3,), world_size=2, rank=r, batch_size=1, shuffle=False) for r in range(2)]
    assert [shard.batch_sizes for shard in shards] == [[2], [1]]


def test_locate_finds_the_open_window():
    shard = plan()  # windows of 16 items, batches of 4
    assert shard.locate(0) == (0, 0)
    assert shard.locate(3) == (0, 12)
    assert shard.locate(4) == (1, 0)
    assert shard.locate(20) == (5, 0)


def test_too_few_items_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="Lower data.init_args.global_batch_size to at most 7"):
        plan((7,), batch_size=8).require_batches("train")


def test_pieces_know_their_length():
    assert len(Piece(0, 3, 8)) == 5


def test_unequal_blocks_are_dealt_as_long_as_no_rank_gets_more_than_its_part():
    # after two rounds rank 0 would hold 9 of its 8 items: the third and fourth block are split
    shards = deal((5, 1, 4, 6), 2, range(4))
    assert shards == [
        [Piece(0, 0, 5), Piece(2, 0, 3)],
        [Piece(1, 0, 1), Piece(2, 3, 4), Piece(3, 0, 6)],
    ]
