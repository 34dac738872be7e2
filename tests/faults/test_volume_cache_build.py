"""Preparing exams before a run: shards, kills, full disks; an entry is whole or not there."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from domainssl.errors import ConfigError, DataError, StorageError
from domainssl.files import PART
from domainssl.io.volume.cache import Exams, VolumeCache
from domainssl.io.volume.prepared import Prepared
from domainssl.pieces import Plan, Shard, build

TIERS = ("memmap", "zarr")
SIDE = 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepare(number: int, bad: int = -1, wait_s: float = 0.0) -> Prepared:
    if number == bad:
        raise DataError(f"exam{number}.nii: is cut off. Get it again.")
    time.sleep(wait_s)
    values = np.random.default_rng(number).integers(-1024, 3072, (1, SIDE, SIDE, SIDE), np.int16)
    return Prepared(values={"ct": values}, affine=np.eye(4))


def exams(tier: str = "memmap", count: int = 5, **options: float) -> Exams[int]:
    cache = VolumeCache({"version": 1}, tier)  # type: ignore[arg-type]
    return Exams(cache, {cache.key(i): i for i in range(count)}, partial(prepare, **options))  # type: ignore[arg-type]


def check(what: Exams[int]) -> None:
    """All exams are there, their values are right, and nothing else lies around."""
    for key, number in what.exams.items():
        found = VolumeCache({"version": 1}, what.cache.tier).open(key).whole()
        np.testing.assert_array_equal(found.values["ct"], prepare(number).values["ct"])
    left = [p for p in what.folder.rglob("*") if PART in p.name or p.suffix == ".lock"]
    assert left == [] and not list((what.folder / ".locks").iterdir())


@pytest.mark.parametrize("tier", TIERS)
def test_exams_are_prepared_in_processes_and_only_once(tier) -> None:
    steps: list[tuple[int, int]] = []
    found = build(exams(tier), Plan(jobs=2), lambda *done: steps.append(done))
    assert (found.entries, found.resumed, found.missing) == (5, 0, [])
    assert steps == [(i, 5) for i in range(6)]
    check(exams(tier))
    again = build(exams(tier, bad=0), Plan(jobs=0))  # nothing is read again
    assert (again.entries, again.resumed) == (5, 5)


def test_shards_share_the_work_and_say_what_is_missing() -> None:
    for number, missing in ((3, ["1/3", "2/3"]), (1, ["2/3"]), (2, [])):
        found = build(exams(), Plan(jobs=0, shard=Shard(number, 3)))
        assert found.missing == missing and found.resumed == 0
    check(exams())


def test_a_bad_exam_ends_the_call_or_is_left_out_and_named() -> None:
    with pytest.raises(DataError, match=r"exam3\.nii: is cut off.*--skip_bad.*such exams"):
        build(exams(bad=3), Plan(jobs=0))
    found = build(exams(bad=3), Plan(jobs=0, skip_bad=True))
    assert found.entries == 4 and list(found.skipped.values()) == [
        "exam3.nii: is cut off. Get it again."
    ]
    assert build(exams(), Plan(jobs=0)).resumed == 4
    check(exams())


def test_two_calls_for_one_shard_are_refused() -> None:
    def again(done: int, total: int) -> None:
        build(exams(), Plan(jobs=0))

    with pytest.raises(ConfigError, match=r"\.build: another process is at work.*--shard"):
        build(exams(), Plan(jobs=0), again)
    build(exams(), Plan(jobs=0))
    check(exams())


def test_a_damaged_entry_is_made_again() -> None:
    build(exams(), Plan(jobs=0))
    what = exams()
    os.truncate(what.cache.path(what.keys[2]) / "ct.values.npy", 200)
    assert build(exams(), Plan(jobs=0)).resumed == 4
    check(exams())


KILLED = """
import os, signal, sys
import psutil
from test_volume_cache_build import exams
from domainssl.pieces import Plan, build

def die(done, total):
    if done == 2:
        print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    build(exams(sys.argv[1], wait_s=0.05), Plan(jobs=2), die)
"""


@pytest.mark.parametrize("tier", TIERS)
def test_a_killed_call_leaves_no_process_and_goes_on(tier, tmp_path, repository) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    path = f"{repository}{os.pathsep}{Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, script, tier], capture_output=True, text=True, timeout=1200,
        env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    children = [psutil.Process(int(p)) for p in done.stdout.split() if psutil.pid_exists(int(p))]
    _, alive = psutil.wait_procs(children, timeout=600)
    assert not alive
    found = build(exams(tier), Plan(jobs=0))
    assert found.entries == 5 and found.resumed >= 2
    check(exams(tier))


def _end(status: int) -> None:
    os._exit(status)


@pytest.mark.parametrize("tier", TIERS)
def test_a_worker_killed_while_it_writes_leaves_nothing_to_read(tier, monkeypatch) -> None:
    what = exams(tier)
    key = what.keys[0]
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr("domainssl.io.volume.stores._to_disk", lambda path: _end(9))
        what.make(key)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not exams(tier).is_ready(key)
    left = [p for p in what.folder.rglob("*") if PART in p.name]
    assert len(left) == 1 and any(left[0].iterdir())
    build(exams(tier), Plan(jobs=0))
    check(exams(tier))


@pytest.mark.parametrize("tier", TIERS)
def test_a_disk_that_fills_is_said_with_its_reason_and_leaves_whole_entries(tier) -> None:
    what = exams(tier)
    pid = os.fork()
    if pid == 0:  # the limit holds for this process alone; a write beyond it fails in its middle
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            build(what, Plan(jobs=0, skip_bad=True))
        except StorageError as error:
            text = str(error)
            said = [word in text for word in ("File too large", "MB are free", "DOMAINSSL_CACHE")]
            said.append(("tier zarr" in text) == (tier == "memmap"))
            os._exit(7 if all(said) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert not any(exams(tier).is_ready(key) for key in what.keys)
    build(exams(tier), Plan(jobs=0))
    check(exams(tier))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_taken_for_a_bad_exam(error, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("domainssl.io.volume.cache.write_entry", refuse)
    with pytest.raises(StorageError, match=rf"{os.strerror(error)}; [\d,]+ MB are free there"):
        build(exams(), Plan(jobs=0, skip_bad=True))


def test_a_file_system_without_locks_still_has_whole_entries(monkeypatch) -> None:
    def refuse(self: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    what = exams()
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    what.make(what.keys[0])
    assert exams().is_ready(what.keys[0])
