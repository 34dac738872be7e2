"""From the files of an exam to volumes on one grid: resampled, cut to the foreground, measured.

Orientation is done by the reader, resampling is MONAI's; both only happen where something changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from domainssl.errors import DataError, require
from domainssl.io.volume.exams import Exam
from domainssl.io.volume.geometry import check_same_grid, spacing_of
from domainssl.io.volume.prepared import Prepared, compact, shifted
from domainssl.io.volume.scan import Scan, read_labels, read_scan
from domainssl.sources.volume_options import Contrast, Preparation

__all__ = ["prepare"]

Array = np.ndarray[Any, Any]
_SAME_SIZE = 1e-3  # by which voxel sizes may differ and count as equal
_AIR_HU = -500.0  # below: air; the lungs lie inside of what is above
_AIR = 0.1  # of the range between the limits, where values have no unit
_OF_FILE = {"CT": "ct", "MR": "mr", "PT": "pet"}
_OTHER_NAMES = {"mri": "mr", "pt": "pet"}
_WHOLLY = 0.999  # share of valid voxels that an interpolated one is made of


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
    if exam.anonymized:
        shown = done.labels(_labels(exam.anonymized, contrasts[first])) == 0
        valid = {name: seen & shown for name, seen in valid.items()}
    sources = {name: _source(exam, name, scan, contrasts[name]) for name, scan in scans.items()}
    limits = {n: _limits(values[n], valid[n], contrasts[n], sources[n]) for n in values}
    mask = None
    if with_mask and exam.mask:
        mask = done.labels(_labels(exam.mask, contrasts[first]))
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


def _read(exam: Exam, name: str, contrast: Contrast) -> Scan:
    reading = contrast.reading
    if name in exam.volumes and reading.volume is None:
        reading = replace(reading, volume=exam.volumes[name])
    scan = read_scan(exam.scans[name], reading)
    wanted = len(contrast.channels) or 1
    if len(scan.values) != wanted:
        raise DataError(
            f"{exam.scans[name]}: {len(scan.values)} channels, but modality {name!r} has {wanted}. "
            f"Name them in data.init_args.modalities.{name}.channels."
        )
    return scan


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
    """Return the straight grid of another voxel size over the same box, as MONAI lays it."""
    if spacing_mm is None or (
        np.allclose(spacing_of(grid.affine), spacing_mm, rtol=_SAME_SIZE)
        and _is_straight(grid.affine)
    ):
        return grid
    utils: Any = require("monai.data.utils", "medical")
    affine = utils.zoom_affine(grid.affine, spacing_mm, diagonal=False)
    shape, offset = utils.compute_shape_offset(grid.shape, grid.affine, affine)
    affine[:3, 3] = np.asarray(offset)[:3]
    return _Grid(tuple(int(n) for n in shape), affine, grid.name)


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
        moved = _resample(scan.values, scan.affine, self.grid, "bilinear")
        weight = _resample(valid[None], scan.affine, self.grid, "bilinear")
        return moved, weight[0] > _WHOLLY

    def labels(self, scan: Scan) -> Array:
        """Return labels (X, Y, Z) on the grid; outside of their own grid they are 0."""
        if self._lies_there(scan):
            return scan.values[0]
        labels = _resample(scan.values, scan.affine, self.grid, "nearest")
        return labels[0].round().astype(scan.values.dtype)

    def _lies_there(self, scan: Scan) -> bool:
        if self.option:
            self.own.check(scan, self.option)
        return self.grid.holds(scan)


def _resample(values: Array, affine: Array, grid: _Grid, mode: str) -> Array:
    """Resample (C, X, Y, Z) to a grid; outside of the values' own grid there are zeros."""
    transforms: Any = require("monai.transforms", "medical")
    meta: Any = require("monai.data.meta_tensor", "medical")
    tensor = meta.MetaTensor(
        torch.from_numpy(values.astype(np.float32)), affine=torch.from_numpy(affine)
    )
    resample = transforms.SpatialResample(mode=mode, padding_mode="zeros", dtype=np.float32)
    out = resample(tensor, dst_affine=torch.from_numpy(grid.affine), spatial_size=grid.shape)
    return np.asarray(out.as_tensor().numpy())


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
