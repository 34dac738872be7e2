"""One side of a comparison in a process of its own, so that its time and memory are its own."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["Side", "pss_mb", "spent"]

ROLLUP = "/proc/{}/smaps_rollup"  # Linux only


def pss_mb(pid: int | str = "self") -> float:
    """Return the proportional set size: shared pages count once over all processes."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(ROLLUP.format(pid)).read_text(), re.M)
    assert found is not None
    return int(found.group(1)) / 1024


class Side:
    """A process that builds something once and runs it whenever it is called.

    Args:
        make: Picklable; returns what is run.
        preload: Modules that all sides share, imported once.
    """

    def __init__(self, make: Callable[[], Callable[[], Any]], preload: Sequence[str] = ()) -> None:
        if "forkserver" in multiprocessing.get_all_start_methods():
            context: Any = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(preload))
        else:
            context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, other))
        self._process.start()
        other.close()
        self._ask("ready")

    def __call__(self) -> float:
        """Run once; return the seconds."""
        return self._ask("run")

    @property
    def memory_mb(self) -> float:
        """PSS of the process and of those that it has started."""
        return self._ask("memory")

    def close(self) -> None:
        """End the process."""
        self._pipe.send("end")
        self._process.join()

    def _ask(self, word: str) -> float:
        self._pipe.send(word)
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return float(answer)


def _serve(make: Callable[[], Callable[[], Any]], pipe: Connection) -> None:
    run: Callable[[], Any] | None = None
    while (word := pipe.recv()) != "end":
        start = time.perf_counter()
        try:
            if run is None:
                run = make()
            elif word == "run":
                run()
        except BaseException as error:
            pipe.send(f"{type(error).__name__}: {error}")
            raise
        if word != "memory":
            pipe.send(time.perf_counter() - start)
            continue
        pids = [child.pid for child in multiprocessing.active_children()]
        pipe.send(pss_mb() + sum(pss_mb(pid) for pid in pids if pid is not None))


def spent(work: Callable[[Any], Any], item: Any) -> tuple[int, float]:
    """Do a piece; return the process and the processor time that it took since its start."""
    work(item)
    return os.getpid(), time.process_time()
