"""A store behind a URL that times out, answers 503, or sends less than it was asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from ssl4eo_files import TRAIN, write_split

from domainssl.datamodules import SSL4EOS12DataModule
from domainssl.errors import ConfigError, DataError
from domainssl.io.ssl4eo.layout import scan
from domainssl.io.ssl4eo.read import read
from domainssl.io.storage import remote
from domainssl.io.storage.paths import (
    fetch_ranges,
    is_file,
    is_folder,
    list_folder,
    open_file,
    size_of,
)
from domainssl.io.storage.remote import Retry, StoreError
from domainssl.loading.source import Loading
from domainssl.sources.windows import Window

PAIR = {"s1": "S1GRD", "s2": "S2L2A"}
QUICK = {"retry": Retry(attempts=3, first_wait_s=0.0)}


class Unavailable(Exception):
    """What HTTP clients raise, with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class FlakyFileSystem(MemoryFileSystem):
    """Fails the first `fails` times that something is asked, then answers."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    cachable = False
    fault = "timeout"
    fails = 0
    asked: Counter[tuple[Any, ...]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = path.removeprefix("flaky://").rstrip("/")
        return path if path.startswith("/") or not path else "/" + path

    def _answer(self, question: tuple[Any, ...], answer: Any) -> Any:
        type(self).asked[question] += 1
        if type(self).asked[question] > self.fails:
            return answer()
        if self.fault == "short" and question[0] == "cat_file":
            return answer()[:-1]
        if self.fault in ("timeout", "short"):
            raise TimeoutError("timed out")
        if self.fault == "reset":
            raise ConnectionResetError("reset by peer")
        raise Unavailable(int(self.fault))

    def info(self, path: str, **kwargs: Any) -> Any:
        return self._answer(("info", path), lambda: super(FlakyFileSystem, self).info(path))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return self._answer(("ls", path), lambda: super(FlakyFileSystem, self).ls(path, detail))

    def isdir(self, path: str) -> bool:  # swallows every failure, as fsspec's own does
        try:
            return bool(self.info(path)["type"] == "directory")
        except Exception:
            return False

    def isfile(self, path: str) -> bool:
        try:
            return bool(self.info(path)["type"] == "file")
        except Exception:
            return False

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        whole = super().cat_file
        return bytes(self._answer(("cat_file", path, start, end), lambda: whole(path, start, end)))

    def cat_ranges(self, paths: Any, starts: Any, ends: Any, **kwargs: Any) -> list[Any]:
        answers: list[Any] = []
        for path, start, end in zip(paths, starts, ends, strict=True):
            try:
                answers.append(self.cat_file(path, start, end))
            except Exception as error:
                answers.append(error)
        return answers


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[FlakyFileSystem]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(FlakyFileSystem, "store", {})
    monkeypatch.setattr(FlakyFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(FlakyFileSystem, "asked", Counter())
    monkeypatch.setattr(FlakyFileSystem, "fails", 0)
    monkeypatch.setattr(FlakyFileSystem, "fault", "timeout")
    return FlakyFileSystem


def upload(folder: Path, name: str) -> str:
    fs = FlakyFileSystem()
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    FlakyFileSystem.asked.clear()
    return f"flaky://{name}"


@pytest.mark.parametrize("release", ["A", "B"])
@pytest.mark.parametrize("fault", ["timeout", "503", "reset", "short"])
def test_a_store_that_fails_twice_per_request_gives_what_the_disk_gives(
    flaky, tmp_path, release, fault
):
    write_split(tmp_path, "train", [[0, 1], [2, 3]], release)
    url = upload(tmp_path, f"{release}-{fault}")
    flaky.fault, flaky.fails = fault, 2
    there = scan(url, "train", PAIR, QUICK)
    here = scan(str(tmp_path), "train", PAIR)
    assert there.problems == () and [g.count for g in there.groups] == [
        g.count for g in here.groups
    ]
    for name in PAIR:
        ours, theirs = read(here.groups[0], name, [1, 3]), read(there.groups[0], name, [1, 3])
        np.testing.assert_array_equal(ours.values, theirs.values)
        assert ours.ids == theirs.ids
    assert max(flaky.asked.values()) >= 3


@pytest.mark.parametrize("fault", ["timeout", "503", "reset"])
def test_a_store_that_stays_away_ends_with_the_number_of_attempts(flaky, tmp_path, fault):
    write_split(tmp_path, "train", [[0, 1]], "B")
    url = upload(tmp_path, f"gone-{fault}")
    group = scan(url, "train", PAIR, QUICK).groups[0]
    flaky.asked.clear()
    flaky.fault, flaky.fails = fault, 10**6
    with pytest.raises(
        StoreError, match=r"shard_000001.tar: no answer in 3 attempts.*storage_options"
    ):
        read(group, "s2", [0])
    assert set(flaky.asked.values()) == {3}


def test_a_store_that_fails_is_not_taken_for_one_without_the_file(flaky, tmp_path):
    write_split(tmp_path, "train", [[0, 1]])
    url = upload(tmp_path, "there")
    file = f"{url}/train/S2L2A/ssl4eos12_train_seasonal_data_000001.zarr.zip"
    flaky.fails = 10**6
    for ask in (is_folder, is_file, size_of, list_folder, open_file):
        with pytest.raises(StoreError, match="no answer in 3 attempts"):
            ask(file, QUICK)
    flaky.fails = 0
    assert is_folder(url, QUICK) and is_file(file, QUICK)
    assert not is_folder(f"{url}/none", QUICK) and not is_file(f"{url}/none", QUICK)


def test_a_zip_whose_store_fails_is_not_called_damaged(flaky, tmp_path):
    write_split(tmp_path, "train", [[0, 1]])
    url = upload(tmp_path, "zips")
    group = scan(url, "train", PAIR, QUICK).groups[0]
    flaky.asked.clear()
    flaky.fails = 10**6
    with pytest.raises(StoreError) as caught:
        read(group, "s2", [0])
    assert "complete zip" not in str(caught.value) and "damaged" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 416])
def test_a_refusal_is_not_asked_again(flaky, tmp_path, status):
    write_split(tmp_path, "train", [[0, 1]], "B")
    path = f"{upload(tmp_path, f'refused-{status}')}/train/S2L2A/ssl4eos12_shard_000001.tar"
    flaky.fault, flaky.fails = str(status), 10**6
    with pytest.raises(StoreError, match=f"refused by the store.*status {status}"):
        fetch_ranges(path, [(0, 10)], QUICK)
    assert set(flaky.asked.values()) == {1}


def test_only_the_ranges_that_failed_are_asked_again(flaky, tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(200)))
    path = f"{upload(tmp_path, 'ranges')}/file"
    flaky.fails = 1
    flaky.asked[("cat_file", "/ranges/file", 0, 10)] = 1  # this one answers at once
    assert fetch_ranges(path, [(0, 10), (50, 5)], QUICK) == [
        bytes(range(10)),
        bytes(range(50, 55)),
    ]
    assert flaky.asked[("cat_file", "/ranges/file", 0, 10)] == 2
    assert flaky.asked[("cat_file", "/ranges/file", 50, 55)] == 2


def test_a_range_past_the_end_is_a_truncated_file_and_not_asked_for_again(flaky, tmp_path):
    (tmp_path / "file").write_bytes(bytes(20))
    path = f"{upload(tmp_path, 'end')}/file"
    with pytest.raises(DataError, match=r"truncated, 10 bytes at offset 10 where 30 belong"):
        fetch_ranges(path, [(10, 30)], QUICK)
    assert flaky.asked[("cat_file", "/end/file", 10, 40)] == 1


def test_pauses_grow_to_their_limit_and_are_bounded(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)

    def fail() -> None:
        raise TimeoutError

    with pytest.raises(StoreError, match="no answer in 6 attempts"):
        Retry(attempts=6, first_wait_s=1.0, factor=3.0, longest_wait_s=20.0).call(fail, "it")
    assert len(pauses) == 5
    for pause, longest in zip(pauses, (1, 3, 9, 20, 20), strict=True):
        assert longest / 2 <= pause <= longest
    usual = Retry()
    assert sum(usual.waits()) <= 7.5  # half a second, doubled three times


def test_mistakes_of_ours_are_not_repeated():
    calls = []

    def fail() -> None:
        calls.append(1)
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        Retry(first_wait_s=0.0).call(fail, "it")
    assert len(calls) == 1
    with pytest.raises(ConfigError, match="attempts >= 1"):
        Retry(attempts=0)


def test_an_epoch_over_a_flaky_store_equals_one_over_the_disk(flaky, tmp_path):
    write_split(tmp_path, "train", TRAIN)
    url = upload(tmp_path, "epoch")
    flaky.fails = 2

    def epoch(root: str) -> list[Any]:
        data = SSL4EOS12DataModule(
            root=root, modalities=PAIR, global_batch_size=5, window=Window(size=16),
            loading=Loading(workers=0),
            storage_options={"retry": {"attempts": 3, "first_wait_s": 0}},
        )  # fmt: skip
        data.setup("fit")
        return [(batch["id"], batch["s2"].sum()) for batch in data.train_dataloader()]

    assert epoch(url) == epoch(str(tmp_path))


def test_a_file_system_that_is_not_installed_is_named():
    with pytest.raises(DataError, match="no file system for this kind of URL"):
        is_folder("nosuch://a/b")
