"""The places that outputs go to: a folder, free of results of something else, and names in it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from domainssl.errors import ConfigError, DataError

__all__ = [
    "file_name",
    "file_states",
    "make_folder",
    "refuse_one_file",
    "refuse_other",
    "repeated",
]


def file_name(item: str) -> str:
    """Return the id of an item as the name of one file."""
    return item.replace("/", "__").replace(os.sep, "__")


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that are there more than once, in order."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def file_states(paths: Iterable[str | Path]) -> list[list[int]]:
    """Return size and time of change in nanoseconds of files and folders."""
    found = [os.stat(path) for path in paths]
    return [[stat.st_size, stat.st_mtime_ns] for stat in found]


def make_folder(folder: Path, named: Path) -> None:
    """Make a folder, and those above it.

    Args:
        folder: Which one.
        named: What the message names: what the user gave.

    Raises:
        DataError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{named}: cannot be written ({error.strerror or error}). Choose another --output."
        ) from error


def refuse_one_file(output: Path, count: int, noun: str) -> None:
    """Refuse the name of one file for the outputs of several inputs.

    Raises:
        ConfigError: There are several.
    """
    if count > 1:
        raise ConfigError(
            f"--output {output}: the name of one file, but there are {count} {noun}. Give a folder."
        )


def refuse_other(target: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare what an output was made from with what is asked for.

    Raises:
        ConfigError: They differ.
    """
    differing = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
    if differing:
        raise ConfigError(
            f"{target}: made from something else ({', '.join(differing)} differ). Choose another "
            "--output, or add --restart to write it anew."
        )
