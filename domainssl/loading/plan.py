"""Which rank reads what, in which order: a pure function of sizes, seed and epoch.

A data set is a list of *blocks* (files, volumes, slides) of known sizes. Each epoch permutes the
blocks, deals whole blocks to the ranks and splits the last ones by item, so that the ranks read
disjoint, complete shards of equal size. Several consecutive *pieces* of a rank form a *window*
whose items are permuted together (the shuffle buffer across blocks). Neither the number of
workers nor how they start appears here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from domainssl.errors import ConfigError

__all__ = ["ORDER_VERSION", "EpochPlan", "Piece", "deal", "generator"]

ORDER_VERSION = 1  # raise it when the order of samples changes for equal arguments
_BLOCKS, _WINDOW = 1, 2  # tags that keep the streams of random numbers apart


def generator(seed: int, epoch: int, tag: int, index: int = 0) -> np.random.Generator:
    """Return the NumPy generator of one (seed, epoch, purpose, index)."""
    return np.random.default_rng([seed, epoch, tag, index])


@dataclass(frozen=True)
class Piece:
    """Items `start` to `stop` (exclusive) of one block."""

    block: int
    start: int
    stop: int

    def __len__(self) -> int:
        """Return the number of items."""
        return self.stop - self.start


def deal(sizes: Sequence[int], world_size: int, order: Sequence[int]) -> list[list[Piece]]:
    """Deal blocks to ranks: whole ones in turn, the last `F mod R` ones split by item.

    Where blocks have unequal sizes, as many further blocks are split as it takes to give every
    rank the same number of items (or one more).

    Args:
        sizes: Items per block.
        world_size: Number of ranks R.
        order: The blocks that take part, in the order in which they are dealt.

    Returns:
        One list of pieces per rank; together they hold every item exactly once.
    """
    blocks = [b for b in order if sizes[b] > 0]
    total = sum(sizes[b] for b in blocks)
    targets = [total // world_size + (r < total % world_size) for r in range(world_size)]
    rows = len(blocks) // world_size
    dealt = np.array([sizes[b] for b in blocks[: rows * world_size]], np.int64)
    given = dealt.reshape(rows, world_size).cumsum(0)  # items of each rank after each round
    whole = int((given <= targets).all(1).sum()) * world_size
    shards = [
        [Piece(b, 0, sizes[b]) for b in blocks[r:whole:world_size]] for r in range(world_size)
    ]
    lacking = [t - sum(map(len, shard)) for t, shard in zip(targets, shards)]
    rank = 0
    for b in blocks[whole:]:
        start = 0
        while start < sizes[b]:
            while lacking[rank] == 0:
                rank += 1
            stop = min(sizes[b], start + lacking[rank])
            shards[rank].append(Piece(b, start, stop))
            lacking[rank] -= stop - start
            start = stop
    return shards


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The order in which one rank reads one epoch.

    Attributes:
        sizes: Items per block.
        seed: Seed of the data.
        epoch: Which epoch; has no influence without `shuffle`.
        world_size: Number of ranks.
        rank: This rank.
        batch_size: Items per batch on this rank.
        window_blocks: Pieces whose items are permuted together.
        shuffle: Training order, and batches of exactly `batch_size` (the rest is dropped).
            Otherwise the order of the blocks, and on every rank the same number of batches of
            nearly equal size, nothing dropped.
    """

    sizes: tuple[int, ...]
    seed: int
    epoch: int
    world_size: int
    rank: int
    batch_size: int
    window_blocks: int
    shuffle: bool

    @cached_property
    def pieces(self) -> list[Piece]:
        """What this rank reads, in order."""
        order = np.arange(len(self.sizes))
        if self.shuffle:
            order = generator(self.seed, self.epoch, _BLOCKS).permutation(len(self.sizes))
        return deal(self.sizes, self.world_size, order.tolist())[self.rank]

    @cached_property
    def num_items(self) -> int:
        """Items of this rank, those that a last incomplete batch drops included."""
        total = sum(self.sizes)
        return total // self.world_size + (self.rank < total % self.world_size)

    @cached_property
    def batch_sizes(self) -> list[int]:
        """Items per batch; the length is equal on all ranks and in all epochs."""
        total = sum(self.sizes)
        fewest = total // self.world_size
        most = -(-total // self.world_size)
        if self.shuffle:
            return [self.batch_size] * (fewest // self.batch_size)
        steps = min(-(-most // self.batch_size), fewest)
        if steps == 0:
            return []
        n = self.num_items
        return [n // steps + (i < n % steps) for i in range(steps)]

    @cached_property
    def windows(self) -> list[range]:
        """Positions in `pieces` of each window."""
        step = self.window_blocks
        return [range(i, min(i + step, len(self.pieces))) for i in range(0, len(self.pieces), step)]

    def window_order(self, window: int) -> np.ndarray:
        """Return the order in which the items of a window are delivered.

        Returns:
            Positions in the concatenated pieces of the window, int64.
        """
        count = sum(len(self.pieces[p]) for p in self.windows[window])
        if not self.shuffle:
            return np.arange(count)
        return generator(self.seed, self.epoch, _WINDOW, window).permutation(count)

    def locate(self, batches: int) -> tuple[int, int]:
        """Return the window that is open after some batches, and the items taken from it."""
        taken = sum(self.batch_sizes[:batches])
        for window, positions in enumerate(self.windows):
            count = sum(len(self.pieces[p]) for p in positions)
            if taken < count:
                return window, taken
            taken -= count
        return len(self.windows), 0

    def require_batches(self, split: str) -> None:
        """Refuse a plan without a single batch.

        Raises:
            ConfigError: There are too few items.
        """
        if not self.batch_sizes:
            total = sum(self.sizes)
            raise ConfigError(
                f"The {split} split has {total} items for {self.world_size} rank(s) with "
                f"{self.batch_size} per batch, which does not make one batch. Lower "
                f"data.init_args.global_batch_size to at most {total}, or use more data."
                if self.shuffle
                else f"The {split} split has {total} items for {self.world_size} ranks; every "
                "rank needs at least one. Use fewer devices or more held-out data."
            )
