"""Embedded samples of one test session, kept for the next one of the same code.

Making all of them takes minutes; `make test-slow` after `make test` copies them instead.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path
from tempfile import gettempdir

from filelock import FileLock

from domainssl.matrix.runs import source_sha256

__all__ = ["keep", "kept_root", "restore"]

SAMPLES = (
    "bags-*", "change-*", "cohort-*", "crops-*", "cubes-*", "pastis-*", "relief-*",
    "slide-*", "so2sat-*", "ssl4eo-*", "terramesh-*", "tiles-*", "treesatai-ts-*", "volumes-*",
    "weather-*",
)  # fmt: skip
_OLD_S = 3600  # a session of other code may still read its own


def kept_root() -> Path:
    """Return the folder that keeps runs and samples of tests ($DOMAINSSL_TEST_RUNS)."""
    chosen = os.environ.get("DOMAINSSL_TEST_RUNS")
    return Path(chosen) if chosen else Path(gettempdir()) / "domainssl-test-runs"


def restore(cache: Path) -> None:
    """Copy the samples that an earlier session has made into an empty cache, once per session."""
    with FileLock(cache / ".restored.lock"):
        if not (cache / ".restored").exists():
            _copy(_folder(), cache)
            (cache / ".restored").touch()


def keep(cache: Path) -> None:
    """Copy the samples that this session has made to where the next one finds them."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(kept_root() / ".samples.lock"):
        for old in kept_root().glob("samples-*"):
            if old != folder and time.time() - old.stat().st_mtime > _OLD_S:
                shutil.rmtree(old, ignore_errors=True)
        _copy(cache, folder)


def _folder() -> Path:
    return kept_root() / f"samples-{source_sha256()[:16]}"


def _copy(start: Path, end: Path) -> None:
    """Copy the samples of a folder that another lacks; one carries its name when complete."""
    for sample in (path for pattern in SAMPLES for path in start.glob(pattern)):
        if not (end / sample.name).exists():
            part = end / f".{uuid.uuid4().hex}.part"
            shutil.copytree(sample, part)
            part.rename(end / sample.name)
