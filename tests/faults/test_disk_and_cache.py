"""A disk that is full or read-only while a real run writes to it, and a cache that cannot be used.

The limit on file size is the system's own (RLIMIT_FSIZE): a write beyond it fails as on a full
disk, in the middle of the file.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from domainssl import load_backbone
from domainssl.cache import locked_build
from domainssl.callbacks.checkpoint import AtomicCheckpointIO
from domainssl.cli import main
from domainssl.errors import DataError, WeightsError

TINY = [
    "--config=recipes/ssl4eo_croma.yaml",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--model.encoding.architecture={width: 16, depth: 2, heads: 2, decoder_width: 16}",
    "--data.window={size: 16, flips: true, quarter_turns: true}",
    "--callbacks.evaluation=null",
    "--callbacks.panels=null",
    "--callbacks.checkpoint.every_n_epochs=1",
    "--loggers.tensorboard=null",
]


def fit(
    repository: Path, folder: Path, *more: str, limit: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `fit` in a new process whose files may not grow beyond `limit` bytes."""

    def bounded() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "domainssl", "fit", *TINY, *more], cwd=folder, text=True,
        capture_output=True, timeout=1200, check=False, preexec_fn=bounded,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_ends_with_a_message_and_goes_on_later(
    tmp_path, repository, sample_root
):
    full = fit(repository, tmp_path, "--run_dir=here", limit=60_000)
    assert full.returncode == 2, full.stderr
    assert "was not written: " in full.stderr and "resume with --ckpt_path last" in full.stderr
    assert "Traceback" not in full.stderr
    assert list((tmp_path / "here" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "here" / "backbone").exists()
    again = fit(repository, tmp_path, "--run_dir=here", "--auto_resume")
    assert again.returncode == 0, again.stderr
    assert load_backbone(tmp_path / "here" / "backbone").modalities.keys() == {"s1", "s2"}


@pytest.mark.slow
def test_an_export_on_a_full_disk_leaves_nothing_and_the_checkpoint_has_everything(
    tmp_path, repository, sample_root
):
    size = _size_of_a_backbone(repository, tmp_path)
    full = fit(
        repository, tmp_path, "--run_dir=here", "--callbacks.checkpoint=null", limit=size // 2
    )
    assert full.returncode == 2, full.stderr
    assert "was not exported" in full.stderr and "Traceback" not in full.stderr
    assert list((tmp_path / "here" / "backbone").iterdir()) == []
    with pytest.raises(WeightsError):
        load_backbone(tmp_path / "here" / "backbone")


def _size_of_a_backbone(repository: Path, folder: Path) -> int:
    done = fit(repository, folder, "--run_dir=whole", "--trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    return (folder / "whole" / "backbone" / "backbone.safetensors").stat().st_size


def test_a_disk_error_outside_a_checkpoint_is_a_message_too(monkeypatch, capsys):
    from domainssl.cli.verbs import recipes

    def fail(argv: list[str]) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")

    monkeypatch.setattr(recipes, "run", fail)
    assert main(["recipes"]) == 2
    error = capsys.readouterr().err
    assert "'metrics.csv': No space left on device" in error and "Traceback" not in error
    assert "another --output" in error and "DOMAINSSL_CACHE" in error


def test_a_checkpoint_written_in_part_is_never_under_its_name(tmp_path):
    pid = os.fork()
    if pid == 0:  # the limit holds for this process alone
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(10_000)}, tmp_path / "a.ckpt")
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- cache


def build(folder: Path) -> None:
    (folder / "file").write_bytes(bytes(10_000))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_cache_that_fills_leaves_no_half_build(cache):
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            locked_build("thing", "1", build)
        except DataError as error:
            os._exit(7 if "DOMAINSSL_CACHE" in str(error) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert (locked_build("thing", "1", build) / "file").stat().st_size == 10_000


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_names_the_variable(cache, monkeypatch, error):
    def refuse(self: Any, *arguments: Any, **options: Any) -> None:
        raise OSError(error, os.strerror(error), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match=rf"{os.strerror(error)}.*DOMAINSSL_CACHE"):
        locked_build("thing", "1", build)


def test_a_finished_build_in_a_read_only_cache_is_used(cache, monkeypatch):
    path = locked_build("thing", "1", build)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr("domainssl.cache.FileLock", refuse)
    assert locked_build("thing", "1", build) == path


def test_a_file_system_without_locks_names_the_variable(cache, monkeypatch):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("domainssl.cache.FileLock", refuse)
    with pytest.raises(DataError, match=r"support flock.*DOMAINSSL_CACHE"):
        locked_build("thing", "1", build)


def test_a_run_whose_cache_cannot_be_made_ends_with_a_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    # Lightning's log handler keeps the stderr of the test that imported it
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["fit", *TINY]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and "DOMAINSSL_CACHE" in error
    assert "Traceback" not in error
