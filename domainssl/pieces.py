"""Work in pieces: who does which, in which order results come back, and what survives a kill.

    with Ledger(path, request, restart=False) as ledger:        # claimed: one process at a time
        todo = keys[len(ledger.state["done"]):]
        for key, result in in_order(work, todo, jobs=4):         # results in the order of `todo`
            ...
            ledger.save(state, arrays)                          # complete or not there

A `Shard` is the i-th of n parts of the keys, for machines that share nothing but a folder. Neither
it nor the number of processes changes what is done, only who does it. `work_through` is the loop
that measuring and building share; `build` fills a cache whose entries are their own mark of being
done.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from domainssl.errors import ConfigError, DataError, unwritable
from domainssl.files import write_whole

__all__ = [
    "Buildable",
    "Built",
    "Ledger",
    "Pieces",
    "Plan",
    "Shard",
    "build",
    "cores",
    "in_order",
    "spread",
    "work_through",
]

logger = logging.getLogger(__name__)

_AHEAD = 2  # pieces under way per process
T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Return how many cores this process may use; where the system does not tell, all there are."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Return `limit` of the items, evenly spread over all; all if None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


@dataclass(frozen=True)
class Shard:
    """The `number`-th of `count` parts of some work, counted from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `2/8`.

        Raises:
            ConfigError: It is something else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise ConfigError(
                f"shard: got {text!r}, expected I/N with I from 1 to N, such as 1/4 to 4/4."
            )
        return cls(number, count)

    def __str__(self) -> str:
        """Return the form that `parse` reads."""
        return f"{self.number}/{self.count}"

    def mine(self, items: Sequence[T]) -> list[T]:
        """Return every `count`-th item, from the `number`-th on."""
        return list(items[self.number - 1 :: self.count])

    def all(self) -> list[Shard]:
        """Return the shards of the same work."""
        return [Shard(i, self.count) for i in range(1, self.count + 1)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How work in pieces is done.

    Attributes:
        jobs: Processes; 0 works in this one, None takes one per core.
        limit: Do so many pieces only, evenly spread over all.
        skip_bad: Leave out pieces that cannot be read, and list them; otherwise the first ends it.
        restart: Forget what an interrupted call has done.
        shard: The part of the pieces that this call does.
        scheduler: Address of a dask.distributed cluster that does them, or `local` for one that is
            started here with `jobs` workers; None does them in processes of this one.
    """

    jobs: int | None = None
    limit: int | None = None
    skip_bad: bool = False
    restart: bool = False
    shard: Shard = field(default_factory=Shard)
    scheduler: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("jobs", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: got {value!r}, expected at least {least}.")
        if self.scheduler is None:
            return
        from domainssl.cluster import LOCAL, check_address

        check_address(self.scheduler)
        if self.jobs and self.scheduler != LOCAL:
            raise ConfigError(
                f"jobs: got {self.jobs} with --scheduler {self.scheduler}, but a cluster has as "
                "many workers as were started for it. Leave out --jobs."
            )


def in_order(
    work: Callable[[T], R], items: Sequence[T], jobs: int | None, scheduler: str | None = None
) -> Generator[tuple[T, R], None, None]:
    """Yield every item with its result, in the order of the items.

    Args:
        work: Picklable where there are processes; its errors end the generator.
        items: What is worked on.
        jobs: Processes; 0 works in this one, None takes one per core.
        scheduler: See `Plan`.

    Raises:
        ConfigError: The cluster cannot be used.
        DataError: A process died, or the cluster was lost.
    """
    if scheduler is not None and items:
        from domainssl.cluster import on_cluster

        yield from on_cluster(work, items, scheduler, min(jobs or cores(), len(items)))
        return
    jobs = min(cores() if jobs is None else jobs, len(items))
    if jobs <= 1:
        for item in items:
            yield item, work(item)
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(work,))
    waiting: deque[tuple[T, Future[R]]] = deque()
    ahead = deque(items)
    try:
        while ahead or waiting:
            while ahead and len(waiting) < _AHEAD * jobs:
                waiting.append((ahead[0], pool.submit(_done, ahead.popleft())))
            item, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool as error:
                raise DataError(
                    f"A process died at or near {item}, most likely for want of memory. What is "
                    "done so far is kept: call the same again with fewer --jobs; 0 works in this "
                    "process and shows a crash."
                ) from error
            yield item, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class Pieces:
    """What `work_through` goes through.

    Attributes:
        todo: The pieces that are left, in order.
        total: All pieces of this call, those that are done included.
        name: What a piece is called in messages.
        noun: What pieces are, in plural.
    """

    todo: Sequence[Any]
    total: int
    name: Callable[[Any], str] = str
    noun: str = "blocks"


def work_through(
    pieces: Pieces,
    work: Callable[[Any], Any],
    plan: Plan,
    take: Callable[[Any, Any], None],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Do all pieces and hand every result on before the next one counts as done.

    Args:
        pieces: What is done.
        work: Picklable; returns the result of a piece, or as a text why it cannot be read.
        plan: Processes, and whether bad pieces are left out.
        take: Called in order with piece and result; when it returns, the piece is done.
        progress: Called with the pieces done and their number, first before the first piece.

    Raises:
        DataError: A piece cannot be read, or a process died.
    """
    done = pieces.total - len(pieces.todo)
    if progress is not None:
        progress(done, pieces.total)
    with closing(in_order(work, pieces.todo, plan.jobs, plan.scheduler)) as results:
        for piece, result in results:
            if isinstance(result, str) and not plan.skip_bad:
                raise DataError(
                    f"{result} Add --skip_bad to leave such {pieces.noun} out; the others done so "
                    "far are kept, and the same command goes on with this one."
                )
            if isinstance(result, str):
                logger.warning("%s is left out: %s", pieces.name(piece), result)
            take(piece, result)
            done += 1
            if progress is not None:
                progress(done, pieces.total)


class Buildable(Protocol):
    """Entries of a cache that can be made before they are used; pickled to processes."""

    @property
    def folder(self) -> Path:
        """Where the entries lie."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of the entries, which tell nothing about files or people."""

    def is_ready(self, key: str) -> bool:
        """Tell whether an entry is there and sound."""

    def make(self, key: str) -> None:
        """Make an entry, complete or not at all.

        Raises:
            DataError: What it is made from cannot be read.
            StorageError: It cannot be written.
        """


@dataclass
class Built:
    """What `build` did.

    Attributes:
        entries: Entries of this call that are there now.
        resumed: Those of them that were there before.
        skipped: Why an entry was left out, by its key.
        missing: Shards of which entries are missing.
    """

    entries: int = 0
    resumed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def build(
    what: Buildable,
    plan: Plan,
    progress: Callable[[int, int], None] | None = None,
    *,
    noun: str = "exams",
) -> Built:
    """Make the entries that are not there.

    An entry that is there is its own mark of being done, so that a call that was killed goes on,
    and shards need nothing but the folder.

    Raises:
        DataError: Something cannot be read, or a process died.
        StorageError: An entry cannot be written.
        ConfigError: Another process builds the same part.
    """
    keys = spread(what.keys, plan.limit)
    own = plan.shard.mine(keys)
    name = (
        ".build" if plan.shard.count == 1 else f".build-{plan.shard.number}-of-{plan.shard.count}"
    )
    with Ledger(what.folder / name, {}, other="--shard"):
        todo = [key for key in own if not what.is_ready(key)]
        found = Built(resumed=len(own) - len(todo))

        def take(key: str, reason: str | None) -> None:
            if reason is not None:
                found.skipped[key] = reason

        pieces = Pieces(todo, len(own), noun=noun)
        work_through(pieces, partial(_make, what), plan, take, progress)
    found.entries = len(own) - len(found.skipped)
    for shard in plan.shard.all():
        if shard != plan.shard and not all(map(what.is_ready, shard.mine(keys))):
            found.missing.append(str(shard))
    return found


def _make(what: Buildable, key: str) -> str | None:
    """Make an entry; return why it cannot be made."""
    try:
        what.make(key)
    except DataError as error:
        return str(error)
    return None


_AT_WORK: list[Callable[[Any], Any]] = []  # in a process of a pool: its work, sent to it once


def _begin(work: Callable[[Any], Any]) -> None:
    _follow_the_parent()
    _AT_WORK[:] = [work]


def _done(item: Any) -> Any:
    return _AT_WORK[0](item)


def _follow_the_parent() -> None:
    """Leave interrupts to the parent, and end when it is killed: nobody else would tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Ledger:
    """What is done so far, in a file that is replaced as a whole after every piece.

    As a context manager it claims the file: a second process that opens it is refused.

    Args:
        path: The file.
        request: Plain data that a file must have been made from to go on with it.
        restart: Forget what is there.
        other: Options that choose another file, for messages.

    Attributes:
        facts: Plain data last saved, None if nothing is.
        arrays: Arrays last saved, by name.

    Raises:
        ConfigError: The file is damaged, made from another request, or in use.
    """

    def __init__(
        self,
        path: Path,
        request: Mapping[str, Any],
        *,
        restart: bool = False,
        other: str = "--output or --shard",
    ) -> None:
        self.path, self.request, self._other = path, dict(request), other
        self.facts: dict[str, Any] | None = None
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._lock = FileLock(f"{path}.lock", timeout=0)
        self._restart = restart

    def __enter__(self) -> Ledger:
        """Claim the file and read it."""
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"{self.path}: another process is at work on it. Wait for its end, or choose "
                f"another {self._other}."
            ) from error
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            if not self._restart:
                self.load()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Give the file free."""
        with suppress(OSError):
            Path(self._lock.lock_file).unlink()
        self._lock.release()

    def load(self) -> bool:
        """Read the file; return False if there is none."""
        if not self.path.is_file():
            return False
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                content = json.loads(bytes(stored["facts"]))
                request, facts = content["request"], content["facts"]
                arrays = {name: stored[name] for name in stored.files if name != "facts"}
        except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(
                f"{self.path}: not a partial file of this version ({error}). Delete it, or add "
                "--restart."
            ) from error
        if request != self.request:
            differing = [k for k in self.request if request.get(k) != self.request[k]]
            raise ConfigError(
                f"{self.path}: an earlier call stopped here, but it worked on something else "
                f"({', '.join(differing)} differ). Call it as before to go on, choose another "
                "--output, or add --restart to forget it."
            )
        self.facts, self.arrays = facts, arrays
        return True

    def save(self, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Replace the file.

        Raises:
            StorageError: It cannot be written; the last state is still there.
        """
        text = json.dumps({"request": self.request, "facts": facts})
        content = io.BytesIO()
        np.savez(content, facts=np.frombuffer(text.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
        replace(self.path, content.getbuffer())
        self.facts, self.arrays = dict(facts), dict(arrays)


def replace(path: Path, content: bytes | memoryview) -> None:
    """Write a result completely or not at all.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise unwritable(path, error) from error
