"""Files that a copy lost: empty ones, and links to nothing."""

from __future__ import annotations

import os

__all__ = ["AGAIN", "is_file", "links_in", "lost_in"]

AGAIN = "Copy them again, or get their content (git annex get, datalad get)."


def lost_in(folder: str) -> list[str]:
    """Return the names of empty files and links to nothing, sorted; none of what is no folder."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and (_is_lost(entry) or (is_file(entry) and not entry.stat().st_size))
        )


def links_in(folder: str) -> list[str]:
    """Return the names of links to nothing and to folders, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and entry.is_symlink()
            and (os.path.isdir(entry.path) or _is_lost(entry))
        )


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file or a link to one; `entry.is_file` fails on link loops."""
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _is_lost(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)
