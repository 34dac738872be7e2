"""What worker processes share with the main process, and how their errors arrive there."""

from __future__ import annotations

import errno
import gc
import os
import re
from pathlib import Path

import pytest
from stream_fakes import FailingSource, FakeSource, stream_of

from domainssl.errors import MissingExtraError, StorageError
from domainssl.loading import reader
from domainssl.loading.source import Loading
from domainssl.loading.workers import SharedHeap

FULL = "cache /c: cannot be written: No space left on device."


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
@pytest.mark.parametrize(
    "error",
    [
        StorageError(FULL),
        MissingExtraError("Install it with: pip install 'domainssl[medical]'"),
        OSError(errno.ENOSPC, "No space left on device", "/c/part"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_a_worker_arrives_as_it_was_raised(error, method):
    loading = Loading(workers=0 if method is None else 1, start_method=method)
    stream = stream_of(FailingSource((5, 5), error), loading=loading)
    with pytest.raises(type(error)) as found:
        next(iter(stream))
    stream.close()
    assert str(found.value) == str(error)
    assert vars(found.value) == vars(error)
    assert getattr(found.value, "errno", None) == getattr(error, "errno", None)


def test_an_error_that_nobody_foresaw_shows_where_the_worker_was():
    stream = stream_of(FailingSource((5,), KeyError("x")), loading=Loading(workers=1))
    # KeyError is of Python itself, but neither ours nor the system's
    with pytest.raises(KeyError, match="in load"):
        next(iter(stream))
    stream.close()


def anonymous_mb() -> float:
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Pss_Anon:\s+(\d+) kB", text, re.M)[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="PSS is Linux's")
def test_a_collection_of_garbage_copies_no_memory_that_workers_share():
    objects = [[number] for number in range(200_000)]  # 18 MB, half of it counts as ours
    stream = stream_of(FakeSource((7, 7)), loading=Loading(workers=1, start_method="fork"))
    next(iter(stream))
    before = anonymous_mb()
    gc.collect()
    grown = anonymous_mb() - before
    stream.close()
    assert len(objects) == 200_000 and grown < 4.0


def test_objects_are_frozen_only_while_there_are_forked_workers(monkeypatch):
    monkeypatch.setattr(reader, "_HEAP", SharedHeap())  # streams of other tests may still be open
    gc.unfreeze()
    streams = [stream_of(FakeSource((7, 7)), loading=Loading(workers=1)) for _ in range(2)]
    spawned = stream_of(FakeSource((7,)), loading=Loading(workers=1, start_method="spawn"))
    next(iter(spawned))
    assert gc.get_freeze_count() == 0
    for each in streams:
        list(each)
        list(each)
        assert gc.get_freeze_count() > 0
    streams[0].close()
    streams[0].close()
    assert gc.get_freeze_count() > 0
    streams[1].close()
    assert gc.get_freeze_count() == 0
    spawned.close()


def test_what_others_have_frozen_stays_so():
    gc.freeze()
    try:
        heap = SharedHeap()
        with heap.forking("fork"):
            pass
        heap.ended("fork")
        assert gc.get_freeze_count() > 0 and os.getpid()
    finally:
        gc.unfreeze()
