"""DICOM files among images that show no image: contours, and segmentations, which are label maps.

An export puts them beside the images or into folders of their own. The first bytes of a file tell
what it may be; of many folders, what was found is looked up in the cache between runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from domainssl.errors import DataError
from domainssl.io.storage.scan_index import ScanIndex, Seen
from domainssl.io.volume.dicom import CONTOURS, some_names
from domainssl.io.volume.dicom_file import SEGMENTATIONS, look
from domainssl.io.volume.known import MANY, hashed, rests_of
from domainssl.io.volume.lost import AGAIN

__all__ = ["Aside", "aside_of"]

_HEAD = 1024
_INSTEAD = "Give the folder with the scans itself, or list them in a manifest."
_MARKS = {
    b"1.2.840.10008.5.1.4.1.1.481.3": "RTSTRUCT",
    **{uid.encode(): "segmentation" for uid in SEGMENTATIONS},
}


@dataclass(frozen=True, kw_only=True)
class Aside:
    """What lies among images and is none.

    Attributes:
        contours: Files with contours (RTSTRUCT).
        maps: Files with segmentations.
        lost: Links to nothing.
        linked: Links to folders.
    """

    contours: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()

    def told(self, root: str) -> list[str]:
        """Return a line on what nothing here reads: contours, and links; empty without any."""
        lines = []
        for paths, what, hint in (
            (self.contours, f"RTSTRUCT left out ({CONTOURS})", ""),
            (self.lost, "left out, linked to nothing", f". {AGAIN}"),
            (self.linked, "linked to folders, which are not followed", f". {_INSTEAD}"),
        ):
            if paths:
                names = some_names([os.path.relpath(path, root) for path in paths])
                lines.append(f"{root}: {len(paths)} {what}: {names}{hint}")
        return lines


def aside_of(files: Mapping[str, Sequence[str]]) -> Aside:
    """Return the contours and segmentations of folders.

    Args:
        files: Files that may be DICOM, by folder.
    """
    if len(files) < MANY:
        kinds = {folder: _kinds(inside) for folder, inside in files.items()}
    else:
        keys = {folder: hashed(folder) for folder in files}
        first = {keys[folder]: inside[0] for folder, inside in files.items()}
        index = ScanIndex("aside", {"root": hashed(os.path.commonpath(list(files)))})
        index.fill(first, partial(_look, {keys[folder]: files[folder] for folder in files}))
        kinds = {folder: (index.get(keys[folder]) or ("", ""))[1] for folder in files}
    found: dict[str, list[str]] = {"R": [], "s": []}
    for folder, text in kinds.items():
        for mark in text.split():
            found[mark[0]].append(files[folder][int(mark[1:])])
    return Aside(contours=tuple(sorted(found["R"])), maps=tuple(sorted(found["s"])))


def _kinds(files: Sequence[str]) -> str:
    """Return a letter and the place in the list of each file that is no image: `R3 s7`."""
    return " ".join(f"{kind[0]}{n}" for n, path in enumerate(files) if (kind := _kind(path)))


def _kind(path: str) -> str:
    """Return `RTSTRUCT` or `segmentation`, empty for what is neither or cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        if not any(uid in head for uid in _MARKS):
            return ""
        what = look(path).what
    except (DataError, OSError):
        return ""  # a damaged one, of which reading its folder says more
    return what if what in _MARKS.values() else ""


def _look(files: Mapping[str, Sequence[str]], keys: Sequence[str]) -> list[Seen | None]:
    """Look at the files of folders; what is kept says which one it is by its number alone."""
    found: list[Seen | None] = []
    for key in keys:
        found.append(Seen("aside", _kinds(files[key]), rests_of(files[key][0])))
    return found
