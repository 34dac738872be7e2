"""`cache` lists with sizes and ages, and clears what one asks for."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from scan_files import write_nifti

from domainssl.cache import clear, locked_build


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two builds, the first of them three days old."""
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "cache"))
    for name, size in (("lake", 1_500_000), ("forest", 2_500_000)):
        locked_build(name, "1", lambda folder, n=size: (folder / "f").write_bytes(bytes(n)))
    old = time.time() - 3 * 86_400
    os.utime(tmp_path / "cache" / "lake-1" / ".domainssl.json", (old, old))
    return tmp_path / "cache"


@pytest.mark.parametrize("words", [[], ["list"]])
def test_list_shows_names_sizes_and_ages(cli, cache: Path, words) -> None:
    result = cli("cache", *words)
    assert result.status == 0
    rows = {line.split()[0]: line.split() for line in result.out.splitlines() if line.strip()}
    assert str(cache) in result.out
    assert rows["lake"] == ["lake", "1", "1.5", "3", "days"]
    assert rows["forest"][:3] == ["forest", "1", "2.5"] and rows["forest"][-1] == "seconds"
    assert rows["total"] == ["total", "4.0"]


def test_build_prepares_the_exams_of_a_recipe_once(cli, cache: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    for name in ("p1", "p2", "p3"):
        values = rng.integers(-900, 900, (24, 24, 24)).astype(np.int16)
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", values, np.eye(4))
    words = [
        "cache", "build", "--config", "recipes/ct_mae3d.yaml", "--jobs=0",
        f"--data.root={tmp_path / 'scans'}", "--data.modalities={ct: {contrast: '*'}}",
        "--data.window.size=16",
    ]  # fmt: skip
    for tier in ("memmap", "zarr"):
        first = cli(*words, f"--data.preparation.cache={tier}")
        assert first.status == 0, first.text
        assert "3 exams are prepared in" in first.text
        again = cli(*words, f"--data.preparation.cache={tier}")
        assert again.status == 0 and "3 of them before" in again.text.replace("\n", " ")
        (folder,) = (cache / "volumes").parent.glob(f"volumes*-{tier}")
        assert len(list(folder.rglob("entry.json"))) == 3


def test_clear_takes_one_by_name_and_leaves_the_others(cli, cache: Path) -> None:
    result = cli("cache", "clear", "lake", "--yes")
    assert result.status == 0 and "deleted 1 folders" in result.out
    assert not (cache / "lake-1").exists() and (cache / "forest-1").is_dir()
    assert cli("cache", "clear", "forest-1", "--yes").status == 0
    assert cli("cache").out.splitlines()[-1].strip() == "empty"


def test_clear_of_an_unknown_name_names_the_nearest(cli, cache: Path) -> None:
    result = cli("cache", "clear", "forrest", "--yes")
    assert result.status == 2
    assert "Did you mean 'forest'?" in result.err and (cache / "forest-1").is_dir()


def test_clear_without_a_terminal_needs_yes(cli, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    result = cli("cache", "clear")
    assert result.status == 2 and "add --yes" in result.err
    assert (cache / "lake-1").is_dir()


@pytest.mark.parametrize(("answer", "is_kept"), [("n", True), ("", True), ("y", False)])
def test_clear_at_a_terminal_asks(cli, cache: Path, monkeypatch, answer, is_kept) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    cli("cache", "clear")
    assert (cache / "lake-1").is_dir() is is_kept


def test_clear_removes_what_killed_builds_left_but_not_what_is_being_built(cache: Path) -> None:
    for name in ("left", "busy"):
        (cache / f".{name}-1.abc.part").mkdir()
    with FileLock(cache / ".busy-1.lock"):
        removed = clear()
    assert [path.name for path in removed] == ["forest-1", "lake-1", ".left-1.abc.part"]
    assert (cache / ".busy-1.abc.part").is_dir()
