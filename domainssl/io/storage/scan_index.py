"""What opening files found, kept in the cache and looked up as long as no file has changed.

    index = ScanIndex("cubes", {"root": root, "bands": bands})
    index.fill({key: path}, look)       # opens what is new or changed, in processes where it pays
    index.get(key)                      # (shape, own) of each

A row says what one file or store holds: `shape`, a text that most rows share, and `own`, one of its
own. It counts as long as size and times of change of every file that was looked at are the same;
the row of a Zarr store rests on its metadata files, folders and coordinates. An index is one file
in `<cache>/scans-1`, JSON in two lines, replaced as a whole. The first process that finds something
missing opens it while the others wait for the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from domainssl.cache import kept_folder
from domainssl.errors import DataError
from domainssl.files import open_regular, write_whole
from domainssl.io.storage.handles import HandlePool
from domainssl.io.storage.paths import is_settled, stamp
from domainssl.pieces import cores, in_order

__all__ = ["Rest", "ScanIndex", "Seen"]

_log = logging.getLogger(__name__)
_VERSION = "1"  # of the file's form
_MOST_FILES, _MOST_BYTES = 256, 2**31  # of all indexes; the longest unused go first
_LARGEST = 2**29  # bytes of one
_TASK = 32  # files that a process opens at a time
_TRIED = 2  # tasks that this process does first, to see whether others pay
_PAYS_S = 20.0  # of work that is left: processes take seconds to start
_SLOW_S = 1e-3  # to check one row: a file system that is asked from many threads
_THREADS = 16
_TABLES = HandlePool(limit=16)

Rest = tuple[int, str]  # how many characters of the path's end are cut off, what takes their place


class Seen(NamedTuple):
    """What opening one file found.

    Attributes:
        shape: A text that most files of a data set share.
        own: A text of this one.
        rests: The files and folders that it rests on, those that are not there included.
    """

    shape: str
    own: str
    rests: tuple[Rest, ...]


class _Row(NamedTuple):
    """One line of the table; `rests` and `shape` are numbers of texts."""

    print: str
    rests: int
    shape: int
    own: str


class _Table:
    """Rows by key, and the texts that they share."""

    def __init__(self) -> None:
        self.rows: dict[str, _Row] = {}
        self.shapes: dict[str, int] = {}
        self.rests: dict[tuple[Rest, ...], int] = {}

    def add(self, key: str, mark: str, seen: Seen) -> None:
        """Take in what was found."""
        rests = self.rests.setdefault(seen.rests, len(self.rests))
        shape = self.shapes.setdefault(seen.shape, len(self.shapes))
        self.rows[key] = _Row(mark, rests, shape, seen.own)

    def body(self) -> bytes:
        """Return the rows and texts as JSON; texts that no row has any more are left out."""
        rests, shapes = list(self.rests), list(self.shapes)
        kept = _Table()
        for key, row in self.rows.items():
            kept.add(key, row.print, Seen(shapes[row.shape], row.own, rests[row.rests]))
        rows = [[key, *row] for key, row in kept.rows.items()]
        content = {"shapes": list(kept.shapes), "rests": list(kept.rests), "rows": rows}
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def of(cls, content: Any) -> _Table:
        """Return the table of a file.

        Raises:
            ValueError: It is none.
        """
        table = cls()
        table.shapes = {str(text): i for i, text in enumerate(content["shapes"])}
        table.rests = {
            tuple((int(cut), str(end)) for cut, end in rests): i
            for i, rests in enumerate(content["rests"])
        }
        for key, mark, rests, shape, own in content["rows"]:
            if not (0 <= rests < len(table.rests) and 0 <= shape < len(table.shapes)):
                raise ValueError(f"row {key!r:.80} has texts that are not there")
            table.rows[key] = _Row(mark, rests, shape, own)
        return table


class ScanIndex:
    """What opening the files of one kind found, under equal questions.

    Args:
        kind: What kind of files they are, letters.
        request: Plain data: where they lie and what is asked of them.
    """

    def __init__(self, kind: str, request: Mapping[str, Any]) -> None:
        text = json.dumps({"kind": kind, "code": _code(), **request}, sort_keys=True)
        self._request = json.loads(text)
        self._name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        self._current: dict[str, tuple[str, str]] = {}
        self.opened = 0  # files that had to be opened, over all calls

    def get(self, key: str) -> tuple[str, str] | None:
        """Return shape and own of a row that `fill` has found or checked; else None."""
        return self._current.get(key)

    def fill(
        self,
        paths: Mapping[str, str],
        look: Callable[[Sequence[str]], list[Seen | None]],
        jobs: int | None = None,
    ) -> None:
        """Check the rows of files, and open those that are new or have changed.

        Args:
            paths: Local path of each key.
            look: Picklable; opens files by their keys, and returns None for what cannot be read
                or kept.
            jobs: Processes; 0 opens in this one, None takes one per core where it pays.
        """
        path = self._path()
        table = _Table() if path is None else self._load(path)
        missing = self._check(table, paths)
        if not missing:
            return
        with _alone(path):
            if path is not None and (newer := self._load(path)) is not table:
                table = newer
                missing = self._check(table, {key: paths[key] for key in missing})
            if missing:
                kept = self._open(missing, paths, look, jobs)
                if path is not None and (kept.rows or len(table.rows) > len(paths)):
                    self._save(path, table, kept, paths)

    def _open(
        self,
        missing: Sequence[str],
        paths: Mapping[str, str],
        look: Callable[[Sequence[str]], list[Seen | None]],
        jobs: int | None,
    ) -> _Table:
        """Open files; return the rows that may be kept."""
        tasks = [missing[i : i + _TASK] for i in range(0, len(missing), _TASK)]
        self.opened += len(missing)
        kept = _Table()
        began = time.time_ns()
        for keys, found in _looked_at(look, tasks, jobs):
            for key, seen in zip(keys, found, strict=True):
                if seen is None:
                    continue
                self._current[key] = seen.shape, seen.own
                mark, is_settled_ = _mark(paths[key], seen.rests, began)
                if is_settled_:
                    kept.add(key, mark, seen)
        return kept

    def _check(self, table: _Table, paths: Mapping[str, str]) -> list[str]:
        """Take over the rows that still hold; return the keys of all others."""
        rests, shapes = list(table.rests), list(table.shapes)
        now = time.time_ns()

        def holds(key: str) -> bool:
            row = table.rows.get(key)
            if row is None or _mark(paths[key], rests[row.rests], now)[0] != row.print:
                return False
            self._current[key] = shapes[row.shape], row.own
            return True

        keys = list(paths)
        first, rest = keys[:64], keys[64:]
        start = time.perf_counter()
        missing = [key for key in first if not holds(key)]
        if time.perf_counter() - start < _SLOW_S * len(first):
            return missing + [key for key in rest if not holds(key)]
        with ThreadPoolExecutor(_THREADS) as pool:
            return missing + [
                key for key, held in zip(rest, pool.map(holds, rest), strict=True) if not held
            ]

    # The file -------------------------------------------------------------------------------

    def _path(self) -> Path | None:
        try:
            return kept_folder("scans", _VERSION) / self._name
        except DataError as error:
            _log.warning("%s What files say is not kept and read again by every run.", error)
            return None

    def _load(self, path: Path) -> _Table:
        """Return the table of the file, an empty one where there is none of this version."""
        if not path.is_file():
            return _Table()
        table: _Table = _TABLES.get(stamp(path), lambda: self._read(path))
        return table

    def _read(self, path: Path) -> _Table:
        try:
            with open_regular(path) as file:
                head, _, body = file.read(_LARGEST).partition(b"\n")
            facts = json.loads(head)
            if facts["request"] != self._request:
                raise ValueError("it was made from other questions")
            if facts["sha256"] != hashlib.sha256(body).hexdigest():
                raise ValueError("its content does not have the checksum it states")
            with suppress(OSError):
                os.utime(path)  # used: the longest unused go first
            return _Table.of(json.loads(body))
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            _log.warning("%s: damaged (%s); built anew from the files", path, error)
            return _Table()

    def _save(self, path: Path, table: _Table, new: _Table, paths: Mapping[str, str]) -> None:
        """Replace the file by the rows of the files that are there now."""
        rests, shapes = list(table.rests), list(table.shapes)
        kept = _Table()
        for key in paths:
            row = table.rows.get(key)
            if row is not None and key in self._current and key not in new.rows:
                kept.add(key, row.print, Seen(shapes[row.shape], row.own, rests[row.rests]))
        rests, shapes = list(new.rests), list(new.shapes)
        for key, row in new.rows.items():
            kept.add(key, row.print, Seen(shapes[row.shape], row.own, rests[row.rests]))
        body = kept.body()
        head = {"request": self._request, "sha256": hashlib.sha256(body).hexdigest()}
        content = json.dumps(head).encode() + b"\n" + body
        try:
            if len(content) < _LARGEST:
                write_whole(path, content)
                _tidy(path)
        except OSError as error:
            _log.warning("%s: cannot be written (%s)", path, error.strerror or error)


def _looked_at(
    look: Callable[[Sequence[str]], list[Seen | None]],
    tasks: Sequence[Sequence[str]],
    jobs: int | None,
) -> Iterator[tuple[Sequence[str], list[Seen | None]]]:
    """Yield every task with what was found, in order; see `ScanIndex.fill`."""
    if jobs is None:
        first, tasks = tasks[:_TRIED], tasks[_TRIED:]
        start = time.perf_counter()
        results = list(in_order(look, first, 0))
        each = (time.perf_counter() - start) / len(first)
        yield from results
        jobs = cores() if each * len(tasks) > _PAYS_S else 0
    done = 0
    try:
        for result in in_order(look, tasks, jobs):
            yield result
            done += 1
    except DataError as error:  # looking raises none; scripts without a main guard end here
        _log.warning("%s Going on in this process.", error)
        yield from in_order(look, tasks[done:], 0)


def _mark(path: str, rests: Sequence[Rest], now_ns: int) -> tuple[str, bool]:
    """Return a digest of the states of files, and whether a later change would change it."""
    states: list[Any] = []
    is_sure = True
    for cut, end in rests:
        try:
            facts = os.stat(f"{path[: len(path) - cut]}{end}")
        except OSError as error:
            states.append(error.errno)
            continue
        states.append((facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
        is_sure = is_sure and is_settled(facts, now_ns)
    return hashlib.blake2b(repr(states).encode(), digest_size=12).hexdigest(), is_sure


@cache
def _code() -> str:
    """Return a hash of the code that opens files: another version asks them anew."""
    found = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted([*folder.rglob("*.py"), folder.parent / "sensors.py"]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """Hold the lock of an index; go on without where the file system has no locks."""
    if path is None:
        yield
        return
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        _log.info("%s: cannot be locked (%s); other processes open the same files", path, error)
    try:
        yield
    finally:
        lock.release()


def _tidy(newest: Path) -> None:
    """Delete the longest unused indexes beyond the limits."""
    there = []
    for path in newest.parent.glob("[!.]*.json"):
        with suppress(OSError):
            facts = path.stat()
            there.append((facts.st_mtime_ns, facts.st_size, path))
    there.sort(key=lambda each: (each[2] != newest, -each[0]))
    total = 0
    for number, (_, size, path) in enumerate(there):
        total += size
        if number >= _MOST_FILES or total > _MOST_BYTES:
            with suppress(OSError):
                path.unlink()
                path.with_name(f".{path.name}.lock").unlink()
