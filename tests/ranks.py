"""Run functions on several gloo ranks and return what each of them returned.

The ranks are started once per test process and receive one job after another: starting them costs
more than most jobs. A job that fails or hangs ends them; the next one starts new ones.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import ledger
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["RankError", "close_ranks", "run_ranks"]

HANG_S = 600.0  # ends a job that waits for ever, on a busy machine too
MEET_S = 60.0  # from the time all ranks run until they have formed their group


class RankError(RuntimeError):
    """A job failed; the message holds the traceback of the rank that failed first."""


def _serve(rank: int, world: int, folder: str, jobs: Connection) -> None:
    """Join the group, then answer jobs until the other end is closed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    output = os.open(f"{folder}/output_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    jobs.send((None, 0.0))  # it runs
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
        timeout=timedelta(seconds=2 * HANG_S),
    )  # fmt: skip
    jobs.send((None, 0.0))  # all have met
    booked = 0.0
    while True:
        try:
            function, args = jobs.recv()
        except (EOFError, OSError):  # the test process has ended
            break
        error = None
        try:
            torch.manual_seed(0)
            torch.save(function(*args), f"{folder}/result_{rank}.pt")
        except BaseException:
            error = traceback.format_exc()
        spent = sum(os.times()[:4])
        jobs.send((error, spent - booked))
        booked = spent
    dist.destroy_process_group()


class _Ranks:
    """Processes that form one gloo group."""

    def __init__(self, world: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        context = mp.get_context("spawn")
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, self.folder.name, theirs))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def meet(self) -> None:
        """Wait until all ranks have formed their group."""
        self.wait_for_all(HANG_S)
        self.wait_for_all(MEET_S)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        self.wait_for_all(HANG_S)
        paths = [Path(self.folder.name, f"result_{rank}.pt") for rank in range(len(self.pipes))]
        return [torch.load(path, weights_only=True) for path in paths]

    def wait_for_all(self, seconds: float) -> None:
        """Wait for an answer of every rank; the first that fails or ends raises."""
        waiting = dict(enumerate(self.pipes))
        while waiting:
            answered = wait(list(waiting.values()), seconds)
            if not answered:
                raise RankError(f"ranks {[*waiting]} did not answer in {seconds} s{self.output()}")
            for rank in [rank for rank, pipe in waiting.items() if pipe in answered]:
                try:
                    error, spent = waiting.pop(rank).recv()
                except (EOFError, OSError):
                    self.processes[rank].join()
                    status = self.processes[rank].exitcode
                    raise RankError(f"rank {rank} ended with {status}{self.output()}") from None
                ledger.add(spent)
                if error:
                    raise RankError(f"rank {rank} failed:\n{error}{self.output()}")

    def output(self) -> str:
        """The last lines that every rank has printed."""
        found = sorted(Path(self.folder.name).glob("output_*.txt"))
        return "".join(f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in found)

    def close(self, kill: bool = False) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            if kill:
                process.kill()
            process.join()
        self.folder.cleanup()


_running: dict[int, _Ranks] = {}
_not_started: list[str] = []  # why ranks could not be started


def run_ranks(function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo group.

    Args:
        function: Importable function; it returns plain data and tensors.
        args: Picklable arguments, the same for all ranks.
        world: Number of processes.

    Returns:
        The results in rank order.

    Raises:
        RankError: A rank raised, ended or did not answer.
    """
    if _not_started:
        raise RankError(f"earlier in this session ranks could not be started: {_not_started[0]}")
    try:
        if world not in _running:
            _start(world)
        return _running[world].run(function, args)
    except BaseException:  # the ranks may wait for each other
        if world in _running:
            _running.pop(world).close(kill=True)
        raise


def _start(world: int) -> None:
    try:
        _running[world] = _Ranks(world)
        _running[world].meet()
    except (OSError, RankError) as error:
        _not_started.append(str(error))
        raise


def close_ranks() -> None:
    """End all ranks."""
    while _running:
        _running.popitem()[1].close()
