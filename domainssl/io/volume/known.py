"""What opening many scans found, looked up in the cache between runs.

Keys are hashes, and neither paths nor names of files are kept: they may be those of patients.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import partial

from domainssl.io.storage.scan_index import ScanIndex, Seen
from domainssl.io.volume import dicom

__all__ = ["series_folders"]

_MANY = 32  # folders or files that are worth an index


def series_folders(root: str, files: Mapping[str, Sequence[str]]) -> list[str]:
    """Return those of some folders that hold an image of DICOM.

    Remembered are the folders whose first file is one, until that file or the folder changes.

    Args:
        root: The folder above them.
        files: Files that may be DICOM, by folder.
    """
    if len(files) < _MANY:
        return [folder for folder in files if dicom.holds_image(folder)]
    keys = {folder: _hashed(folder) for folder in files}
    first = {keys[folder]: inside[0] for folder, inside in files.items()}
    index = ScanIndex("series", {"root": _hashed(root)})
    index.fill(first, partial(_look, first))
    return [f for f in files if index.get(keys[f]) is not None or dicom.holds_image(f)]


def _look(first: Mapping[str, str], keys: Sequence[str]) -> list[Seen | None]:
    """Open the first file of folders; None where it is no image: others may be."""
    found: list[Seen | None] = []
    for key in keys:
        path = first[key]
        is_image = dicom.is_series(path) and dicom.holds_image(path)
        rests = ((0, ""), (len(os.path.basename(path)) + 1, ""))  # itself and its folder
        found.append(Seen("image", "", rests) if is_image else None)
    return found


def _hashed(path: str) -> str:
    name = os.path.abspath(path).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(name, digest_size=16).hexdigest()
