"""A stream of batches out of blocks: decode each block once, shuffle across blocks, resume exactly.

A *source* knows how many items each block holds and turns a piece of a block into stacked arrays
(`Source.load`). Worker processes load whole pieces in the order of the plan; the main process keeps
one window of them, permutes its items, and writes the rows of every batch in place into freshly
allocated (on CUDA machines: pinned) tensors. Content and order depend on the plan alone, never on
the number of workers or their start method.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from domainssl.errors import DataError
from domainssl.loading.memory import empty
from domainssl.loading.plan import EpochPlan, Piece
from domainssl.loading.reader import PieceReader, one_thread
from domainssl.loading.source import Loading, Rows, Source
from domainssl.loading.validity import ValidityCheck
from domainssl.modality import Batch, collate

__all__ = ["BlockStream", "Loading", "Rows", "Source", "empty"]

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Tally:
    """What a stream has read so far."""

    bytes_decoded: int = 0
    bytes_needed: int = 0
    blocks: int = 0
    items: int = 0
    wait_s: float = 0.0
    bad: dict[tuple[int, int], str] = field(default_factory=dict)


class BlockStream:
    """Iterable of batches over one epoch of one rank.

    Its length is always that of the full epoch; iterating starts where `position` says.

    Args:
        source: Where blocks come from.
        plan: Builds the plan of an epoch.
        position: Called when the first batch is asked for; returns the epoch and the number of
            its batches that have been processed already.
        loading: Processes and memory.
        split: Name for messages.
        on_bad_sample: `raise`, or `replace` by the next good item in this rank's order.
    """

    def __init__(
        self,
        source: Source,
        plan: Callable[[int], EpochPlan],
        position: Callable[[], tuple[int, int]],
        loading: Loading,
        *,
        split: str = "train",
        on_bad_sample: Literal["raise", "replace"] = "raise",
    ) -> None:
        self.source = source
        self.plan = plan
        self.loading = loading
        self.split = split
        self.tally = _Tally()
        self._position = position
        self._on_bad_sample = on_bad_sample
        self._reader = PieceReader(source, loading, split)
        self._validity = ValidityCheck(split)
        self._iteration = 0
        first = plan(0)
        first.require_batches(split)
        self._length = len(first.batch_sizes)
        self._num_items = first.num_items

    def __len__(self) -> int:
        """Return the batches of a full epoch."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches that are left of the epoch."""
        asked = time.perf_counter()
        epoch, done = self._position()  # a generator: runs with the first next(), not with iter()
        plan = self.plan(epoch)
        self._iteration += 1
        mine = self._iteration
        window, skip = plan.locate(done)
        if done >= len(plan.batch_sizes):
            return
        before = _Tally(
            bytes_decoded=self.tally.bytes_decoded,
            bytes_needed=self.tally.bytes_needed,
            blocks=self.tally.blocks,
        )
        rows = self._rows(plan, window, skip)
        pin = bool(self.loading.pin_memory) and torch.cuda.is_available()
        for number, size in enumerate(plan.batch_sizes[done:], done + 1):
            if mine != self._iteration:
                raise RuntimeError(
                    f"The {self.split} stream was iterated anew while an older iterator was still "
                    "in use; one iterator at a time shares the worker processes."
                )
            try:
                items = [next(rows) for _ in range(size)]
            except (RuntimeError, OSError, EOFError) as error:
                found = self._reader.death(error)
                if found is None:
                    raise
                raise found from error
            with one_thread(), self._reader.memory.serving():
                batch = _assemble([(piece.data, i) for piece, i in items], pin)
            self._validity.look(batch)
            if done == 0 and number == len(plan.batch_sizes):
                self._validity.end()
            del items  # pieces that are used up make room before the next ones come
            self.tally.wait_s += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()
        rows.close()
        self._log_reads(epoch, before)

    # Lightning asks for these before it believes that a loader can resume. The position itself is
    # kept by the DataModule, because Lightning drops a loader's state when it builds the loaders
    # before it restores the checkpoint (pytorch-lightning#21765).
    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the DataModule keeps the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore `state`: the DataModule keeps the position."""

    @property
    def waited_s(self) -> float:
        """Seconds between asking for a batch and getting it, over all batches so far."""
        return self.tally.wait_s

    @property
    def read_amplification(self) -> float:
        """Bytes decoded per byte needed, so far."""
        return self.tally.bytes_decoded / max(1, self.tally.bytes_needed)

    def close(self) -> None:
        """End the worker processes; an iterator in use cannot go on."""
        self._iteration += 1
        self._reader.close()

    def _feed(self, plan: EpochPlan, window: int) -> Iterator[Rows]:
        """Yield the loaded pieces of this and all later windows, in order."""
        first = plan.windows[window].start
        pieces = plan.pieces[first:]
        loaded = self._reader.read(pieces, plan.epoch)
        for piece in pieces:
            rows = next(loaded)
            self.tally.blocks += 1
            self.tally.items += rows.count
            self.tally.bytes_decoded += rows.bytes_decoded
            self.tally.bytes_needed += rows.bytes_needed
            if rows.bad:
                self._count_bad(piece, rows)
            yield rows

    def _rows(
        self, plan: EpochPlan, window: int, skip: int
    ) -> Generator[tuple[Rows, int], None, None]:
        """Yield (piece, row) for every item from `skip` of `window` to the end of the epoch."""
        feed = self._feed(plan, window)
        ahead: deque[Rows] = deque()
        for number in range(window, len(plan.windows)):
            size = len(plan.windows[number])
            while len(ahead) < size:
                ahead.append(next(feed))
            current = [ahead.popleft() for _ in range(size)]
            items = [(rows, i) for rows in current for i in range(rows.count)]
            if any(rows.bad for rows in current):
                items = self._replace(items, ahead, feed, plan)
            order = plan.window_order(number)
            later = len(plan.windows[number + 1]) if number + 1 < len(plan.windows) else 0
            for taken in range(skip, len(order)):
                # Receive the next window in step with handing out this one.
                while len(ahead) < later * taken // len(order):
                    ahead.append(next(feed))
                rows, i = items[order[taken]]
                yield rows, i
            skip = 0

    def _replace(
        self,
        items: list[tuple[Rows, int]],
        ahead: deque[Rows],
        feed: Iterator[Rows],
        plan: EpochPlan,
    ) -> list[tuple[Rows, int]]:
        """Put good items in the place of bad ones: the next ones in order, each in its turn.

        Where the end of the epoch is bad, they are those of its beginning.
        """
        good = [(rows, i) for rows, i in items if i not in rows.bad]
        sources: list[int | None] = []  # per item its place in `good`, None where it is good itself
        passed = run = 0
        for rows, i in items:
            bad = i in rows.bad
            sources.append(passed + run if bad else None)
            passed, run = passed + (not bad), run + 1 if bad else 0
        needed = max(place for place in sources if place is not None) + 1
        good += [(rows, i) for rows in ahead for i in range(rows.count) if i not in rows.bad]
        while len(good) < needed and (more := next(feed, None)) is not None:
            ahead.append(more)
            good += [(more, i) for i in range(more.count) if i not in more.bad]
        first = (self._reader.read([piece], plan.epoch) for piece in plan.pieces)
        while not good and (again := next(first, None)) is not None:
            good = [(rows, i) for rows in again for i in range(rows.count) if i not in rows.bad]
        if not good:
            raise DataError(
                f"No readable {self.split} item is left to replace the bad ones with:\n"
                + self._bad_list()
            )
        return [
            item if place is None else good[place % len(good)]
            for item, place in zip(items, sources)
        ]

    def _count_bad(self, piece: Piece, rows: Rows) -> None:
        """Remember bad items; end the run when they are not wanted, or too many."""
        if self._on_bad_sample == "raise":
            raise DataError(
                f"{next(iter(rows.bad.values()))} Set data.init_args.on_bad_sample: replace to "
                "train on the next good sample instead."
            )
        new = {(piece.block, piece.start + i): why for i, why in rows.bad.items()}
        new = {place: why for place, why in new.items() if place not in self.tally.bad}
        self.tally.bad.update(new)
        if new:
            _log.warning(
                "%d bad %s item(s) replaced (%d so far): %s",
                len(new), self.split, len(self.tally.bad), next(iter(new.values())),
            )  # fmt: skip
        if len(self.tally.bad) > self.loading.max_bad_fraction * self._num_items:
            raise DataError(
                f"{len(self.tally.bad)} of {self._num_items} {self.split} items of this process "
                f"are bad, more than data.init_args.loading.max_bad_fraction="
                f"{self.loading.max_bad_fraction:g} allows:\n{self._bad_list()}"
            )

    def _bad_list(self) -> str:
        reasons: dict[str, int] = {}
        for why in self.tally.bad.values():
            reasons[why] = reasons.get(why, 0) + 1
        return "\n".join(f"  {count} item(s): {why}" for why, count in reasons.items())

    def _log_reads(self, epoch: int, before: _Tally) -> None:
        decoded = self.tally.bytes_decoded - before.bytes_decoded
        needed = self.tally.bytes_needed - before.bytes_needed
        _log.info(
            "%s epoch %d: %d blocks decoded, %.1f MB for %.1f MB needed (read amplification %.2f)",
            self.split, epoch, self.tally.blocks - before.blocks,
            decoded / 1e6, needed / 1e6, decoded / max(1, needed),
        )  # fmt: skip


def _assemble(items: list[tuple[Batch, int]], pin: bool) -> Batch:
    """Write the rows of a batch into one new tensor per key."""
    first = items[0][0]
    blocks = {id(data): data for data, _ in items}.values()
    if any(data.keys() != first.keys() or _shapes(data) != _shapes(first) for data in blocks):
        return collate([{k: v[i] for k, v in data.items()} for data, i in items])
    batch: Batch = {}
    for name, example in first.items():
        if isinstance(example, Tensor):
            shape = (len(items), *example.shape[1:])
            out = (
                torch.empty(shape, dtype=example.dtype, pin_memory=True)
                if pin
                else empty(shape, example.dtype)
            )
            for target, (data, i) in zip(out.unbind(), items):
                target.copy_(data[name][i])
            batch[name] = out
        elif isinstance(example, np.ndarray):
            batch[name] = torch.from_numpy(np.stack([data[name][i] for data, i in items]))
        else:
            batch[name] = [data[name][i] for data, i in items]
    return batch


def _shapes(data: Batch) -> dict[str, tuple[int, ...]]:
    """Shapes per item of everything that is stacked."""
    return {k: tuple(v.shape[1:]) for k, v in data.items() if not isinstance(v, list)}
