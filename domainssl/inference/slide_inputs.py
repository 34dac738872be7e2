"""Slides that are given by path or folder, and the names of what is written of them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from domainssl.errors import ConfigError, DataError
from domainssl.inference.outputs import file_name, repeated
from domainssl.io.ids import ids_of
from domainssl.io.slide.picture import advice_on_pictures
from domainssl.io.slide.pyramid import ENDINGS, list_slides

__all__ = ["named_slides"]

_ENDING = re.compile(rf"(\.ome)?({'|'.join(map(re.escape, ENDINGS))})\Z", re.IGNORECASE)


def named_slides(given: Sequence[str], ids: str) -> tuple[list[str], list[str]]:
    """Return paths and ids of the slides at some paths.

    Args:
        given: Slides, or folders with slides.
        ids: `hashed`, or `plain` for their paths below the folder, without their endings where
            that tells them apart, as CLAM and TRIDENT name slides.

    Raises:
        ConfigError: Two have the same name.
        DataError: A folder holds none, or nothing lies at a path.
    """
    found = list(dict.fromkeys(pair for path in given for pair in _inside(path)))
    keys = list(ids_of([name for _, name in found], ids))
    if ids == "plain":
        stems = [_ENDING.sub("", key) for key in keys]
        twice = set(repeated(stems))
        keys = [file_name(key if s in twice else s) for key, s in zip(keys, stems, strict=True)]
    twice = set(repeated(keys))
    if twice:
        same = [path for (path, _), key in zip(found, keys, strict=True) if key in twice]
        raise ConfigError(
            f"tile: {len(same)} slides have the same name below the folders that are given: "
            f"{', '.join(same[:4])}. Give the folder above them instead."
        )
    return [path for path, _ in found], keys


def _inside(path: str) -> list[tuple[str, str]]:
    """Return path and name of every slide at a path."""
    if os.path.isdir(path):
        inside = list_slides(path)
        if not inside:
            raise DataError(
                f"{path}: holds no slides, expected files that end in {', '.join(ENDINGS)}."
                + advice_on_pictures(path)
            )
        return [(slide, os.path.relpath(slide, path)) for slide in inside]
    if not os.path.exists(path):
        raise DataError(f"{path}: nothing lies there. Give slides or folders with slides.")
    return [(path, os.path.basename(path))]
