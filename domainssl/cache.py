"""The user's cache folder: things built once under a lock and used by every process."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from domainssl.errors import DataError
from domainssl.files import read_json, write_json

__all__ = ["CacheEntry", "cache_dir", "clear", "entries", "kept_folder", "locked_build"]

logger = logging.getLogger(__name__)

_MARK = ".domainssl.json"
_REMEDY = "Point the environment variable DOMAINSSL_CACHE at a folder you can write to."


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One finished build in the cache.

    Attributes:
        name: What was built.
        version: Of what built it.
        path: Its folder.
        size_mb: Size of its files.
        built_s: When it was finished, seconds since 1970.
    """

    name: str
    version: str
    path: Path
    size_mb: float
    built_s: float


def cache_dir() -> Path:
    """Return `$DOMAINSSL_CACHE`, or `~/.cache/domainssl` when it is not set. Creates nothing."""
    chosen = os.environ.get("DOMAINSSL_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "domainssl"


def locked_build(
    name: str,
    version: str,
    build: Callable[[Path], None],
    *,
    timeout_s: float = 900.0,
) -> Path:
    """Return the folder `<cache>/<name>-<version>`, building it once if it is not there.

    Any number of processes may ask at the same time: one builds while the others wait for its
    lock. The folder carries its name only when complete, so a build that was killed is never
    mistaken for a finished one.

    Args:
        name: What is built, letters, digits, `-` and `_`.
        version: Changes whenever the result of `build` changes.
        build: Fills the empty folder it is given.
        timeout_s: How long to wait for another process that builds the same.

    Raises:
        DataError: The cache folder cannot be written, is full, or the wait took too long.
    """
    label = f"{name}-{version}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
        raise DataError(f"cache entry {label!r}: use letters, digits, '.', '-' and '_' only")
    target = cache_dir() / label
    if (target / _MARK).is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{label}.lock", timeout=timeout_s):
            if not (target / _MARK).is_file():
                _build(target, label, build, name, version)
    except Timeout as error:
        raise DataError(
            f"cache {target}: another process has been building it for more than "
            f"{timeout_s:.0f} s. If no such process runs, delete {target.parent}/.{label}.lock"
        ) from error
    except (OSError, NotImplementedError) as error:  # the latter: no locks on this file system
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cache {target}: cannot be written ({reason}). {_REMEDY}") from error
    return target


def _build(
    target: Path, label: str, build: Callable[[Path], None], name: str, version: str
) -> None:
    for stale in target.parent.glob(f".{label}.*.part"):  # we hold the lock: nobody builds these
        shutil.rmtree(stale, ignore_errors=True)
    if target.exists():
        shutil.rmtree(target)
    part = target.parent / f".{label}.{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        build(part)
        mark = {"name": name, "version": version, "built": time.strftime("%Y-%m-%dT%H:%M:%S")}
        (part / _MARK).write_text(json.dumps(mark))
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    logger.debug("built cache entry %s", target)


def kept_folder(name: str, version: str, root: str | None = None) -> Path:
    """Return a folder that grows while it is used, making it if it is not there.

    In the cache it is called `<name>-<version>`, and `entries` and `clear` know it.

    Args:
        name: What it holds, letters, digits, `-` and `_`.
        version: Changes whenever what is put into it changes.
        root: A folder to make it in instead of the cache.

    Raises:
        DataError: It cannot be made.
    """
    target = (cache_dir() if root is None else Path(root).expanduser()) / f"{name}-{version}"
    if not (target / _MARK).is_file():
        try:
            target.mkdir(parents=True, exist_ok=True)
            write_json(target / _MARK, {"name": name, "version": version})
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"cache {target}: cannot be written ({reason}). {_REMEDY}") from error
    return target


def entries() -> list[CacheEntry]:
    """List what the cache holds, by name."""
    found = []
    for mark in sorted(cache_dir().glob(f"*/{_MARK}")):
        try:
            facts = read_json(mark)
            name, version = str(facts["name"]), str(facts["version"])
        except (DataError, KeyError, TypeError):  # damaged: still there to be listed and cleared
            name, version = mark.parent.name, "?"
        size = sum(f.stat().st_size for f in mark.parent.rglob("*") if f.is_file())
        built = mark.stat().st_mtime
        found.append(
            CacheEntry(
                name=name, version=version, path=mark.parent, size_mb=size / 1e6, built_s=built
            )
        )
    return found


def clear(name: str | None = None) -> list[Path]:
    """Delete finished builds, all or those called `name`, and return their folders.

    Only folders that `locked_build` finished are touched, whatever else lies in the cache; without
    a name also what killed builds have left.

    Args:
        name: Name of a build, with or without `-<version>`; None for all.

    Raises:
        DataError: A folder cannot be deleted.
    """
    removed = []
    try:
        for entry in entries():
            if name in (None, entry.name, entry.path.name):
                with FileLock(entry.path.parent / f".{entry.path.name}.lock"):
                    shutil.rmtree(entry.path)
                removed.append(entry.path)
        for part in sorted(cache_dir().glob(".*.part")) if name is None else ():
            label = part.name.rsplit(".", 2)[0]  # .<label>.<random>.part
            try:
                with FileLock(part.parent / f"{label}.lock", timeout=0):
                    shutil.rmtree(part)
                removed.append(part)
            except Timeout:
                logger.info("%s is being built; left alone", part)
    except OSError as error:
        raise DataError(
            f"cache {cache_dir()}: cannot be cleared ({error.strerror or error}): "
            f"{error.filename or ''}. Check who owns the folder."
        ) from error
    return removed
