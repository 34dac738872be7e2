"""A feature bag: what an encoder said about the tiles of one slide, and where they lie."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from domainssl.errors import DataError

__all__ = [
    "Bag", "Cells", "FeatureGrid", "cells_of", "check_step", "places_of", "spacing_of", "to_grid",
    "unlike_features",
]  # fmt: skip

_log = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]
_TOLERANCE = 0.05  # of a step, beyond which a tile is not on the lattice
_MOST_BYTES = 2**33  # of a grid
_SIZE_ADVICE = (
    "TRIDENT writes patch_size_level0 beside coords; CLAM writes patch_size, patch_level and "
    "downsample into patches/<slide>.h5 alone: give that folder (patches=…, "
    "data.init_args.slides.patches). For coordinates with patch_size and patch_level but without "
    "downsample give that of the slide's level (level_downsample=…, slides.level_downsample); for "
    "others the side of a tile in pixels of level 0 (patch_size_level0=…, "
    "slides.patch_size_level0)."
)
_LARGEST = 1e6  # of a feature; encoders write some hundred
_CROWDED = 4  # tiles of different places, from which on their distances are looked at


@dataclass(frozen=True, kw_only=True)
class Bag:
    """Features of the tiles of one slide.

    Attributes:
        slide: Name of the slide.
        features: float32 (N, D).
        coords: Top-left corner of every tile, (x, y) in pixels of level 0, int64 (N, 2); None
            where the file holds none.
        patch_size_level0: Side of a tile in pixels of level 0; None where it is not known.
        aspect: Height of a tile at level 0 by its width; pixels need not be square.
        overlap_level0: Pixels of level 0 that neighbouring tiles share.
        patch_size: Side of a tile in the pixels that the encoder saw; None where unknown.
        mpp_um: Microns per pixel of the tiles; None where unknown.
        level0_mpp_um: Microns per pixel of the slide; None where unknown.
        level0_size: Width and height of the slide; None where unknown.
        encoder: What the features come from; empty where unknown.
        layout: `clam`, `trident`, `zarr` or `tensor`.
        dtype: Type that the features are stored in.
        path: The file, for messages.
        attributes: All that the file says besides, as plain data.
    """

    slide: str
    features: Array
    coords: Array | None
    patch_size_level0: int | None = None
    aspect: float = 1.0
    overlap_level0: int = 0
    patch_size: int | None = None
    mpp_um: float | None = None
    level0_mpp_um: float | None = None
    level0_size: tuple[int, int] | None = None
    encoder: str = ""
    layout: str = ""
    dtype: str = "float32"
    path: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.features)

    @property
    def dim(self) -> int:
        """Width of the features, D."""
        return int(self.features.shape[1])

    @property
    def step(self) -> int:
        """Distance between neighbouring tiles in pixels of level 0.

        Raises:
            DataError: The file does not say how large a tile is, so that nothing has a place.
        """
        if self.coords is None or self.patch_size_level0 is None:
            lacking = "coordinates" if self.coords is None else "the size of a tile at level 0"
            raise DataError(
                f"{self.path or self.slide}: a bag without {lacking}, which a grid needs. "
                f"{_SIZE_ADVICE}"
            )
        return self.patch_size_level0 - self.overlap_level0


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Where the tiles of a bag lie on the lattice that most of them share.

    Attributes:
        rows: int64 (N,), from 0.
        columns: int64 (N,), from 0.
        shape: Rows R and columns C that hold all tiles.
        origin: (x, y) of the first cell in pixels of level 0.
        step: Distance between cells in pixels of level 0, along x.
        off_lattice: Number of tiles more than a twentieth of a step away from it; they count to
            the cell that holds their corner.
    """

    rows: Array
    columns: Array
    shape: tuple[int, int]
    origin: tuple[int, int]
    step: int
    off_lattice: int


@dataclass(frozen=True, kw_only=True)
class FeatureGrid:
    """Features laid out as their tiles lie.

    Attributes:
        features: float32 (D, R, C); zero where no tile is, which `occupied` tells from a feature
            that is zero.
        occupied: bool (R, C), True where a tile with finite features is.
        counts: Tiles in every cell, int64 (R, C); their features were averaged.
        origin: (x, y) of the first cell in pixels of level 0.
        step: Distance between cells in pixels of level 0, along x.
        off_lattice: See `Cells`.
        not_finite: Tiles left out because a feature of theirs is not finite.
        aspect: Distance along y by that along x.
    """

    features: Array
    occupied: Array
    counts: Array
    origin: tuple[int, int]
    step: int
    off_lattice: int
    not_finite: int
    aspect: float = 1.0

    @property
    def shared_cells(self) -> int:
        """Number of cells with more than one tile."""
        return int(np.count_nonzero(self.counts > 1))


def cells_of(bag: Bag) -> Cells:
    """Find the lattice of a bag and the cell of every tile.

    Raises:
        DataError: The bag says nothing about places, or is empty.
    """
    step = check_step(bag)
    if len(bag) == 0:
        raise DataError(f"{bag.path or bag.slide}: no tile, so there is no grid.")
    _check_inside(bag)
    coords = _squared(bag)
    phases, numbers = np.unique(coords % step, axis=0, return_counts=True)
    phase = phases[numbers.argmax()]
    origin = phase + (coords.min(0) - phase) // step * step
    places = (coords - origin) / step
    nearest = np.rint(places)
    on_lattice = (np.abs(places - nearest) <= _TOLERANCE).all(1)
    cells = np.where(on_lattice[:, None], nearest, np.floor(places)).astype(np.int64)
    first = cells.min(0)
    cells -= first
    origin = origin + first * step
    columns, rows = cells.T
    _check_spread(bag, len(np.unique(cells, axis=0)), step)
    return Cells(
        rows=rows,
        columns=columns,
        shape=(int(rows.max()) + 1, int(columns.max()) + 1),
        origin=(int(origin[0]), round(int(origin[1]) * bag.aspect)),
        step=step,
        off_lattice=int(np.count_nonzero(~on_lattice)),
    )


def check_step(bag: Bag) -> int:
    """Return the distance between neighbouring tiles in pixels of level 0.

    Raises:
        DataError: The bag does not say it, or tiles overlap by their size.
    """
    step = bag.step
    if step < 1 or bag.overlap_level0 < 0:
        raise DataError(
            f"{bag.path or bag.slide}: tiles of {bag.patch_size_level0} pixels overlap by "
            f"{bag.overlap_level0}; expected 0 or more, and less than their size. Correct the "
            "attributes."
        )
    return step


def _squared(bag: Bag) -> Array:
    """Return x and y of every tile, (N, 2), y as if pixels were square."""
    assert bag.coords is not None  # those who ask have looked
    if bag.aspect == 1:
        return bag.coords
    return np.stack([bag.coords[:, 0], np.rint(bag.coords[:, 1] / bag.aspect)], 1).astype(np.int64)


def unlike_features(features: Array) -> list[str]:
    """Say what no encoder writes for the tiles of a slide.

    Args:
        features: Of one slide, (N, D).
    """
    found, count = [], len(features)
    finite = np.isfinite(features).all(1)
    if not finite.all():
        lost = count - int(finite.sum())
        found.append(f"{lost} of {count} tiles have features not finite and do not count")
    kept = features[finite]
    zeros = int(np.count_nonzero(~kept.any(1)))
    if zeros:
        found.append(f"{zeros} of {count} tiles have nothing but zeros as features")
    elif len(kept) >= _CROWDED and (kept == kept[0]).all():
        found.append(f"all {len(kept)} tiles have the same features")
    if kept.size and np.abs(kept).max() > _LARGEST:
        found.append(f"features reach {np.abs(kept).max():.3g}, expected at most some thousand")
    return found


def places_of(bag: Bag) -> tuple[Array, tuple[int, int], int]:
    """Return row and column of every tile in tiles, (N, 2), and origin and step at level 0.

    Where nothing states the size of a tile, the distance of neighbours is the step, said once. A
    grid is not made so: it would stand for a size that nobody stated.

    Raises:
        DataError: The bag says nothing about places, or is empty.
    """
    if bag.patch_size_level0 is None and bag.coords is not None and len(bag):
        step = spacing_of(bag.coords)
        if step is None:
            raise DataError(
                f"{bag.path or bag.slide}: nothing states the size of a tile at level 0, and the "
                f"places of its {len(bag)} tiles do not tell it. {_SIZE_ADVICE}"
            )
        _tell_spacing(step)
        bag = replace(bag, patch_size_level0=step, overlap_level0=0)
    cells = cells_of(bag)
    assert bag.coords is not None  # `cells_of` has looked
    places = (bag.coords - np.array(cells.origin)) / (cells.step * np.array([1, bag.aspect]))
    return np.ascontiguousarray(places[:, ::-1], np.float32), cells.origin, cells.step


@cache
def _tell_spacing(step: int) -> None:
    _log.warning(
        "bags that state no size of a tile: neighbours lie %d pixels of level 0 apart, which is "
        "taken for one step. Where that is wrong, set data.init_args.slides.patch_size_level0.",
        step,
    )


def spacing_of(coords: Array) -> int | None:
    """Return how far neighbours lie apart in their row or column, None where that is not clear."""
    if len(np.unique(coords, axis=0)) == 1:
        return 1  # a single place is the first one, whatever the step
    parts = []
    for along, across in ((0, 1), (1, 0)):
        ordered = coords[np.lexsort((coords[:, along], coords[:, across]))]
        gaps = np.diff(ordered[:, along])[np.diff(ordered[:, across]) == 0]
        parts.append(gaps[gaps > 0])
    gaps = np.concatenate(parts)
    steps = {int(p.min()) for p in parts if len(p) > _CROWDED and np.gcd.reduce(p) == p.min()}
    if len(gaps) < _CROWDED or len(steps) > 1:  # too few, or pixels that are not square
        return None
    if np.gcd.reduce(gaps) == gaps.min():  # one lattice, however sparse
        return int(gaps.min())
    sizes, counts = np.unique(gaps, return_counts=True)  # a lattice per contour, as of CLAM
    step = int(sizes[counts.argmax()])
    is_clear = 2 * counts.max() >= len(gaps) and np.mean(gaps < step) <= _TOLERANCE
    return step if is_clear else None


def _check_inside(bag: Bag) -> None:
    """Refuse tiles beyond the slide that the file states: they have another place."""
    assert bag.coords is not None
    last = bag.coords.min(0) + (bag.patch_size_level0 or 0)
    if (last <= 0).any():
        x, y = bag.coords.min(0)
        raise DataError(
            f"{bag.path or bag.slide}: a tile at x {x} and y {y} of {bag.patch_size_level0} pixels "
            "lies beyond the upper left corner of the slide. Expected (x, y) in pixels of level 0, "
            "from 0 on; correct coords."
        )
    if bag.level0_size is None:
        return
    ends = bag.coords.max(0)
    if (ends >= bag.level0_size).any():
        width, height = bag.level0_size
        is_swapped = (ends[::-1] < bag.level0_size).all()
        hint = "x and y seem to be swapped" if is_swapped else "they may be of another level"
        raise DataError(
            f"{bag.path or bag.slide}: the last tiles lie at x {ends[0]} and y {ends[1]}, but the "
            f"slide has {width} x {height} pixels at level 0: {hint}. Expected (x, y) of the upper "
            "left corner in pixels of level 0; correct coords, or level0_width and level0_height."
        )


def _check_spread(bag: Bag, count: int, step: int) -> None:
    """Refuse coordinates that lie closer than tiles can: most features would be averaged away."""
    assert bag.coords is not None
    places = len(np.unique(bag.coords, axis=0))
    if len(bag) >= _CROWDED and not bag.coords.any():
        raise DataError(
            f"{bag.path or bag.slide}: all {len(bag)} tiles lie at x 0 and y 0, so that their "
            "places are not known. Write coords again, (x, y) of every tile at level 0."
        )
    if places >= _CROWDED and 2 * count <= places:
        raise DataError(
            f"{bag.path or bag.slide}: {places} tiles lie in {count} cells of {step} pixels of "
            "level 0, so the size of a tile and the coordinates contradict each other. Expected "
            "coordinates in pixels of level 0, not counts of tiles or pixels of another level; "
            "correct them, or patch_size_level0."
        )


def to_grid(bag: Bag, *, legacy_titan_grid: bool = False) -> FeatureGrid:
    """Lay the features of a bag out on a grid.

    Args:
        bag: A bag whose tiles have a place and a size.
        legacy_titan_grid: Do as TITAN's released code: cells from the smallest coordinates,
            features of one cell summed, x along the first axis (R), and a cell whose features are
            all zero is background. Only for its released weights.

    Raises:
        DataError: The bag says nothing about places, is empty, or its grid is too large.
    """
    if legacy_titan_grid:
        return _legacy(bag)
    cells = cells_of(bag)
    finite: Array = np.asarray(np.isfinite(bag.features).all(1))
    sums, counts = _scatter(bag, cells.rows[finite], cells.columns[finite], cells.shape, finite)
    sums /= np.maximum(counts, 1)
    return FeatureGrid(
        features=sums,
        occupied=counts > 0,
        counts=counts,
        origin=cells.origin,
        step=cells.step,
        off_lattice=cells.off_lattice,
        not_finite=int(np.count_nonzero(~finite)),
        aspect=bag.aspect,
    )


def _scatter(
    bag: Bag, rows: Array, columns: Array, shape: tuple[int, int], chosen: Array
) -> tuple[Array, Array]:
    """Sum the features of every cell, float32 (D, R, C), and count them, int64 (R, C)."""
    size = shape[0] * shape[1]
    if size * bag.dim * 4 > _MOST_BYTES:
        raise DataError(
            f"{bag.path or bag.slide}: a grid of {shape[0]} x {shape[1]} cells of {bag.dim} "
            f"features takes {size * bag.dim * 4 / 1e9:.3g} GB. Coordinates that far apart are "
            "damaged, or the slide is better read in regions (SlideFeatureDataModule)."
        )
    flat = rows * shape[1] + columns
    sums = np.zeros((size, bag.dim), np.float32)
    np.add.at(sums, flat, bag.features[chosen])
    counts = np.bincount(flat, minlength=size).reshape(shape)
    return np.ascontiguousarray(sums.T).reshape(bag.dim, *shape), counts


def _legacy(bag: Bag) -> FeatureGrid:
    step = bag.step + bag.overlap_level0  # the released code knows no overlap
    assert bag.coords is not None
    if len(bag) == 0:
        raise DataError(f"{bag.path or bag.slide}: no tile, so there is no grid.")
    _check_inside(bag)
    coords = _squared(bag)
    origin = coords.min(0)
    along_x, along_y = ((coords - origin) // step).T
    shape = (int(along_x.max()) + 1, int(along_y.max()) + 1)
    everything = np.ones(len(bag), bool)
    sums, counts = _scatter(bag, along_x, along_y, shape, everything)
    return FeatureGrid(
        features=sums,
        occupied=(sums != 0).any(0),
        counts=counts,
        origin=(int(origin[0]), round(int(origin[1]) * bag.aspect)),
        step=step,
        off_lattice=0,
        not_finite=int(np.count_nonzero(~np.isfinite(bag.features).all(1))),
        aspect=bag.aspect,
    )
