"""What a stream needs around its worker processes: their memory, their failures, their ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait

from domainssl.errors import DataError, DomainSSLError

__all__ = ["DEAD_WORKER", "Failure", "SharedHeap", "dead_worker", "end_with_main_process"]

DEAD_WORKER = ("exited unexpectedly", "is killed by signal")
_LOOK_AGAIN_S = 1.0  # for the case that another process holds the pipe of the main one open


@dataclass(frozen=True)
class Failure:
    """An error of a worker on its way to the main process, which raises it as it is.

    torch would raise another one of that type, with the traceback of the worker as its text.
    """

    error: Exception

    @staticmethod
    def can_carry(error: Exception) -> bool:
        """Tell whether an error is the same one after pickling: ours, and those of the system."""
        return isinstance(error, DomainSSLError) or type(error).__module__ == "builtins"


class SharedHeap:
    """Keeps the garbage collector away from memory that forked workers share with this process.

    A full collection writes into the header of every object that was alive at the fork. Each
    process that does so gets its own copy of those pages, 110 MB of a usual run, at no fixed time.
    Objects are therefore frozen at the fork, as the documentation of `gc.freeze` advises, until
    the last workers have ended.
    """

    def __init__(self) -> None:
        self._count = 0  # of streams with forked workers
        self._is_ours = False

    @contextmanager
    def forking(self, method: str | None) -> Iterator[None]:
        """Start workers by a method; None is the platform's default."""
        is_forked = (method or multiprocessing.get_start_method()) == "fork"
        if is_forked:
            self._count += 1
            self._is_ours |= gc.get_freeze_count() == 0
            gc.collect()
            gc.freeze()
        try:
            yield
        except BaseException:
            self.ended(method)
            raise

    def ended(self, method: str | None) -> None:
        """Say that the workers of one stream have ended."""
        if (method or multiprocessing.get_start_method()) != "fork" or not self._count:
            return
        self._count -= 1
        if not self._count and self._is_ours:
            gc.unfreeze()
            self._is_ours = False


def dead_worker(error: BaseException, split: str | None = None) -> DataError | None:
    """Return what the death of a data worker means, None for an error of another kind.

    Under `fork` and `spawn` torch's handler of SIGCHLD raises it in whatever the main process
    happens to do, outside the stream as well.

    Args:
        error: What was raised.
        split: The data of the worker, where that is known.
    """
    if split is None and not any(text in str(error) for text in DEAD_WORKER):
        return None
    return DataError(
        f"A worker process of the {split + ' ' if split else ''}data died while reading ({error}). "
        "The usual reasons are too little memory or shared memory (/dev/shm) and a "
        "crash in a decoder. Lower data.init_args.loading.workers, prefetch or "
        "window_blocks; workers: 0 reads in the main process and shows the crash."
    )


def end_with_main_process(worker: int) -> None:
    """Watch the main process from a worker, and end as soon as it is gone.

    torch looks for its parent every five seconds while a worker has nothing to do; under
    `forkserver` that parent is another process.
    """
    main = multiprocessing.parent_process()
    if main is None:
        return
    parent, sentinel = os.getppid(), main.sentinel

    def watch() -> None:
        while not wait([sentinel], timeout=_LOOK_AGAIN_S) and os.getppid() == parent:
            pass
        os._exit(1)

    threading.Thread(target=watch, name="end-with-main-process", daemon=True).start()
