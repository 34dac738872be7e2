"""One grid of tiles per slide, with integer rows and columns, restricted to tissue and regions.

grid = plan_grid(slide, 256, 0.5)       # grid.coords (N, 2), level-0 x and y, row by row
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from domainssl.errors import ConfigError
from domainssl.io.slide.pyramid import Slide
from domainssl.io.slide.regions import Regions
from domainssl.io.slide.tissue import TissueMask, TissueOptions, slide_tissue

__all__ = ["TileGrid", "plan_grid"]

Array = np.ndarray[Any, Any]
MIN_TISSUE = 0.2
MIN_REGION = 0.5


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """Tiles of a slide, row by row.

    Attributes:
        coords: Upper left corners in level-0 pixels, x and y, (N, 2) int64.
        rows: Row of every tile in the grid, (N,) int64.
        columns: Column of every tile in the grid, (N,) int64.
        shape: Rows and columns of the whole grid.
        size_level0: Width and height of a tile in level-0 pixels.
        step_level0: Distance of tiles in level-0 pixels, x and y.
        size_px: Side of a tile as it is read.
        overlap_px: Pixels that neighbours share.
        mpp_um: Micrometres per pixel of a tile as it is read.
        tissue_fraction: Share of tissue in every tile, (N,) float64.
        labels: Name of the region of every tile, (N,) str; None without regions.
    """

    coords: Array
    rows: Array
    columns: Array
    shape: tuple[int, int]
    size_level0: tuple[int, int]
    step_level0: tuple[int, int]
    size_px: int
    overlap_px: int
    mpp_um: float
    tissue_fraction: Array
    labels: Array | None = None

    def __len__(self) -> int:
        return len(self.coords)

    def only(self, chosen: Array) -> TileGrid:
        """Return some of the tiles, by their numbers (N,)."""
        return replace(
            self,
            coords=self.coords[chosen],
            rows=self.rows[chosen],
            columns=self.columns[chosen],
            tissue_fraction=self.tissue_fraction[chosen],
            labels=None if self.labels is None else self.labels[chosen],
        )


def plan_grid(
    slide: Slide,
    size_px: int = 256,
    mpp_um: float = 0.5,
    overlap_px: int = 0,
    min_tissue: float = MIN_TISSUE,
    regions: Regions | None = None,
    *,
    min_region: float = MIN_REGION,
    partial: bool = False,
    tissue: TissueMask | TissueOptions | None = None,
) -> TileGrid:
    """Lay one grid over a slide and keep the tiles that hold tissue.

    The grid starts at the corner of level 0 and has the same step everywhere, so row and column
    say where a tile lies.

    Args:
        slide: The slide.
        size_px: Side of a tile in pixels.
        mpp_um: Micrometres per pixel of a tile.
        overlap_px: Pixels that neighbours share.
        min_tissue: Least share of tissue in a tile, counted by area; 0 keeps all and looks for
            none.
        regions: Keep tiles inside these, and label them.
        min_region: Least share of regions in a tile.
        partial: Whether tiles may reach beyond the slide.
        tissue: The mask if it is there already, or how it is made.

    Raises:
        ConfigError: Sizes or shares are impossible.
        DataError: The resolution is not known, the slide is coarser than asked for, or damaged.
    """
    _check(size_px, mpp_um, overlap_px, min_tissue, min_region)
    mpp = slide.facts.resolution()
    slide.check_scale(mpp_um)
    size = _whole(size_px * mpp_um / mpp[0]), _whole(size_px * mpp_um / mpp[1])
    kept_px = size_px - overlap_px
    step = _whole(kept_px * mpp_um / mpp[0]), _whole(kept_px * mpp_um / mpp[1])
    columns, rows = (
        _count(length, size[n], step[n], partial) for n, length in enumerate(slide.facts.size)
    )
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int64), max(columns, 1))
    coords = np.stack([column * step[0], row * step[1]], -1)
    fraction = np.ones(len(coords))
    if min_tissue > 0 and len(coords):
        mask = tissue if isinstance(tissue, TissueMask) else slide_tissue(slide, tissue)
        fraction = mask.fractions(coords, size)
    keep = fraction >= min_tissue
    labels = None
    if regions is not None:
        names, share = regions.under(coords, size, slide.facts.size)
        keep &= share >= min_region
        labels = names[keep]
    return TileGrid(
        coords=coords[keep],
        rows=row[keep],
        columns=column[keep],
        shape=(rows, columns),
        size_level0=size,
        step_level0=step,
        size_px=size_px,
        overlap_px=overlap_px,
        mpp_um=float(mpp_um),
        tissue_fraction=fraction[keep],
        labels=labels,
    )


def _whole(length: float) -> int:
    return max(1, round(length))


def _count(length: int, size: int, step: int, partial: bool) -> int:
    if partial:
        return -(-length // step)
    return max(0, (length - size) // step + 1) if length >= size else 0


def _check(
    size_px: int, mpp_um: float, overlap_px: int, min_tissue: float, min_region: float
) -> None:
    if size_px < 1 or not 0 <= overlap_px < size_px:
        raise ConfigError(
            f"tile grid: got tiles of {size_px!r} pixels with an overlap of {overlap_px!r}, "
            "expected a positive size and an overlap below it."
        )
    if not 0 < mpp_um < float("inf"):
        raise ConfigError(f"tile grid: got {mpp_um!r} um per pixel, expected more than 0.")
    for name, value in (("min_tissue", min_tissue), ("min_region", min_region)):
        if not 0 <= value <= 1:
            raise ConfigError(f"tile grid: got {name} {value!r}, expected a share from 0 to 1.")
