"""Planes of one series stacked into a grid: order, distance, tilt, and what forbids a stack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainssl.errors import DataError
from domainssl.io.volume.dicom_file import Plane
from domainssl.io.volume.geometry import LPS_TO_RAS

__all__ = ["Stack", "names_of", "stacked"]

Array = np.ndarray[Any, Any]
_ORIENTATION = 1e-3  # rounding of each of the six numbers
_SPACING = 1e-3  # relative rounding of pixel sizes
_UNEVEN = 0.1  # of the usual distance
_SAME = 0.01  # mm, or of the usual distance
_OFF_LINE = 0.1  # voxels
_FEW, _MANY = 3, 4  # a few odd planes beside at least four times as many
_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Planes in the order of their positions along the normal.

    Attributes:
        volumes: Planes of each volume; several where each place holds as many images.
        affine: (column, row, plane) to RAS mm, (4, 4).
        sizes: Columns, rows, planes.
        warnings: What is odd.
        left_out: Planes that are not part of it, with the reason.
        several: Why there are several volumes, with files and positions; empty if there are not.
    """

    volumes: tuple[tuple[Plane, ...], ...]
    affine: Array
    sizes: tuple[int, int, int]
    warnings: tuple[str, ...]
    left_out: tuple[str, ...]
    several: str = ""


def names_of(planes: Sequence[Plane], places: Sequence[float] | None = None) -> str:
    """Return the names of some planes, with their positions along the normal in mm."""
    if places is None:
        names = [plane.name for plane in planes]
    else:
        names = [f"{p.name} at {place:.6g} mm" for p, place in zip(planes, places, strict=True)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def stacked(path: str, planes: Sequence[Plane], without: Sequence[str] = ()) -> Stack:
    """Stack the planes of one series.

    Args:
        path: Path as given, for messages.
        planes: Planes in any order.
        without: What was left out before, and why, for messages.

    Raises:
        DataError: Sizes or orientations are mixed, or planes are missing, double or off the line;
            the message has the files and their positions.
    """
    kept, left_out = _placed(path, planes)
    kept, odd = _one_orientation(path, kept)
    left_out += odd
    warnings = [f"{path}: left out: {text}" for text in left_out]
    if any(plane.is_localizer for plane in kept):
        warnings.append(f"{path}: every image is marked as a localizer")
    _check_equal(path, kept)
    first = kept[0]
    row, column, normal = _directions(path, first)
    places = np.array([_along(plane, normal) for plane in kept])
    order = np.argsort(places, kind="stable")
    kept, places = [kept[n] for n in order], places[order]
    volumes, places, several = _split(path, kept, places)
    positions = np.array([plane.position for plane in volumes[0]], np.float64)
    step = _step(path, volumes[0], places, positions, normal, warnings, [*without, *left_out])
    assert first.spacing is not None
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * first.spacing[1], column * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    return Stack(
        volumes=tuple(tuple(volume) for volume in volumes),
        affine=LPS_TO_RAS @ affine,
        sizes=(first.columns, first.rows, len(volumes[0])),
        warnings=tuple(warnings),
        left_out=tuple(left_out),
        several=several,
    )


def _placed(path: str, planes: Sequence[Plane]) -> tuple[list[Plane], list[str]]:
    """Return planes that have a place and are no localizer beside others."""
    left_out = []
    placed = [p for p in planes if None not in (p.position, p.orientation, p.spacing)]
    if len(placed) < len(planes):
        others = [p for p in planes if p not in placed]
        left_out.append(f"{len(others)} without position, orientation or pixel size: "
                        f"{names_of(others)}")  # fmt: skip
    if not placed:
        raise DataError(
            f"{path}: no image has position, orientation and pixel size: {names_of(planes)}. "
            "Export the series anew, or convert it with its geometry to NIfTI."
        )
    scouts = [p for p in placed if p.is_localizer]
    if scouts and len(scouts) < len(placed):
        left_out.append(f"{len(scouts)} localizer: {names_of(scouts)}")
        placed = [p for p in placed if not p.is_localizer]
    return placed, left_out


def _clusters(planes: Sequence[Plane], same: Callable[[Plane, Plane], bool]) -> list[list[Plane]]:
    """Return groups of planes that agree with the first of their group, the largest first."""
    groups: list[list[Plane]] = []
    for plane in planes:
        for group in groups:
            if same(group[0], plane):
                group.append(plane)
                break
        else:
            groups.append([plane])
    return sorted(groups, key=len, reverse=True)


def _one_orientation(path: str, planes: Sequence[Plane]) -> tuple[list[Plane], list[str]]:
    """Return the planes of the usual orientation; a few others are left out by name."""

    def same(a: Plane, b: Plane) -> bool:
        assert a.orientation is not None and b.orientation is not None
        return bool(np.allclose(a.orientation, b.orientation, rtol=0, atol=_ORIENTATION))

    groups = _clusters(planes, same)
    odd = [plane for group in groups[1:] for plane in group]
    if odd and (len(odd) > _FEW or len(groups[0]) < _MANY * len(odd)):
        found = "; ".join(f"{len(g)} images like {names_of(g[:2])}" for g in groups[:4])
        raise DataError(
            f"{path}: the images of one series have {len(groups)} orientations: {found}. Put each "
            "orientation in a folder of its own."
        )
    return groups[0], ([f"{len(odd)} of another orientation: {names_of(odd)}"] if odd else [])


def _check_equal(path: str, planes: Sequence[Plane]) -> None:
    """Refuse planes of several sizes."""

    def same(a: Plane, b: Plane) -> bool:
        assert a.spacing is not None and b.spacing is not None
        is_close = np.allclose(a.spacing, b.spacing, rtol=_SPACING, atol=0)
        return (a.rows, a.columns) == (b.rows, b.columns) and bool(is_close)

    groups = _clusters(planes, same)
    if len(groups) == 1:
        return
    found = []
    for group in groups[:4]:
        plane = group[0]
        assert plane.spacing is not None and plane.orientation is not None
        normal = np.cross(plane.orientation[:3], plane.orientation[3:])
        places = [_along(p, normal) for p in group[:2]]
        found.append(
            f"{len(group)} of {plane.rows} × {plane.columns} pixels of "
            f"{plane.spacing[0]:.6g} × {plane.spacing[1]:.6g} mm like {names_of(group[:2], places)}"
        )
    raise DataError(
        f"{path}: the images of one series differ in size: {'; '.join(found)}. Put images of one "
        "size in a folder of their own."
    )


def _along(plane: Plane, normal: Array) -> float:
    """Return the position along the normal in mm."""
    assert plane.position is not None
    return float(np.dot(plane.position, normal))


def _directions(path: str, plane: Plane) -> tuple[Array, Array, Array]:
    """Return unit vectors along a row, along a column and along the normal."""
    assert plane.orientation is not None and plane.spacing is not None
    row, column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    is_unit = all(abs(length - 1) < 0.01 for length in lengths)
    if not is_unit or abs(np.dot(row, column)) > 0.01 or min(plane.spacing) <= 0:
        raise DataError(
            f"{path}: {plane.name} has the orientation {plane.orientation} and the pixel size "
            f"{plane.spacing}, expected two perpendicular unit vectors and sizes above 0."
        )
    row = row / lengths[0]
    column = column - row * np.dot(row, column)
    column = column / np.linalg.norm(column)
    return row, column, np.cross(row, column)


def _split(path: str, planes: list[Plane], places: Array) -> tuple[list[list[Plane]], Array, str]:
    """Tell several volumes at the same places apart; refuse single doubles.

    Returns:
        The planes of each volume, the places of one, and why there are several.
    """
    gaps = np.diff(places)
    wide = gaps[gaps > _SAME]
    tolerance = min(_SAME, 0.05 * float(np.median(wide))) if wide.size else _SAME
    starts = np.flatnonzero(np.r_[True, gaps > tolerance])
    groups = np.split(np.arange(len(planes)), starts[1:])
    counts = Counter(len(group) for group in groups)
    if set(counts) == {1}:
        return [planes], places, ""
    doubles = [n for group in groups if len(group) > 1 for n in group]
    shown = names_of([planes[n] for n in doubles], [float(places[n]) for n in doubles])
    if len(counts) > 1:
        raise DataError(
            f"{path}: several images lie at one place, {len(doubles)} in all: {shown}. Remove the "
            "copies, or put each acquisition in a folder of its own."
        )
    [times] = counts
    found = _told_apart(planes, groups)
    if found is None:
        raise DataError(
            f"{path}: {times} images lie at each of {len(groups)} places, with nothing that tells "
            f"them apart: {shown}. Remove the copies, or put each acquisition in a folder of its "
            "own."
        )
    name, volumes = found
    reason = f"{times} images lie at each of {len(groups)} places, which differ in {name}: {shown}"
    return volumes, places[starts], reason


def _told_apart(
    planes: Sequence[Plane], groups: Sequence[Array]
) -> tuple[str, list[list[Plane]]] | None:
    """Return the attribute by which every place holds the same images, and the volumes."""
    for name, _ in planes[0].phases:
        values = [
            sorted(((dict(planes[n].phases).get(name, ""), int(n)) for n in group), key=_numeric)
            for group in groups
        ]
        ordered = [[value for value, _ in group] for group in values]
        if len(set(ordered[0])) == len(ordered[0]) and all(o == ordered[0] for o in ordered):
            count = len(ordered[0])
            return name, [[planes[group[v][1]] for group in values] for v in range(count)]
    return None


def _numeric(entry: tuple[str, int]) -> tuple[float, str]:
    try:
        return float(entry[0]), entry[0]
    except ValueError:
        return float("inf"), entry[0]


def _step(
    path: str, planes: Sequence[Plane], places: Array, positions: Array, normal: Array,
    warnings: list[str], left_out: Sequence[str],
) -> Array:  # fmt: skip
    """Return the vector from one plane to the next in LPS mm."""
    if len(planes) == 1:
        size = planes[0].step
        if size is None:
            warnings.append(f"{path}: one image without a slice thickness, taken for 1 mm")
        return normal * (size or 1.0)
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    wrong = np.flatnonzero(np.abs(gaps - usual) > max(_UNEVEN * usual, _SAME))
    if wrong.size:
        at = int(wrong[0])
        pair = names_of(planes[at : at + 2], [float(p) for p in places[at : at + 2]])
        missing = round(float(gaps[at]) / usual) - 1
        hint = f", as if {missing} were missing" if missing > 0 else ""
        before = f" Left out before: {'; '.join(left_out)}." if left_out else ""
        raise DataError(
            f"{path}: the images are not equally spaced: {gaps[at]:.6g} mm between {pair}{hint}, "
            f"{usual:.6g} mm elsewhere; {wrong.size} of {len(gaps)} distances differ.{before} Add "
            "the missing images, or convert the series with resampling to NIfTI."
        )
    step: Array = (positions[-1] - positions[0]) / (len(planes) - 1)
    line = positions[0] + np.arange(len(planes))[:, None] * step
    aside = positions - line
    aside -= (aside @ normal)[:, None] * normal
    distances = np.linalg.norm(aside, axis=1)
    assert planes[0].spacing is not None
    if distances.max() > max(_OFF_LINE * min(planes[0].spacing), _SAME):
        worst = int(distances.argmax())
        raise DataError(
            f"{path}: {names_of([planes[worst]], [float(places[worst])])} lies "
            f"{distances[worst]:.4g} mm beside the line of the others. Put each acquisition in a "
            "folder of its own."
        )
    shift = step - np.dot(step, normal) * normal
    if np.linalg.norm(shift) * (len(planes) - 1) > _OFF_LINE * min(planes[0].spacing):
        tilt = np.degrees(np.arctan2(np.linalg.norm(shift), abs(np.dot(step, normal))))
        warnings.append(
            f"{path}: the images are shifted against each other (gantry tilt of {tilt:.3g} "
            "degrees): the affine is sheared, and resampling to a straight grid removes it"
        )
    return step
