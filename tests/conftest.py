"""What all tests share: a cache of their own, no network, and the sample data built once."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kept_samples import keep, restore
from ledger import Ledger
from real_data import REAL_DATA

REPOSITORY = Path(__file__).resolve().parents[1]
ONE_THREAD = ("callbacks", "evaluation", "objectives")


def pytest_configure(config: pytest.Config) -> None:
    """Count what the tests cost."""
    config.pluginmanager.register(Ledger(config))


def pytest_unconfigure() -> None:
    """End the ranks of tests with several processes."""
    if "ranks" in sys.modules:
        sys.modules["ranks"].close_ranks()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Point DOMAINSSL_CACHE, here and in child processes, to a folder of this session.

    Where suites run in several processes, it begins with the samples that an earlier one of the
    same code has made.
    """
    before = os.environ.get("DOMAINSSL_CACHE")
    base = tmp_path_factory.getbasetemp()
    is_suite = "PYTEST_XDIST_WORKER" in os.environ
    if is_suite:  # all workers together build a sample once
        base = base.parent
    folder = base / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["DOMAINSSL_CACHE"] = str(folder)
    if is_suite:
        restore(folder)
    yield folder
    if is_suite:
        keep(folder)
    if before is None:
        del os.environ["DOMAINSSL_CACHE"]
    else:
        os.environ["DOMAINSSL_CACHE"] = before


@pytest.fixture(autouse=True)
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that leave this machine, unless the test is marked online."""
    if request.node.get_closest_marker("online"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0]) if isinstance(address, tuple) else str(address)
            if host not in ("localhost", "::1", "0.0.0.0", "::") and not host.startswith("127."):
                raise OSError(f"a test not marked 'online' tried to connect to {host!r}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let small tensors be computed on one thread: several are slower, on a busy machine by far."""
    if request.path.parent.name not in ONE_THREAD:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory for the command line, outside SLURM."""
    # Lightning's log handler keeps the stderr of the test that imported it
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def sample_root(cache_folder: Path) -> Path:
    """The embedded SSL4EO-S12 sample, built once per session in the session's cache."""
    from domainssl.datamodules.samples import ssl4eo

    return ssl4eo.sample_root()


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of the project."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with small real files ($DOMAINSSL_SAMPLE_DATA or ../shared/data), or a skip."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real sample data: no folder {REAL_DATA} ($DOMAINSSL_SAMPLE_DATA)")
    return REAL_DATA


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder with the golden files of the references ($DOMAINSSL_GOLDEN_DIR or tests/golden)."""
    named = os.environ.get("DOMAINSSL_GOLDEN_DIR")
    folder = Path(named) if named else REPOSITORY / "tests" / "golden"
    if not folder.is_dir():
        pytest.fail(f"$DOMAINSSL_GOLDEN_DIR names {str(folder)!r}, which is not a folder")
    return folder
