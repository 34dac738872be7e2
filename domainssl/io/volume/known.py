"""What opening many scans found, looked up in the cache between runs.

Keys are hashes, and neither paths nor names of files are kept: they may be those of patients.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import partial

from domainssl.io.storage.scan_index import Rest, ScanIndex, Seen
from domainssl.io.volume import dicom

__all__ = ["MANY", "hashed", "rests_of", "series_folders"]

MANY = 32  # folders or files that are worth an index


def series_folders(root: str, files: Mapping[str, Sequence[str]]) -> list[str]:
    """Return those of some folders that hold an image of DICOM.

    Remembered are the folders whose first file is one, until that file or the folder changes.

    Args:
        root: The folder above them.
        files: Files that may be DICOM, by folder.
    """
    if len(files) < MANY:
        return [folder for folder in files if dicom.holds_image(folder)]
    keys = {folder: hashed(folder) for folder in files}
    first = {keys[folder]: inside[0] for folder, inside in files.items()}
    index = ScanIndex("series", {"root": hashed(root)})
    index.fill(first, partial(_look, first))
    return [f for f in files if index.get(keys[f]) is not None or dicom.holds_image(f)]


def _look(first: Mapping[str, str], keys: Sequence[str]) -> list[Seen | None]:
    """Open the first file of folders; None where it is no image: others may be."""
    found: list[Seen | None] = []
    for key in keys:
        path = first[key]
        is_image = dicom.is_series(path) and dicom.holds_image(path)
        found.append(Seen("image", "", rests_of(path)) if is_image else None)
    return found


def rests_of(path: str) -> tuple[Rest, ...]:
    """Return what a row on the folder of a file rests on: the file and its folder."""
    return (0, ""), (len(os.path.basename(path)) + 1, "")


def hashed(path: str) -> str:
    """Return what stands for a path in the cache."""
    name = os.path.abspath(path).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(name, digest_size=16).hexdigest()
