"""DICOM series as volumes: a folder with one series, or a file with several frames.

Files that are no image of the series are left out, counted and named; patient data appear nowhere.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from domainssl.errors import DataError, nearest
from domainssl.io.volume.dicom_doubts import doubts
from domainssl.io.volume.dicom_file import (
    DicomFile,
    Plane,
    is_dicom,
    look,
)
from domainssl.io.volume.dicom_pixels import check_decoder, decode
from domainssl.io.volume.dicom_stack import Stack, names_of, stacked
from domainssl.io.volume.facts import (
    Header,
    Reading,
    Scan,
    ScanFacts,
    chosen_volume,
    finish,
    in_words,
)
from domainssl.io.volume.lost import AGAIN, is_file, lost_in
from domainssl.io.volume.stored import check_size

__all__ = [
    "CONTOURS",
    "ENDINGS",
    "contents",
    "describe",
    "dicom_files",
    "files_in",
    "holds_image",
    "is_series",
    "read",
    "series_keys",
    "some_names",
]

Array = np.ndarray[Any, Any]
ENDINGS = (".dcm", ".dicom", ".ima")
_NAMED = 5
CONTOURS = (
    "contours are not read; turn them into a label map (NIfTI or DICOM SEG), for example with "
    "3D Slicer or dcmrtstruct2nii"
)
# files that are never DICOM, so that a folder of them is not opened one by one
_NEVER = (".json", ".txt", ".csv", ".tsv", ".png", ".jpg", ".jpeg", ".xml", ".html", ".pdf", ".md",
          ".yaml", ".yml", ".zip", ".gz", ".nii", ".nrrd", ".npy", ".npz", ".h5", ".raw",
          ".py")  # fmt: skip
_AIR = -1024.0  # HU, the filler of padding


@dataclass(frozen=True, kw_only=True)
class _Series:
    """What lies at a path: the stack of the series that is read, and what may be missing in it.

    Attributes:
        files: The files of the series.
        stack: Their planes, in order.
        modality: As DICOM names it.
        left_out: What else lies there.
        placeless: Images of the series without a place.
        lost: Empty files, and links to nothing.
    """

    files: Mapping[str, DicomFile]
    stack: Stack
    modality: str
    left_out: tuple[str, ...]
    placeless: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def is_series(path: str) -> bool:
    """Whether a file is DICOM, or a folder holds such a file."""
    return bool(dicom_files(path, most=1))


def holds_image(path: str) -> bool:
    """Whether a DICOM file is an image, or a folder holds one."""
    files = filter(is_dicom, files_in(path)) if os.path.isdir(path) else iter([path])
    return any(_what(file) == "image" for file in files)


def dicom_files(path: str, *, most: int | None = None) -> list[str]:
    """Return the DICOM files at a path: itself, or those of a folder, up to a number."""
    files = iter(files_in(path)) if os.path.isdir(path) else iter([path])
    return list(itertools.islice(filter(is_dicom, files), most))


def _what(path: str) -> str:
    try:
        return look(path).what
    except DataError:
        return "image"  # a damaged one, of which reading says more


def contents(path: str) -> tuple[list[DicomFile], list[str]]:
    """Return the DICOM files at a path, and the names of other files in the folder.

    Raises:
        DataError: A DICOM file is damaged.
    """
    if not os.path.isdir(path):
        return [look(path)], []
    found, others = [], []
    for file in files_in(path, every=True):
        name = os.path.basename(file)
        if name.upper() == "DICOMDIR" or not is_dicom(file):
            others.append(name)
        else:
            found.append(look(file))
    return found, others


def files_in(folder: str, *, every: bool = False) -> list[str]:
    """Return the regular files of a folder that may be DICOM, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and (every or not entry.name.lower().endswith(_NEVER))
            and is_file(entry)
        )
    return [os.path.join(folder, name) for name in names]


def series_keys(files: Sequence[DicomFile]) -> dict[str, list[DicomFile]]:
    """Return the images by series, under keys without patient data such as `ct-3`."""
    groups: dict[str, list[DicomFile]] = defaultdict(list)
    for file in files:
        groups[file.series].append(file)
    keys: dict[str, list[DicomFile]] = {}
    for group in groups.values():
        modality = group[0].modality.lower()
        base = modality if re.fullmatch(r"[a-z]{2,8}", modality) else "series"
        key = f"{base}-{group[0].number}"
        times = sum(other == key or other.startswith(f"{key}.") for other in keys)
        keys[f"{key}.{times + 1}" if times else key] = group
    return keys


def describe(path: str, reading: Reading) -> ScanFacts:
    """Return the facts of a DICOM series from the headers of its files.

    Raises:
        DataError: There is no image, several series of which none is chosen, no decoder, or the
            images form no regular stack.
    """
    return _header(path, _series(path, reading)).facts()


def read(path: str, reading: Reading) -> Scan:
    """Return one volume of a DICOM series.

    Raises:
        DataError: As `describe`; or pixels are damaged, or each place holds several images.
    """
    series = _series(path, reading)
    header, stack = _header(path, series), series.stack
    if stack.several and reading.volume is None:
        raise DataError(
            f"{path}: {stack.several}. Choose one with `volume: <index>` (0 to "
            f"{len(stack.volumes) - 1}), or put each in a folder of its own."
            + in_words("volume=<index>")
        )
    planes = stack.volumes[chosen_volume(path, len(stack.volumes), reading)]
    stored = _stored(series.files, planes)
    valid = _valid(series.files, planes, stored)
    values = _values(path, series.files, planes, stored)
    filler = _AIR if series.modality == "CT" and valid is not None else None
    return finish(header, [values], valid, filler=filler)


def _header(path: str, series: _Series) -> Header:
    stack = series.stack
    first = series.files[stack.volumes[0][0].path]
    kind = "i" if first.is_signed else "u"
    modality = series.modality if series.modality in ("CT", "MR", "PT") else None
    warnings = stack.warnings
    if not os.path.isdir(path) and stack.sizes[2] == 1:
        warnings = (*warnings, f"{path}: one image; give the folder to read its series")
    if stack.several:
        warnings = (*warnings, f"{path}: {stack.several}")
    if series.placeless:
        names = some_names(series.placeless)
        warnings = (
            *warnings,
            f"{path}: left out: {len(series.placeless)} images of the series that state no "
            f"position or orientation: {names}; the volume may lack planes",
        )
    if series.lost:
        warnings = (
            *warnings,
            f"{path}: left out: {len(series.lost)} empty or linked to nothing: "
            f"{some_names(series.lost)}; the volume may lack planes. {AGAIN}",
        )
    planes = [plane for plane in stack.volumes[0] if series.files[plane.path].table is None]
    warnings = (*warnings, *doubts(path, series.modality, planes))
    return Header(
        path=path,
        format="dicom",
        sizes=stack.sizes,
        affine=stack.affine,
        dtype=np.dtype(f"{kind}{max(1, first.bits // 8)}"),
        volumes=len(stack.volumes),
        modality=cast(Literal["CT", "MR", "PT"] | None, modality),
        warnings=warnings,
        left_out=series.left_out,
    )


def _series(path: str, reading: Reading) -> _Series:
    """Return the series that is read, and what else lies there."""
    found, others = contents(path)
    lost = [name for name in lost_in(path) if not name.lower().endswith(_NEVER)]
    others = [name for name in others if name not in lost]
    left_out = [f"{len(others)} without DICOM: {some_names(others)}"] if others else []
    left_out += [f"{len(lost)} empty or linked to nothing: {some_names(lost)}"] if lost else []
    images, more = _images(path, found)
    left_out += more
    placed = set(map(id, images))
    bare = [file for file in found if file.what == "image" and id(file) not in placed]
    keys = series_keys(images)
    chosen = _chosen(path, keys, reading)
    for key, group in keys.items():
        if key != chosen:
            names = [os.path.basename(file.path) for file in group]
            left_out.append(f"{len(group)} of another series ({key}): {some_names(names)}")
    group = keys[chosen]
    stack = stacked(path, [plane for file in group for plane in file.planes], more)
    files = {file.path: file for file in group}
    for file in {files[plane.path].syntax: files[plane.path]
                 for plane in stack.volumes[0]}.values():  # fmt: skip
        check_decoder(file)
    check_size(path, stack.sizes, np.dtype(np.int32))
    return _Series(
        files=files,
        stack=stack,
        modality=group[0].modality,
        left_out=(*left_out, *stack.left_out),
        placeless=tuple(os.path.basename(f.path) for f in bare if f.series == group[0].series),
        lost=tuple(lost),
    )


def some_names(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _images(path: str, found: Sequence[DicomFile]) -> tuple[list[DicomFile], list[str]]:
    """Return the files with images that have a place, and the others with their number."""
    left_out = []
    others: dict[str, list[str]] = defaultdict(list)
    images = []
    for file in found:
        if file.what != "image":
            others[file.what].append(os.path.basename(file.path))
        elif not any(plane.position and plane.orientation for plane in file.planes):
            others["image without position"].append(os.path.basename(file.path))
        else:
            images.append(file)
    for what, names in sorted(others.items()):
        hint = ""
        if what == "RTSTRUCT":
            hint = f" ({CONTOURS})"
        if what == "segmentation":
            hint = " (give the file itself as the label)"
        left_out.append(f"{len(names)} {what}: {some_names(names)}{hint}")
    if not images:
        found_here = "; ".join(left_out) or "nothing of DICOM"
        raise DataError(
            f"{path}: holds no DICOM image with a position in the patient. Found: {found_here}."
        )
    return images, left_out


def _chosen(path: str, keys: Mapping[str, list[DicomFile]], reading: Reading) -> str:
    """Return the key of the series that is read."""
    if reading.series is not None:
        if reading.series in keys:
            return reading.series
        raise DataError(
            f"{path}: there is no series {reading.series!r}; found {_listed(keys)}."
            + nearest(reading.series, keys)
        )
    real = {
        key: group
        for key, group in keys.items()
        if not all(plane.is_localizer for file in group for plane in file.planes)
    }
    candidates = list(real or keys)
    if len(candidates) > 1:
        raise DataError(
            f"{path}: holds {len(candidates)} series: {_listed(real or keys)}. Choose one with "
            "`series: <key>`, read several as modalities with their contrasts, or put each in a "
            "folder of its own." + in_words("series=<key>")
        )
    return candidates[0]


def _listed(keys: Mapping[str, list[DicomFile]]) -> str:
    return "; ".join(
        f"{key}{f' ({group[0].word})' if group[0].word else ''} with "
        f"{sum(len(file.planes) for file in group)} images such as "
        f"{names_of(group[0].planes[:1])}"
        for key, group in keys.items()
    )


def _stored(files: Mapping[str, DicomFile], planes: Sequence[Plane]) -> list[Array]:
    """Return the stored numbers of planes, (rows, columns) each; a file is decoded once."""
    wanted: dict[str, list[int]] = defaultdict(list)
    for plane in planes:
        wanted[plane.path].append(plane.frame)
    decoded = {}
    for path, frames in wanted.items():
        for frame, pixels in zip(frames, decode(files[path], frames), strict=True):
            decoded[path, frame] = pixels
    return [decoded[plane.path, plane.frame] for plane in planes]


def _valid(
    files: Mapping[str, DicomFile], planes: Sequence[Plane], stored: Sequence[Array]
) -> Array | None:
    """Return where no padding lies, (columns, rows, planes); None where there is none."""
    if all(files[plane.path].padding is None for plane in planes):
        return None
    valid = np.ones((*stored[0].T.shape, len(planes)), bool)
    for k, (plane, pixels) in enumerate(zip(planes, stored, strict=True)):
        padding = files[plane.path].padding
        if padding is not None:
            valid[:, :, k] = ~((pixels >= padding[0]) & (pixels <= padding[1])).T
    return valid


def _values(
    path: str, files: Mapping[str, DicomFile], planes: Sequence[Plane], stored: Sequence[Array]
) -> Array:
    """Return values, (columns, rows, planes): each plane by its own slope or table.

    Whole numbers where all slopes and intercepts are whole, else float32.
    """
    for plane, pixels in zip(planes, stored, strict=True):
        if pixels.shape != (plane.rows, plane.columns):
            raise DataError(
                f"{path}: {plane.name} decodes to {pixels.shape[0]} × {pixels.shape[1]} pixels, "
                f"its header has {plane.rows} × {plane.columns}. Export it again."
            )
        if plane.slope == 0 and files[plane.path].table is None and pixels.min() < pixels.max():
            raise DataError(
                f"{path}: {plane.name} has the RescaleSlope 0, by which all its values would be "
                "one. Correct it (1 if stored numbers are the values), or export the series again."
            )
    exact = all(
        files[p.path].table is not None
        or (p.slope.is_integer() and p.intercept.is_integer() and abs(p.slope) < 2**15)
        for p in planes
    ) and all(pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 4 for pixels in stored)
    shape = (*stored[0].T.shape, len(planes))
    if exact:
        ends = [_physical(files[p.path], p, np.array([s.min(), s.max()]))
                for p, s in zip(planes, stored, strict=True)]  # fmt: skip
        if all(files[p.path].table is None for p in planes):
            low, high = min(e.min() for e in ends), max(e.max() for e in ends)
        else:
            low, high = -(2**31), 2**31 - 1
        narrow = next((t for t in ("i2", "i4") if np.iinfo(t).min <= low
                       and high <= np.iinfo(t).max), "f4")  # fmt: skip
        values = np.empty(shape, narrow)
    else:
        values = np.empty(shape, np.float32)
    with np.errstate(over="ignore"):
        for k, (plane, pixels) in enumerate(zip(planes, stored, strict=True)):
            values[:, :, k] = _physical(files[plane.path], plane, pixels).T
    return values


def _physical(file: DicomFile, plane: Plane, pixels: Array) -> Array:
    """Return the values of stored numbers in float64, or whole numbers of a table."""
    if file.table is not None:
        at = pixels.astype(np.int64) - file.table.first
        found: Array = file.table.values[np.clip(at, 0, len(file.table.values) - 1)]
        return found
    return pixels.astype(np.float64) * plane.slope + plane.intercept
