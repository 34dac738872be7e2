"""Work in pieces on a dask.distributed cluster, or on one that is started here.

    for key, result in on_cluster(work, keys, "tcp://10.0.0.7:8786"):   # in the order of `keys`
        ...

The work is sent to every worker once, pieces one by one, a few ahead. A worker does one piece at a
time, in the folder of the command. Schedulers and workers log names, arguments and errors of tasks,
on machines of others: so tasks are numbers, what is sent does not show what it holds, errors come
back as results, and warnings are given here, not there.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import threading
import time
import traceback
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from domainssl.errors import ConfigError, DataError, require

__all__ = ["LOCAL", "check_address", "on_cluster"]

_log = logging.getLogger(__name__)
LOCAL = "local"
_AHEAD = 2  # pieces under way per worker
_CONNECT_S = 20.0  # until the scheduler answers
_LOOK_S = 2.0  # between two looks at whether there are workers
_PATIENCE_S = 120.0  # without any worker
_MOST_ABSENT = 3  # times that a piece meets a worker without the work: they start again and again
T = TypeVar("T")
R = TypeVar("R")


def check_address(address: str) -> None:
    """Check that this is `local` or the address of a scheduler.

    Raises:
        ConfigError: It is something else.
    """
    if address != LOCAL and not re.fullmatch(r"(tcp|tls|ws|wss)://[^\s/:]+:\d{1,5}/?", address):
        raise ConfigError(
            f"scheduler: got {address!r}, expected {LOCAL}, or the address that `dask scheduler` "
            "prints, such as tcp://10.0.0.7:8786."
        )


def on_cluster(
    work: Callable[[T], R], items: Sequence[T], address: str, jobs: int | None
) -> Generator[tuple[T, R], None, None]:
    """Yield every item with its result, in the order of the items.

    Args:
        work: Picklable; its errors end the generator.
        items: What is worked on.
        address: Of a scheduler, or `local`.
        jobs: Workers to start where it is `local`.

    Raises:
        ConfigError: No scheduler answers at the address, or its workers differ from this process.
        DataError: The cluster was lost, or workers died of a piece.
    """
    with _client(address, jobs or 1) as client:
        cluster = _Cluster(client, address, _Sealed((work, os.getcwd())))
        try:
            cluster.begin()
            yield from cluster.results(items)
        finally:
            cluster.end()


@contextmanager
def _client(address: str, jobs: int) -> Iterator[Any]:
    """Connect to a scheduler; start one, where it is `local`, and end it."""
    distributed = require("distributed", "scale")
    if address == LOCAL:
        with (
            distributed.LocalCluster(
                n_workers=jobs,
                threads_per_worker=1,
                memory_limit=0,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.ERROR,
            ) as started,
            distributed.Client(started, set_as_default=False) as client,
        ):
            yield client
        return
    try:
        client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--scheduler {address}: no dask scheduler answers there within {_CONNECT_S:.0f} s "
            f"({_words(error)}). Start one with `dask scheduler`, or take `--scheduler {LOCAL}`."
        ) from error
    with client:
        yield client


class _Sealed:
    """A pickled object that shows nothing of what it holds."""

    def __init__(self, content: Any) -> None:
        self._content = pickle.dumps(content)

    def __repr__(self) -> str:
        return "(sealed)"

    def open(self) -> Any:
        """Return what was sealed."""
        return pickle.loads(self._content)


@dataclass
class _Asked:
    """A piece that was handed out."""

    item: Any
    number: int
    future: Any
    absent: int = 0


class _Cluster:
    """The work at the workers, and the pieces that are under way."""

    def __init__(self, client: Any, address: str, work: _Sealed) -> None:
        self._client, self._address, self._work = client, address, work
        self._token = uuid.uuid4().hex
        self._times = 0  # tasks so far: a name is never used twice
        self._waiting: deque[_Asked] = deque()

    def begin(self) -> None:
        """Send the work to the workers that are there; wait for the first of them.

        Raises:
            ConfigError: None comes, or they differ from this process.
        """
        try:
            self._client.wait_for_workers(1, timeout=_PATIENCE_S)
        except TimeoutError as error:
            raise ConfigError(
                f"--scheduler {self._address}: it has no workers, and none came within "
                f"{_PATIENCE_S:.0f} s. Start some with `dask worker {self._address} "
                "--nthreads 1 --nworkers auto`."
            ) from error
        self._send()
        several = sum(threads > 1 for threads in self._client.nthreads().values())
        if several:
            _log.warning(
                "%d workers at %s have several threads; a worker does one piece at a time. Start "
                "them with --nthreads 1 --nworkers auto to use all cores.",
                several,
                self._address,
            )

    def end(self) -> None:
        """Take back what was not done, and the work from all workers."""
        with suppress(OSError, RuntimeError, TimeoutError, CancelledError):
            self._client.cancel([asked.future for asked in self._waiting])
            if self._client.status == "running":
                self._client.run(_forget, self._token, on_error="ignore")

    def results(self, items: Sequence[T]) -> Iterator[tuple[T, Any]]:
        """Yield items and results in order."""
        ahead = deque(enumerate(items))
        while ahead or self._waiting:
            most = _AHEAD * max(1, len(self._nthreads()))
            while ahead and len(self._waiting) < most:
                number, item = ahead.popleft()
                self._waiting.append(_Asked(item, number, self._submit(number, item)))
            asked = self._waiting[0]
            result = self._result(asked)
            self._waiting.popleft()
            yield asked.item, result

    def _submit(self, number: int, item: Any) -> Any:
        self._times += 1
        key = f"piece-{number}-{self._token}-{self._times}"
        return self._client.submit(_call, self._token, _Sealed(item), key=key, pure=False)

    def _result(self, asked: _Asked) -> Any:
        """Return the result of a piece, or raise its error."""
        while True:
            kind, content = self._outcome(asked.future)
            if kind == "absent":  # a worker that came later
                asked.absent += 1
                if asked.absent > _MOST_ABSENT:
                    raise _deadly()
                self._send()
                asked.future = self._submit(asked.number, asked.item)
                continue
            value, said = content.open()
            said.repeat()
            if kind == "error":
                raise value
            return value

    def _outcome(self, future: Any) -> tuple[str, Any]:
        """Wait for a task.

        Raises:
            DataError: It killed its workers, or the cluster was lost.
        """
        distributed = require("distributed", "scale")
        alone_since: float | None = None
        while True:
            try:
                outcome: tuple[str, Any] = future.result(timeout=_LOOK_S)
                return outcome
            except TimeoutError:
                if self._nthreads():
                    alone_since = None
                    continue
                alone_since = alone_since or time.monotonic()
                if time.monotonic() - alone_since > _PATIENCE_S:
                    raise self._lost(f"no worker for {_PATIENCE_S:.0f} s") from None
            except distributed.KilledWorker as error:
                raise _deadly() from error
            except (CancelledError, OSError) as error:
                raise self._lost(_words(error)) from error

    def _nthreads(self) -> dict[str, int]:
        """Return the threads of every worker that is there now."""
        try:
            found: dict[str, int] = self._client.nthreads()
        except (OSError, RuntimeError) as error:
            raise self._lost(_words(error)) from error
        return found

    def _lost(self, why: str) -> DataError:
        return DataError(
            f"--scheduler {self._address}: the cluster was lost ({why}). What is done so far is "
            "kept: start it again and call the same."
        )

    def _send(self) -> None:
        """Send the work to all workers that are there.

        Raises:
            ConfigError: They have another version, or do not see the folder of the command.
        """
        folder = os.getcwd()
        try:
            said = self._client.run(_hold, self._token, self._work, folder)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"--scheduler {self._address}: its workers cannot import domainssl as it is here "
                f"({_words(error)}). Install the same version for them."
            ) from error
        except OSError as error:
            raise self._lost(_words(error)) from error
        own = _version()
        for worker, (version, sees_folder) in said.items():
            if version != own:
                raise ConfigError(
                    f"--scheduler {self._address}: worker {worker} has domainssl {version}, this "
                    f"process {own}. Install the same version for all, so that results are equal."
                )
            if not sees_folder:
                raise ConfigError(
                    f"--scheduler {self._address}: worker {worker} has no folder {folder}. Call "
                    "from a folder that all machines share, with data and output on it."
                )


def _deadly() -> DataError:
    return DataError(
        "Several workers died at or near the same piece, most likely for want of memory. What is "
        "done so far is kept: call the same again with workers that have more memory, or without "
        "--scheduler with --jobs 0, which shows a crash."
    )


# At the workers -------------------------------------------------------------------------------

_HELD: dict[str, tuple[_Sealed, list[Any]]] = {}  # work by token: sealed, and opened at first use
_ALONE = threading.Lock()


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("domainssl")
    except PackageNotFoundError:
        return "from its source"


def _hold(token: str, work: _Sealed, folder: str) -> tuple[str, bool]:
    """Keep the work; return the version of this worker, and whether it sees the folder."""
    _HELD[token] = (work, [])
    return _version(), os.path.isdir(folder)


def _forget(token: str) -> None:
    _HELD.pop(token, None)


def _call(token: str, item: _Sealed) -> tuple[str, Any]:
    """Do a piece; errors are results, since workers log the arguments of what fails."""
    with _ALONE:
        if token not in _HELD:
            return "absent", None
        sealed, opened = _HELD[token]
        said = _Said()
        try:
            with said.listening():
                if not opened:
                    opened.append(sealed.open())
                work, folder = opened[0]
                with chdir(folder):
                    value = work(item.open())
            return "result", _Sealed((value, said))
        except Exception as error:  # whatever it is, it is raised again by `_result`
            error.add_note("".join(traceback.format_tb(error.__traceback__)))
            try:
                return "error", _Sealed((error, said))
            except (pickle.PicklingError, AttributeError, TypeError):
                reason = RuntimeError(f"{type(error).__name__}: {error}")
                return "error", _Sealed((reason, said))


class _Said:
    """Log lines and warnings of a piece."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, int, str]] = []
        self._warned: list[tuple[str, type[Warning]]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what is said instead of giving it out."""
        root = logging.getLogger()
        before, root.handlers = root.handlers, [_Listener(self._lines)]
        try:
            with warnings.catch_warnings(record=True) as warned:
                yield
        finally:
            root.handlers = before
            self._warned += [(str(one.message), one.category) for one in warned]

    def repeat(self) -> None:
        """Give out what was said."""
        for name, level, text in self._lines:
            logging.getLogger(name).log(level, "%s", text)
        for text, category in self._warned:
            warnings.warn(text, category, stacklevel=2)


class _Listener(logging.Handler):
    def __init__(self, lines: list[tuple[str, int, str]]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._lines.append((record.name, record.levelno, record.getMessage()))


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
