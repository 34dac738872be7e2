"""Slides that are given by path, folder or table, and the names of what is written of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from domainssl.errors import ConfigError
from domainssl.inference.outputs import file_name, repeated
from domainssl.io.ids import ids_of
from domainssl.io.slide.listed import ListedSlide, slides_at, stem_of

__all__ = ["named_slides"]


def named_slides(given: Sequence[str], ids: str) -> list[ListedSlide]:
    """Return the slides at some paths, named by their ids.

    Args:
        given: Slides, folders with slides, or tables of slides.
        ids: `hashed`, or `plain` for their paths below the folder, without their endings where
            that tells them apart, as CLAM and TRIDENT name slides.

    Raises:
        ConfigError: Two have the same name.
        DataError: A folder holds none, or nothing lies at a path.
    """
    known: dict[str, ListedSlide] = {}
    for slide in (each for path in given for each in slides_at(path)):
        first = known.get(slide.path)
        if first is None or first.mpp_um is None:
            known[slide.path] = replace(slide, name=first.name if first else slide.name)
    found = list(known.values())
    keys = list(ids_of([slide.name for slide in found], ids))
    if ids == "plain":
        keys = _without_endings(keys)
    twice = set(repeated(keys))
    if twice:
        same = [slide.path for slide, key in zip(found, keys, strict=True) if key in twice]
        raise ConfigError(
            f"slides: {len(same)} have the same name below the folders that are given: "
            f"{', '.join(same[:4])}. Give the folder above them instead, or names of their own in "
            "the column id of a table."
        )
    return [replace(slide, name=key) for slide, key in zip(found, keys, strict=True)]


def _without_endings(names: Sequence[str]) -> list[str]:
    """Return names of slides as those of files, without endings where that tells them apart."""
    stems = [stem_of(name) for name in names]
    twice = set(repeated(stems))
    return [file_name(n if s in twice else s) for n, s in zip(names, stems, strict=True)]
