"""Items in two splits, or twice in one, are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from domainssl.io.leaks import equal_files, repeated


def test_names_in_two_splits_and_names_there_twice_are_told() -> None:
    assert repeated({"train": ["a", "b"], "val": ["c"]}, "here", "tiles") == []
    torn, several = repeated({"train": ["a", "b", "b"], "val": ["c", "a"]}, "here", "tiles")
    assert torn.startswith(
        "here: 1 tiles of 'train' are also in 'val', such as a; what is measured"
    )
    assert (
        several == "here: 1 tiles are there several times in 'train', such as b, and count as often"
    )


@pytest.mark.parametrize("length", [100, 200_000])
def test_equal_bytes_are_told_whatever_files_are_called(tmp_path: Path, length: int) -> None:
    same, end = bytes(length), bytes(length // 2)
    paths = [tmp_path / name for name in ("one", "two", "other", "three")]
    for path, data in zip(paths, (same, same, b"x" + same[1:], b"short" + end), strict=True):
        path.write_bytes(data)
    one, two, other, three = map(str, paths)
    assert equal_files({"train": [one, other, three], "val": ["", "https://x/one"]}, "here") == []
    [text] = equal_files({"train": [one, three], "val": [two, other]}, "here")
    assert text.startswith(
        f"here: 1 files of 'val' are copies of files of 'train', such as {two} (as {one})"
    )
    [text] = equal_files({"train": [one, two, one]}, "here")
    assert "1 files of 'train' are copies of files in it" in text


def test_ends_of_a_million_files_of_one_size_are_not_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("domainssl.io.leaks._MOST", 3)
    paths = [tmp_path / str(i) for i in range(5)]
    for path, length in zip(paths, (9, 9, 5, 5, 5), strict=True):
        path.write_bytes(bytes(length))
    [text] = equal_files({"train": map(str, paths[::2]), "val": map(str, paths[1::2])}, "here")
    assert "1 files of 'val' are copies" in text and f"{paths[1]} (as {paths[0]})" in text
