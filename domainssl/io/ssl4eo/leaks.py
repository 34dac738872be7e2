"""Locations of SSL4EO-S12 and TerraMesh that are in two splits, or twice in one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress

from domainssl.errors import DataError
from domainssl.io.leaks import SEEN_IN_TRAINING, equal_files, repeated
from domainssl.io.ssl4eo.first import PACKED, packed_sample
from domainssl.io.ssl4eo.layout import Catalogue

__all__ = ["leaks"]


def leaks(catalogues: Mapping[str, Catalogue], root: str) -> list[str]:
    """Say which locations or files are in two splits, or twice in one.

    Args:
        catalogues: What was found, by split.
        root: The data, for messages.
    """
    if any(found.release == PACKED for found in catalogues.values()):
        return _equal_samples(catalogues, root)
    problems = repeated(
        {s: found.locations() for s, found in catalogues.items()}, root, "locations"
    )
    files = {
        split: [next(iter(group.files.values())) for group in found.groups]
        for split, found in catalogues.items()
        if found.release == "A"  # files of many locations, which have no names outside of them
    }
    return problems + equal_files(files, root)


def _equal_samples(catalogues: Mapping[str, Catalogue], root: str) -> list[str]:
    """Say which LMDB begin or end with the same sample as another split's: numbers tell nothing."""
    known: dict[bytes, str] = {}
    problems = []
    for split, found in catalogues.items():
        path = next(iter(found.groups[0].files.values()))
        ends: set[bytes] = set()
        with suppress(DataError):  # reading it says so
            for key in ("0", str(found.count - 1)):
                ends.add(hashlib.sha256(packed_sample(path, key)).digest())
        if shared := ends & known.keys():
            problems.append(
                f"{root}: {path} of {split!r} begins or ends with the same sample as the LMDB of "
                f"{known[min(shared)]!r}; {SEEN_IN_TRAINING}"
            )
        known |= dict.fromkeys(ends, split)
    return problems
