"""Pieces done by a dask cluster: equal results, one message for what fails, nothing in its logs."""

from __future__ import annotations

import filecmp
import io
import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slide_files import write_tiff
from ssl4eo_files import write_split

from domainssl import cluster as module
from domainssl.cli import main
from domainssl.errors import ConfigError, DataError
from domainssl.inspection.statistics import measure
from domainssl.inspection.subjects import OfCatalogue
from domainssl.io.ssl4eo.layout import scan
from domainssl.pieces import Plan, in_order

distributed = pytest.importorskip("distributed", reason="the extra scale is not installed")
PRODUCTS = {"s1": "S1GRD", "s2": "S2L2A"}


@pytest.fixture(scope="module")
def here() -> Iterator[Any]:
    """A scheduler and two workers in threads of this process, reached over TCP."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp",
        dashboard_address="127.0.0.1:0", memory_limit=0,
    ) as found:  # fmt: skip
        yield found


def _work(log: Path, number: int) -> int:
    if number == 7:
        raise DataError("patients/Miller07: no scan")
    logging.getLogger("domainssl.io").warning("patients/Miller%02d: odd", number)
    warnings.warn(f"Miller{number:02d} is odd", UserWarning, stacklevel=1)
    with log.open("a") as file:
        file.write(f"{number}\n")
    return number**2


def test_results_come_in_order_and_what_is_sent_shows_in_no_log(
    here: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger("distributed").addHandler(handler)
    work = partial(_work, tmp_path / "log")
    try:
        with pytest.warns(UserWarning, match="Miller03 is odd"):
            found = list(in_order(work, range(6), None, here.scheduler_address))
        with pytest.raises(DataError, match="Miller07: no scan") as caught:
            list(in_order(work, [7], None, here.scheduler_address))
    finally:
        logging.getLogger("distributed").removeHandler(handler)
    assert found == [(n, n**2) for n in range(6)]
    assert sorted((tmp_path / "log").read_text().split()) == list("012345")
    assert "_work" in caught.value.__notes__[0]  # where it arose, for --debug
    assert "patients/Miller03: odd" in caplog.text  # said here, by the command
    assert "Miller" not in heard.getvalue() and not module._HELD


def test_figures_and_their_file_are_the_same_bytes(
    here: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "data", "train", [[0, 1], [2, 3, 4], [5]])
    subject = OfCatalogue(scan(str(tmp_path / "data"), "train", PRODUCTS))
    measure(subject, tmp_path / "alone.yaml", Plan(jobs=0))
    words = ["--scheduler", here.scheduler_address, "--output", str(tmp_path / "all.yaml")]
    assert main(["stats", str(tmp_path / "data"), *words]) == 0
    assert filecmp.cmp(tmp_path / "alone.yaml", tmp_path / "all.yaml", shallow=False)
    capsys.readouterr()


def test_a_worker_that_comes_later_is_sent_the_work(here: Any, tmp_path: Path) -> None:
    results = in_order(partial(_work, tmp_path / "log"), range(4), None, here.scheduler_address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = [next(results)]
        module._HELD.clear()  # as if all workers had been started again
        found += list(results)
    assert found == [(n, n**2) for n in range(4)]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("10.0.0.7:8786", "expected local, or the address"),
        ("tcp://127.0.0.1:9", "no dask scheduler answers there"),
    ],
)
def test_an_address_without_scheduler_is_one_message(
    address: str,
    said: str,
    tmp_path: Path,
    sample_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "_CONNECT_S", 0.3)
    words = ["--split", "val", "--output", str(tmp_path / "s.yaml"), "--scheduler", address]
    assert main(["stats", "sample", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and address in error


def test_a_cluster_has_its_own_number_of_processes() -> None:
    with pytest.raises(ConfigError, match="as many workers as were started"):
        Plan(jobs=3, scheduler="tcp://10.0.0.7:8786")
    assert Plan(jobs=3, scheduler="local").jobs == 3


def test_a_cluster_without_workers_or_with_another_version_is_refused(
    here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, address = partial(_work, tmp_path / "log"), here.scheduler_address
    monkeypatch.setattr(module, "_hold", _older)
    with pytest.raises(ConfigError, match=r"has domainssl 0\.0, this process"):
        list(in_order(work, range(2), None, address))
    with distributed.LocalCluster(
        n_workers=0, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0"
    ) as empty:
        monkeypatch.setattr(module, "_PATIENCE_S", 0.3)
        with pytest.raises(ConfigError, match="it has no workers"):
            list(in_order(work, range(2), None, empty.scheduler_address))


def _older(token: str, work: Any, folder: str) -> tuple[str, bool]:
    return "0.0", True


def _dies_once(folder: Path, number: int) -> int:
    if number == 2 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return number**2


def _always_dies(number: int) -> int:
    os._exit(9)


@pytest.mark.slow
def test_a_lost_worker_changes_nothing_and_a_deadly_piece_is_one_message(tmp_path: Path) -> None:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0
    ) as processes:
        address = processes.scheduler_address
        found = list(in_order(partial(_dies_once, tmp_path), range(8), None, address))
        assert found == [(n, n**2) for n in range(8)] and (tmp_path / "died").exists()
        with pytest.raises(DataError, match="Several workers died at or near the same piece"):
            list(in_order(_always_dies, range(2), None, address))


@pytest.mark.slow
def test_local_starts_a_cluster_whose_tiles_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rgb = np.full((256, 384, 3), 242) + rng.integers(-2, 3, (256, 384, 3))
    rgb[64:192, 64:320] = np.array((200, 110, 170)) + rng.integers(-9, 10, (128, 256, 3))
    for number in range(2):
        write_tiff(tmp_path / "slides" / f"{number}.tif", [rgb.astype(np.uint8)])
    words = ["tile", str(tmp_path / "slides"), "--mpp", "1.0", "--size", "64"]
    assert main([*words, "--output", str(tmp_path / "alone"), "--jobs", "0"]) == 0
    more = ["--output", str(tmp_path / "all"), "--scheduler", "local", "--jobs", "1"]
    assert main([*words, *more]) == 0
    names = sorted(str(p.relative_to(tmp_path / "alone")) for p in (tmp_path / "alone").rglob("*"))
    assert len(names) > 8
    for name in names:
        one, other = tmp_path / "alone" / name, tmp_path / "all" / name
        assert other.exists() and (one.is_dir() or one.read_bytes() == other.read_bytes()), name
    assert main([*words, *more]) == 0
    assert "2 of them before" in capsys.readouterr().out
