"""Items in two splits, or twice in one: what is measured on held-out data would mean little.

They are told and not refused: a few samples that stand in both splits are enough for a try.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence

from domainssl.io.storage.paths import fetch_ranges, is_url

__all__ = ["SEEN_IN_TRAINING", "equal_files", "repeated"]

SEEN_IN_TRAINING = (
    "what is measured on held-out data would then be measured on data that was trained on; take "
    "them out of one of the two"
)
_SHOWN = 5
_TAIL = 65_536  # bytes: in zips the directory, with a checksum of each member
_MOST = 2000  # files whose ends are read: of archives of patches, all have one size
_KEPT = 1_000_000  # names of a split


def repeated(splits: Mapping[str, Iterable[str]], where: str, what: str) -> list[str]:
    """Say which names are in two splits, and which a split has several times.

    Args:
        splits: Names of the items of each split; of a large `train`, repetitions of the first
            million are told.
        where: The data, for messages.
        what: What the items are, in the plural.
    """
    owner: dict[str, str] = {}
    problems = []
    for split in sorted(splits, key=lambda name: name == "train"):  # the largest last
        own: set[str] = set()
        torn, several = set(), set()
        for name in splits[split]:
            if name in owner:
                torn.add(name)
            if name in own:
                several.add(name)
            elif len(own) < _KEPT:
                own.add(name)
        if torn:
            problems.append(
                f"{where}: {len(torn)} {what} of {split!r} are also in {owner[min(torn)]!r}, such "
                f"as {_some(sorted(torn))}; {SEEN_IN_TRAINING}"
            )
        if several:
            problems.append(
                f"{where}: {len(several)} {what} are there several times in {split!r}, such as "
                f"{_some(sorted(several))}, and count as often"
            )
        owner = {**dict.fromkeys(own, split), **owner}
    return problems


def equal_files(splits: Mapping[str, Iterable[str]], where: str) -> list[str]:
    """Say which files are in two splits under any name, and which a split has twice.

    Files of equal size are compared, by their ends and then whole: the rarest sizes first, up to
    2000 files, so that large archives begin as fast. What lies behind a URL is not compared.

    Args:
        splits: Files of each split.
        where: The data, for messages.
    """
    sizes: dict[int, list[tuple[str, str]]] = {}
    for split, paths in splits.items():
        for path in dict.fromkeys(paths):
            if path and not is_url(path) and (size := _file_size(path)) is not None:
                sizes.setdefault(size, []).append((split, path))
    copies: dict[tuple[str, str], list[str]] = {}
    left = _MOST
    of_one_size = ((size, files) for size, files in sizes.items() if len(files) > 1)
    for size, files in sorted(of_one_size, key=lambda item: len(item[1])):
        known: dict[str, tuple[str, str]] = {}
        left -= len(files)
        if left < 0:
            break
        for split, path in files:
            [end] = fetch_ranges(path, [(max(0, size - _TAIL), min(size, _TAIL))])
            first, other = known.setdefault(hashlib.sha256(end).hexdigest(), (split, path))
            pair = copies.setdefault((first, split), [])
            # of many copies, a few are compared whole
            if other != path and (len(pair) >= _SHOWN or filecmp.cmp(path, other, shallow=False)):
                pair.append(f"{path} (as {other})")
    return [
        f"{where}: {len(found)} files of {split!r} are copies of files "
        + ("in it" if first == split else f"of {first!r}")
        + f", such as {_some(found)}; "
        + ("they count as often" if first == split else SEEN_IN_TRAINING)
        for (first, split), found in copies.items()
        if found
    ]


def _file_size(path: str) -> int | None:
    """Return the bytes of a file, None of whatever else lies there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # the latter: a name with a NUL
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
