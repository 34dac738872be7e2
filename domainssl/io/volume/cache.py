"""Prepared exams, made once and shared by all workers, ranks and runs that see the folder.

    cache = VolumeCache({"spacing_mm": [1.5, 1.5, 2.0], "version": 1}, tier="memmap")
    key = cache.key(identity_of(exam.scans))
    stored = cache.fetch(key, lambda: prepare(exam))        # from disk, or prepared now
    stored.crop((0, 0, 0), (96, 96, 32))

An entry is named by a hash of its files (place, size, time of change; or their content) and of the
preparation, so a changed file or option never meets an old entry. It gets its name when all of it
is on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout

from domainssl.arguments import plain
from domainssl.cache import kept_folder
from domainssl.errors import ConfigError, DataError, StorageError, nearest
from domainssl.files import PART, open_regular
from domainssl.io.volume.prepared import Prepared
from domainssl.io.volume.stores import FORMAT, TIERS, Stored, Tier, forget, write_entry

__all__ = ["Exams", "VolumeCache", "identity_of"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_WAIT_S = 3600.0  # for another process that prepares the same exam
_PIECE = 2**22
_DIGITS = 32  # of a key: 128 bit


def identity_of(paths: Mapping[str, str], *, content: bool = False) -> dict[str, Any]:
    """Return plain data that change whenever one of the files does.

    Args:
        paths: File or folder (a DICOM series) by modality or purpose; empty ones are left out.
        content: Hash the content instead of place, size and time of change: equal over copies of
            the data, and as slow as reading them.

    Raises:
        DataError: A file cannot be read.
    """
    out = {}
    for name, path in sorted(paths.items()):
        if path:
            try:
                out[name] = _content(path) if content else _places(path)
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return out


def _files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    found = [os.path.join(f, n) for f, _, names in os.walk(path) for n in names]
    return sorted(found)


def _places(path: str) -> list[list[Any]]:
    rows = []
    for file in _files(path):
        facts = os.stat(file)
        rows.append([os.path.abspath(file), facts.st_size, facts.st_mtime_ns])
    return rows


def _content(path: str) -> list[str]:
    found = [_digest(*place) for place in _places(path)]
    return sorted(found)  # names do not count


@lru_cache(2**16)
def _digest(path: str, size: int, changed_ns: int) -> str:
    """Hash a file; size and time of change only say when it has to be read again."""
    found = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def _hash(value: object) -> str:
    text = json.dumps(plain(value), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


@dataclass(frozen=True)
class VolumeCache:
    """The entries of one preparation in one form. It holds no handle: pickle and fork it freely.

    Attributes:
        transform: The preparation as plain data, with a version that changes whenever its result
            does. Only its hash is written.
        tier: `memmap` for speed, `zarr` for space.
        root: Folder of the entries; `<cache>/volumes-<hash>-<tier>` by default.
    """

    transform: Mapping[str, Any]
    tier: Tier = "memmap"
    root: str | None = None
    _checked: dict[str, Stored] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise ConfigError(
                f"tier of the cache: got {self.tier!r}, expected one of {', '.join(TIERS)}."
                f"{nearest(self.tier, TIERS)}"
            )

    @cached_property
    def label(self) -> str:
        """Hash of preparation and version of the format, which every entry states."""
        return _hash([FORMAT, dict(self.transform)])

    @cached_property
    def folder(self) -> Path:
        """Folder of the entries, made on first use.

        Raises:
            DataError: It cannot be made.
        """
        return kept_folder("volumes", f"{self.label[:12]}-{self.tier}", self.root)

    def key(self, identity: object) -> str:
        """Return the name of the entry of an exam with this identity, 32 hexadecimal digits."""
        return _hash([self.label, identity])

    def path(self, key: str) -> Path:
        """Return the folder of an entry, there or not."""
        return self.folder / key[:2] / key

    def is_ready(self, key: str) -> bool:
        """Tell whether an entry is there and sound; a damaged one is reported and not ready."""
        return self._find(key) is not None

    def open(self, key: str) -> Stored:
        """Open an entry.

        Raises:
            DataError: There is none, or it is damaged.
        """
        if key in self._checked:
            return self._checked[key]
        try:
            found = Stored.open(self.path(key), self._tag(key))
        except FileNotFoundError:
            raise DataError(
                f"cache {self.folder}: no prepared exam {key}. Prepare the exams first: "
                "python -m domainssl cache build --config RECIPE."
            ) from None
        self._checked[key] = found
        return found

    def fetch(
        self,
        key: str,
        prepare: Callable[[], Prepared],
        current: Callable[[], str] | None = None,
    ) -> Stored:
        """Open an entry, preparing the exam first if there is none or a damaged one.

        Of several processes that ask at the same time one prepares and the others wait.

        Args:
            key: Name of the entry.
            prepare: Reads the exam.
            current: Takes the key of the files anew after reading them, to notice files that are
                still being written.

        Raises:
            DataError: `prepare` cannot read the exam, or its files changed in the meantime.
            StorageError: The cache cannot be written or is full.
        """
        found = self._find(key)
        if found is not None:
            return found
        with self._lock(key):
            found = self._find(key)
            if found is not None:
                return found
            exam = prepare()
            if current is not None and current() != key:
                raise DataError(
                    f"exam {key}: its files changed while they were read. Start again when the "
                    "copy or download is complete."
                )
            with _writing(self.folder, exam.num_bytes, self.tier):
                self._write(key, exam)
        return self.open(key)

    def _tag(self, key: str) -> str:
        return f"{self.label} {key}"

    def _find(self, key: str) -> Stored | None:
        try:
            return self.open(key)
        except DataError as error:
            if self.path(key).exists():
                _log.warning("%s The exam is prepared anew.", error)
            return None

    def _write(self, key: str, exam: Prepared) -> None:
        """Write an entry under a temporary name and rename it, replacing a damaged one."""
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f".{key}{PART}*"):  # we hold the lock: nobody writes these
            shutil.rmtree(stale, ignore_errors=True)
        part = target.with_name(f".{key}{PART}{uuid.uuid4().hex}")
        part.mkdir()
        try:
            write_entry(part, exam, self._tag(key), self.tier)
            if target.exists():  # damaged, or written by a machine that does not share our locks
                shutil.rmtree(target, ignore_errors=True)
            try:
                part.rename(target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                shutil.rmtree(part)  # another machine was faster; its entry is checked on opening
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        forget()

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Hold an exam; where the file system has no locks, renaming alone keeps entries whole."""
        folder = self.folder / ".locks"
        lock = FileLock(folder / key, timeout=_WAIT_S)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise DataError(
                f"cache {self.folder}: another process has been preparing the exam {key} for more "
                f"than {_WAIT_S / 60:.0f} minutes. If none runs, delete {folder / key}."
            ) from error
        except NotImplementedError:
            yield
            return
        except OSError as error:
            raise _unwritable(self.folder, error, 0, self.tier) from error
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / key).unlink()
            lock.release()


@dataclass(frozen=True)
class Exams(Generic[T]):
    """Exams that can be prepared before a run, as `domainssl.pieces.build` takes them.

    Attributes:
        cache: Where they go.
        exams: What is prepared, by key.
        prepare: Reads one; picklable.
        current: Takes the key of an exam anew, to notice files that are still being written.
    """

    cache: VolumeCache
    exams: Mapping[str, T]
    prepare: Callable[[T], Prepared]
    current: Callable[[T], str] | None = None

    @property
    def folder(self) -> Path:
        """Where the entries lie."""
        return self.cache.folder

    @property
    def keys(self) -> list[str]:
        """Names of the entries, sorted: which shard has which does not depend on file names."""
        return sorted(self.exams)

    def is_ready(self, key: str) -> bool:
        """Tell whether an entry is there and sound."""
        return self.cache.is_ready(key)

    def make(self, key: str) -> None:
        """Prepare one exam, if it is not there."""
        self.fetch(self.exams[key], key)

    def fetch(self, exam: T, key: str) -> Stored:
        """Open an exam, preparing it first if it is not there."""
        current = None if self.current is None else partial(self.current, exam)
        return self.cache.fetch(key, partial(self.prepare, exam), current)


@contextmanager
def _writing(folder: Path, num_bytes: int, tier: Tier) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error, num_bytes, tier) from error


def _unwritable(folder: Path, error: OSError, num_bytes: int, tier: Tier) -> StorageError:
    free = ""
    with suppress(OSError):
        free = f"; {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there"
    need = f", the exam has {num_bytes / 1e6:,.0f} MB unpacked" if num_bytes else ""
    smaller = "" if tier == "zarr" else " or the tier zarr, which takes less space,"
    return StorageError(
        f"cache {folder}: cannot be written ({error.strerror or error}{free}{need}). What is "
        "prepared so far is kept. Make room (`cache list`, `cache clear`), choose another folder"
        f"{smaller} or point DOMAINSSL_CACHE at another disk; the same command goes on from there."
    )
