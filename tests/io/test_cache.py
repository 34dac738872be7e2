"""The cache builds once, under a lock, and never leaves half a build under a finished name."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from domainssl.cache import cache_dir, clear, entries, locked_build
from domainssl.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_lies_in_the_home_folder_unless_named(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    assert cache_dir() == own_cache
    monkeypatch.delenv("DOMAINSSL_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "domainssl"


def test_second_call_does_not_build_again() -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("done")

    first = locked_build("thing", "1", build)
    assert locked_build("thing", "1", build) == first == cache_dir() / "thing-1"
    assert len(calls) == 1 and (first / "file").read_text() == "done"
    assert calls[0] != first and not calls[0].exists()


def test_failed_build_leaves_nothing_and_can_be_repeated() -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        locked_build("thing", "1", fail)
    assert [p.name for p in cache_dir().iterdir() if p.is_dir()] == []
    assert locked_build("thing", "1", lambda folder: None).is_dir()


def test_unfinished_folder_of_that_name_is_built_anew(own_cache: Path) -> None:
    (own_cache / "thing-1").mkdir(parents=True)
    (own_cache / "thing-1" / "half").write_text("x")
    path = locked_build("thing", "1", lambda folder: None)
    assert not (path / "half").exists()


def _slow_build(folder: Path) -> None:
    with open(cache_dir() / "builds", "a") as file:
        file.write("x")
    (folder / "file").write_text("done")


def _ask(_: int) -> str:
    return (locked_build("thing", "1", _slow_build) / "file").read_text()


def test_processes_that_ask_together_build_once(own_cache: Path) -> None:
    own_cache.mkdir()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_ask, range(8)) == ["done"] * 8
    assert (own_cache / "builds").read_text() == "x"


def test_full_disk_is_an_error_that_names_the_variable() -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match=r"No space left on device.*DOMAINSSL_CACHE"):
        locked_build("thing", "1", fill)


def test_folder_that_cannot_be_made_is_an_error_that_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"cannot be written.*DOMAINSSL_CACHE"):
        locked_build("thing", "1", lambda folder: None)


def test_long_wait_for_a_lock_names_it(own_cache: Path) -> None:
    from filelock import FileLock

    own_cache.mkdir()
    with FileLock(own_cache / ".thing-1.lock"), pytest.raises(DataError, match=r"\.thing-1\.lock"):
        locked_build("thing", "1", lambda folder: None, timeout_s=0.1)


def test_listing_and_clearing_touch_finished_builds_only(own_cache: Path) -> None:
    for name in ("one", "two"):
        locked_build(name, "1", lambda folder: (folder / "f").write_bytes(bytes(2_000_000)))
    (own_cache / "mine").mkdir()
    assert [(e.name, e.version, round(e.size_mb)) for e in entries()] == [
        ("one", "1", 2),
        ("two", "1", 2),
    ]
    assert [p.name for p in clear("one")] == ["one-1"]
    assert [p.name for p in clear()] == ["two-1"]
    assert (own_cache / "mine").is_dir()


def test_names_that_would_leave_the_cache_are_refused() -> None:
    with pytest.raises(DataError, match="letters, digits"):
        locked_build("../thing", "1", lambda folder: None)
