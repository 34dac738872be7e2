"""A source without files, importable in worker processes of any start method."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch

from domainssl.errors import DataError
from domainssl.loading.memory import empty
from domainssl.loading.plan import EpochPlan, Piece, generator
from domainssl.loading.source import Loading, Rows
from domainssl.loading.stream import BlockStream


class FakeSource:
    """Items carry their index, a draw of (seed, epoch, index) and the process that made them."""

    def __init__(
        self,
        sizes: Sequence[int],
        bad_blocks: Sequence[int] = (),
        bad_items: Sequence[int] = (),
        dies_at: int | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.num_bytes = 0
        self.bad_blocks, self.bad_items, self.dies_at = set(bad_blocks), set(bad_items), dies_at

    def load(self, piece: Piece, epoch: int) -> Rows:
        if piece.block in self.bad_blocks:
            raise DataError(f"block {piece.block}: array 'bands' is damaged.")
        if piece.block == self.dies_at:
            os._exit(3)
        first = sum(self.sizes[: piece.block]) + piece.start
        index = np.arange(first, first + len(piece))
        x = empty((len(piece), 2, 3, 3), torch.float32)
        for i, value in enumerate(index):
            x[i] = float(value)
        draw = np.array([generator(0, epoch, 9, int(i)).random() for i in index], np.float32)
        return Rows(
            data={"x": x, "index": index, "draw": draw, "id": [f"i{i}" for i in index],
             "block": np.full(len(piece), piece.block)},
            count=len(piece),
            bytes_decoded=self.sizes[piece.block],
            bytes_needed=len(piece),
            bad={i: f"item {v} is damaged." for i, v in enumerate(index) if v in self.bad_items},
        )  # fmt: skip


class FailingSource(FakeSource):
    """Fails with an error that is no bad sample."""

    def __init__(self, sizes: Sequence[int], error: Exception) -> None:
        super().__init__(sizes)
        self.error = error

    def load(self, piece: Piece, epoch: int) -> Rows:
        raise self.error


class SleepingSource(FakeSource):
    """Prints the process that reads, and never comes back."""

    def load(self, piece: Piece, epoch: int) -> Rows:
        sys.stdout.write(f"{os.getpid()}\n")
        sys.stdout.flush()
        threading.Event().wait()
        raise AssertionError


class LargeSource(FakeSource):
    """Items large enough for memory that is kept; their values are their index."""

    WIDTH = 2**16

    def load(self, piece: Piece, epoch: int) -> Rows:
        rows = super().load(piece, epoch)
        x = empty((len(piece), self.WIDTH), torch.float32)
        rows.data["x"] = x.copy_(torch.from_numpy(rows.data["index"])[:, None])
        return rows


def plan_of(source, **changes):
    options = {"seed": 0, "world_size": 1, "rank": 0, "batch_size": 5, "window_blocks": 3,
               "shuffle": True, **changes}  # fmt: skip
    return lambda epoch: EpochPlan(sizes=tuple(source.sizes), epoch=epoch, **options)


def stream_of(source, position=(0, 0), policy="raise", loading=None, **changes):
    return BlockStream(
        source, plan_of(source, **changes), lambda: position, loading or Loading(workers=0),
        on_bad_sample=policy,
    )  # fmt: skip


def ids(stream) -> list[list[int]]:
    return [batch["index"].tolist() for batch in stream]
