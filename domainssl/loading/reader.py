"""Pieces of a source in a given order, loaded ahead of whoever takes them.

reader = PieceReader(source, Loading(workers=2), "val")
for rows in reader.read(pieces):
...
reader.close()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from domainssl._torch import end_workers, has_ended_worker, has_workers
from domainssl.errors import DataError, DomainSSLError
from domainssl.loading.memory import KeptMemory, SharedPool
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading, Rows, Source
from domainssl.loading.workers import (
    DEAD_WORKER,
    Failure,
    SharedHeap,
    dead_worker,
    end_with_main_process,
)

__all__ = ["PieceReader", "one_thread"]

_HEAP = SharedHeap()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the many small tensor operations of reading on the calling thread.

    Spread over threads they gain nothing, and lose ten times their cost as soon as other
    processes keep the cores busy, because every one of them waits for all threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Blocks(Dataset[Rows]):
    """The source as torch's DataLoader wants it; indices are (piece, epoch)."""

    def __init__(self, source: Source, pool: KeptMemory | SharedPool) -> None:
        self.source = source
        self.pool = pool

    def __getitem__(self, task: tuple[Piece, int]) -> Any:
        piece, epoch = task
        try:
            with one_thread():
                with self.pool.serving():
                    rows = self.source.load(piece, epoch)
                return self.pool.pack(rows)
        except DataError as error:
            return Rows(data={}, count=len(piece), bad={i: str(error) for i in range(len(piece))})
        except (DomainSSLError, OSError) as error:
            if get_worker_info() is None or not Failure.can_carry(error):
                raise
            return Failure(error)


class _Tasks(Sampler[tuple[Piece, int]]):
    """The pieces of the coming iteration."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Piece, int]] = []

    def __iter__(self) -> Iterator[tuple[Piece, int]]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


def _as_it_is(rows: Any) -> Any:
    return rows


class PieceReader:
    """Loads pieces of a source in the order asked for; its workers live until it is closed.

    What it gives depends on source and pieces alone, never on the number of workers. A piece of
    which nothing can be read comes without data, and with the reason for each of its items.

    Args:
        source: Where blocks come from.
        loading: Processes and memory.
        split: Name for messages.

    Attributes:
        memory: Of this process, for what is made of the pieces.
    """

    def __init__(self, source: Source, loading: Loading, split: str) -> None:
        self.source = source
        self.loading = loading
        self.split = split
        self.memory = KeptMemory()  # also of pieces that are loaded in this process
        self._loader: DataLoader[Rows] | None = None
        self._pool: SharedPool | None = None
        self._is_forked = False  # workers are there
        self._tasks = _Tasks()

    def read(self, pieces: Sequence[Piece], epoch: int = 0) -> Iterator[Rows]:
        """Yield the pieces in order. Their memory is used again as soon as nobody holds the rows.

        Args:
            pieces: What is read.
            epoch: For what is drawn.
        """
        loader = self._open()
        self._tasks.tasks = [(piece, epoch) for piece in pieces]
        iterator = self._start(loader)
        for _ in pieces:
            rows = next(iterator)
            if isinstance(rows, Failure):
                raise rows.error
            yield rows

    def close(self) -> None:
        """End the worker processes; an iterator in use cannot go on."""
        loader, self._loader = self._loader, None
        end_workers(loader)
        if self._is_forked:
            self._is_forked = False
            _HEAP.ended(self.loading.start_method)
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self.memory.clear()

    def death(self, error: Exception) -> DataError | None:
        """Return what is said where `error` comes from the death of a worker; the others are ended.

        What is raised depends on where the death is noticed: by torch, or, before the process
        is gone for the system, by a pipe or a shared tensor that nobody serves any more.
        """
        if not has_workers(self._loader):
            return None
        try:
            is_dead = any(text in str(error) for text in DEAD_WORKER)
            if not is_dead and isinstance(error, OSError | EOFError):
                is_dead = has_ended_worker(self._loader, timeout_s=2.0)
        except RuntimeError:  # torch's handler of SIGCHLD, which also raises right here
            is_dead = True
        if not is_dead:
            return None
        with suppress(RuntimeError):
            self.close()
        return dead_worker(error, self.split)

    def _open(self) -> DataLoader[Rows]:
        """Return the loader of pieces."""
        if self._loader is None:
            workers = self.loading.workers or 0
            options: dict[str, Any] = {}
            if workers:
                self._pool = SharedPool(workers)
                options = {
                    "multiprocessing_context": self.loading.start_method,
                    "persistent_workers": True,
                    "prefetch_factor": self.loading.prefetch,
                    "worker_init_fn": end_with_main_process,
                }
            # A generator of its own: otherwise every new iterator would draw its base seed from
            # torch's global one, and a resumed run would differ from an uninterrupted one.
            self._loader = DataLoader(
                _Blocks(self.source, self._pool or self.memory),
                sampler=self._tasks,
                batch_size=None,
                num_workers=workers,
                collate_fn=_as_it_is,
                generator=torch.Generator().manual_seed(0),
                **options,
            )
        return self._loader

    def _start(self, loader: DataLoader[Rows]) -> Iterator[Any]:
        """Begin an iteration; the first one starts the workers."""
        if self._is_forked or not self.loading.workers:
            return iter(loader)
        with _HEAP.forking(self.loading.start_method):
            iterator = iter(loader)
        self._is_forked = True
        return iterator
