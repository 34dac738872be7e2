"""From the files of an exam to volumes on one grid: resampled, cut to the foreground, measured.

Orientation is done by the reader, resampling is MONAI's; both only happen where something changes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

from domainssl.arguments import plain
from domainssl.errors import DataError
from domainssl.io.volume.cache import Exams, VolumeCache, identity_of
from domainssl.io.volume.exam import Exam
from domainssl.io.volume.geometry import check_same_grid, spacing_of
from domainssl.io.volume.prepared import Prepared, compact, halve, shifted
from domainssl.io.volume.scan import Scan, describe_scan, placed, read_labels, read_scan
from domainssl.sources.blank import only_values, say_only
from domainssl.sources.resampling import resample_labels, resample_scan, straight_grid
from domainssl.sources.volume_options import Contrast, Preparation

__all__ = ["kept_exams", "key_of", "prepare", "split_volumes"]

_log = logging.getLogger(__name__)
_said: set[str] = set()  # warnings of this process: an exam may be read in every epoch
Array = np.ndarray[Any, Any]
_VERSION = 3  # raise it when the result of `prepare` changes
_MOST_VOXELS = 2**31  # of an exam, resampled
_SAME_SIZE = 1e-3  # by which voxel sizes may differ and count as equal
_PRECISION = {"hu": 0.5}  # half a step of the unit's statistics; elsewhere a part of the value
_AIR_HU = -500.0  # below: air; the lungs lie inside of what is above
_AIR = 0.1  # of the range between the limits, where values have no unit
_OF_FILE = {"CT": "ct", "MR": "mr", "PT": "pet"}
_OTHER_NAMES = {"mri": "mr", "pt": "pet"}


@dataclass(frozen=True)
class _Grid:
    """Where voxels lie: number along each axis, and the affine to RAS mm."""

    shape: tuple[int, ...]
    affine: Array
    name: str

    @classmethod
    def of(cls, scan: Scan) -> _Grid:
        return cls(tuple(scan.values.shape[1:]), scan.affine, scan.facts.path)

    def check(self, scan: Scan, option: str) -> None:
        other = (scan.facts.path, scan.values.shape[1:], scan.affine)
        check_same_grid((self.name, self.shape, self.affine), other, option=option)

    def holds(self, scan: Scan) -> bool:
        try:
            self.check(scan, "")
        except DataError:
            return False
        return True


def prepare(
    exam: Exam, contrasts: Mapping[str, Contrast], options: Preparation, *, with_mask: bool = False
) -> Prepared:
    """Read an exam and bring its scans to one grid.

    Args:
        exam: The exam.
        contrasts: What is read, by modality key.
        options: What is done.
        with_mask: Read the segmentation map, where the exam has one.

    Raises:
        DataError: A file cannot be read, or the scans do not lie on one grid.
    """
    scans = {name: _read(exam, name, contrasts[name]) for name in contrasts if name in exam.scans}
    first = options.resample_to if options.resample_to in scans else next(iter(scans))
    option = f"data.init_args.preparation.resample_to: {first}"
    own = _Grid.of(scans[first])
    grid = _respaced(own, options.spacing_mm)
    done = _Bringer(own, grid, option if options.resample_to is None else "")
    values, valid = {}, {}
    for name, scan in scans.items():
        values[name], valid[name] = done.scan(scan)
    removed: dict[str, Array] = {}  # by file: contrasts may share one
    for name, path in exam.anonymized.items():
        if name in valid and path not in removed:
            removed[path] = done.labels(_labels(path, contrasts[name]), outside=0) != 0
        if name in valid:
            valid[name] = valid[name] & ~removed[path]
    sources = {name: _source(exam, name, scan, contrasts[name]) for name, scan in scans.items()}
    limits = {n: _limits(values[n], valid[n], contrasts[n], sources[n]) for n in values}
    mask = None
    if with_mask and exam.mask:
        mask = done.labels(_labels(exam.mask, contrasts[first]), outside=-1)
    prepared = Prepared(
        values=values,
        valid=valid,
        limits=limits,
        mask=mask,
        affine=grid.affine,
        facts={
            "air_below": {n: _air_below(limits[n], contrasts[n], sources[n]) for n in values},
            "source": {
                n: contrasts[n].sources.index(s) for n, s in sources.items() if contrasts[n].sources
            },
        },
    )
    return _cut_to_foreground(prepared, options.margin_mm) if options.foreground else prepared


def kept_exams(
    exams: Sequence[Exam],
    contrasts: Mapping[str, Contrast],
    options: Preparation,
    *,
    with_masks: bool,
) -> Exams[Exam]:
    """Return where prepared exams are kept on disk.

    Args:
        exams: All that a run may read.
        contrasts: What is read, by modality key.
        options: What is done; `cache` is one of its tiers.
        with_masks: Keep the segmentation maps too.
    """
    done = {"spacing_mm", "resample_to", "foreground", "margin_mm", "cache_half"}
    is_resampled = options.spacing_mm is not None or options.resample_to is not None
    transform = {
        "version": _VERSION,
        "contrasts": [[name, plain(contrast)] for name, contrast in contrasts.items()],  # in order
        "preparation": {name: v for name, v in plain(options).items() if name in done},
        "with_masks": with_masks,
        "monai": metadata.version("monai") if is_resampled else None,
    }
    assert options.cache != "none"
    cache = VolumeCache(transform, options.cache, options.cache_dir)
    work = partial(_compact, contrasts=contrasts, options=options, with_mask=with_masks)
    name = partial(key_of, cache=cache, options=options)
    return Exams(cache, {name(exam): exam for exam in exams}, work, name)


def key_of(exam: Exam, cache: VolumeCache, options: Preparation) -> str:
    """Return the name of a prepared exam in a cache; it changes whenever one of its files does."""
    identity = identity_of(exam.files, content=options.cache_key == "content")
    chosen = [plain(exam.series)] if exam.series else []
    return cache.key([identity, plain(exam.volumes), exam.source, *chosen])


def _compact(
    exam: Exam, contrasts: Mapping[str, Contrast], options: Preparation, with_mask: bool
) -> Prepared:
    """Prepare an exam and keep every array in the smallest type that holds it."""
    done = prepare(exam, contrasts, options, with_mask=with_mask)
    values = {name: _small(array, exam.scans[name]) for name, array in done.values.items()}
    if options.cache_half:
        for name, array in values.items():
            values[name] = halve(array, _PRECISION.get(contrasts[name].value_unit), name)
    mask = None if done.mask is None else _small(done.mask, exam.mask, is_classes=True)
    return replace(done, values=values, mask=mask)


def _small(values: Array, path: str, *, is_classes: bool = False) -> Array:
    try:
        return compact(values, is_classes=is_classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def split_volumes(exams: Sequence[Exam], contrasts: Mapping[str, Contrast]) -> list[Exam]:
    """Return an exam per volume of files that are read with `volume: split`.

    Raises:
        DataError: A header cannot be read, or files of one exam hold several numbers of volumes.
    """
    split = [name for name, contrast in contrasts.items() if contrast.reading.volume == "split"]
    out = []
    for exam in exams:
        counts = {
            name: describe_scan(exam.scans[name], contrasts[name].reading_of(exam, name)).volumes
            for name in split
            if name in exam.scans and name not in exam.volumes
        }
        several = {name: n for name, n in counts.items() if n > 1}
        if len(set(several.values())) > 1:
            raise DataError(
                f"{', '.join(exam.scans[n] for n in several)}: {list(several.values())} volumes, "
                "expected equal numbers where several modalities are split."
            )
        number = next(iter(several.values()), 1)
        if number == 1:
            out.append(exam)
            continue
        for volume in range(number):
            places = {**exam.volumes, **dict.fromkeys(several, volume)}
            out.append(replace(exam, id=f"{exam.id}#{volume}", volumes=places))
    return out


def _read(exam: Exam, name: str, contrast: Contrast) -> Scan:
    scan = read_scan(exam.scans[name], contrast.reading_of(exam, name))
    for text in {*scan.facts.warnings, *_blank(scan)} - _said:
        _said.add(text)
        _log.warning("%s", text)
    wanted = len(contrast.channels) or 1
    if len(scan.values) != wanted:
        raise DataError(
            f"{exam.scans[name]}: {len(scan.values)} channels, but modality {name!r} has {wanted}. "
            f"Name them in data.init_args.modalities.{name}.channels."
        )
    return scan


def _blank(scan: Scan) -> list[str]:
    """Say that a scan shows nothing, as files of zeros do."""
    values = only_values(scan.values, scan.valid)
    if values is None or len(set(values)) > 1:
        return []
    return [f"{scan.facts.path}: {say_only(values)}; leave the scan out, or get it again"]


def _labels(path: str, contrast: Contrast) -> Scan:
    """Read a map whose header leaves open what that of its scan leaves open."""
    return read_labels(path, replace(contrast.reading, volume=None, series=None))


def _source(exam: Exam, name: str, scan: Scan, contrast: Contrast) -> str:
    """Return what kind of scan it is, by the table, else by the file; empty where unknown."""
    source = exam.source or _OF_FILE.get(scan.facts.modality or "", "")
    source = _OTHER_NAMES.get(source, source)
    if contrast.sources and source not in contrast.sources:
        raise DataError(
            f"{exam.scans[name]}: {source or 'no source'!r}, expected one of "
            f"{', '.join(contrast.sources)}, as data.init_args.modalities.{name}.sources says. "
            "State it in the column 'source' of a manifest."
        )
    return source


def _respaced(grid: _Grid, spacing_mm: tuple[float, ...] | None) -> _Grid:
    """Return the grid with another voxel size over the same box."""
    if spacing_mm is None or (
        np.allclose(spacing_of(grid.affine), spacing_mm, rtol=_SAME_SIZE)
        and _is_straight(grid.affine)
    ):
        return grid
    shape, affine = straight_grid(grid.shape, grid.affine, spacing_mm)
    own = spacing_of(grid.affine)
    is_tiny = all(n * size < to for n, size, to in zip(grid.shape, own, spacing_mm, strict=True))
    if is_tiny or math.prod(shape) > _MOST_VOXELS:
        raise DataError(
            f"{grid.name}: {_by(grid.shape)} voxels of {_by(own)} mm; with voxels of "
            f"{_by(spacing_mm)} mm it has {_by(shape)}. Check its voxel size: a header in another "
            "unit is a usual reason (`inspect` shows it)."
        )
    return _Grid(shape, affine, grid.name)


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def _is_straight(affine: Array) -> bool:
    """Tell whether the axes of a grid are at right angles; a tilted gantry shears them."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return np.allclose(directions.T @ directions, np.eye(3), atol=_SAME_SIZE)


@dataclass(frozen=True)
class _Bringer:
    """Brings scans and label maps of an exam to its grid.

    Attributes:
        own: Grid of the scan that the others must lie on.
        grid: Where everything is brought to.
        option: What allows scans on other grids, for messages; empty where they are resampled.
    """

    own: _Grid
    grid: _Grid
    option: str

    def scan(self, scan: Scan) -> tuple[Array, Array]:
        """Return values (C, X, Y, Z) and validity (X, Y, Z) on the grid."""
        valid = np.ones(scan.values.shape[1:], bool) if scan.valid is None else scan.valid
        if self._lies_there(scan):
            return compact(scan.values), valid
        return resample_scan(scan.values, valid, scan.affine, self.grid.shape, self.grid.affine)

    def labels(self, scan: Scan, *, outside: int) -> Array:
        """Return labels (X, Y, Z) on the grid, `outside` where their own grid does not reach."""
        if scan.facts.format == "dicom-seg":  # it stores only planes that hold something
            scan = placed(scan, self.own.shape, self.own.affine)
        if self._lies_there(scan):
            return scan.values[0]
        labels = scan.values[0]
        grid = self.grid
        return resample_labels(labels, scan.affine, grid.shape, grid.affine, outside=outside)

    def _lies_there(self, scan: Scan) -> bool:
        if self.option:
            self.own.check(scan, self.option)
        return self.grid.holds(scan)


def _limits(values: Array, valid: Array, contrast: Contrast, source: str) -> Array:
    """Return lower and upper limit per channel, (C, 2) float32, measured on the whole volume."""
    if contrast.is_hu(source):
        return np.tile(np.array(contrast.window_hu, np.float32), (len(values), 1))
    limits = np.tile(np.array([0, 1], np.float32), (len(values), 1))  # where nothing is measured
    for channel, out in zip(values, limits, strict=True):
        seen = channel[valid]
        if seen.size and seen.min() >= 0:
            seen = seen[seen > 0]  # zero is the air around the body, or was cut away
        if seen.size:
            low, high = np.percentile(seen, contrast.percentiles)
            out[:] = (low, high) if high > low else (low - 0.5, low + 0.5)  # all alike
    return limits


def _air_below(limits: Array, contrast: Contrast, source: str) -> float:
    """Return the value of the first channel below which a voxel shows air."""
    if contrast.is_hu(source):
        return _AIR_HU
    low, high = (float(v) for v in limits[0])
    return low + _AIR * (high - low)


def _cut_to_foreground(done: Prepared, margin_mm: float) -> Prepared:
    """Return the box around what is not air in any scan; all of it where there is only air."""
    shown = np.zeros(next(iter(done.valid.values())).shape, bool)
    for name, values in done.values.items():
        shown |= done.valid[name] & (values[0] >= done.facts["air_below"][name])
    if not shown.any():
        return done
    box = []
    for axis, step in enumerate(spacing_of(done.affine)):
        line = np.flatnonzero(shown.any(tuple(a for a in range(3) if a != axis)))
        margin = round(margin_mm / step)
        box.append(slice(max(0, line[0] - margin), min(shown.shape[axis], line[-1] + 1 + margin)))
    x, y, z = box
    return replace(
        done,
        values={n: np.ascontiguousarray(v[:, x, y, z]) for n, v in done.values.items()},
        valid={n: np.ascontiguousarray(v[x, y, z]) for n, v in done.valid.items()},
        mask=None if done.mask is None else np.ascontiguousarray(done.mask[x, y, z]),
        affine=shifted(done.affine, [part.start for part in box]),
    )
