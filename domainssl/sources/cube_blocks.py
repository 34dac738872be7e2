"""Blocks of sites, and which of them are held out.

A block is a rectangle whose edges lie on borders of the largest chunks; it is what one read
decodes. Its windows never leave it, so training and held-out windows share no pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from domainssl.errors import ConfigError, nearest, require
from domainssl.io.raster.grid import METRES_PER_DEGREE, Bounds
from domainssl.io.raster.layer import StoredBand
from domainssl.sources.cube_options import Layer, snap_m
from domainssl.sources.cube_sites import Site
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window

_EDGE_POINTS = 5  # looked at along each edge of a rectangle that is turned into degrees

__all__ = ["Block", "blocks_of", "hold_out", "overlapping"]


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of a site and the windows in it.

    Attributes:
        site: Number of the site.
        bounds: The rectangle, in CRS units.
        across: Windows from west to east.
        down: Windows from north to south.
    """

    site: int
    bounds: Bounds
    across: int
    down: int

    @property
    def count(self) -> int:
        """Number of windows."""
        return self.across * self.down


def blocks_of(number: int, site: Site, layers: Mapping[str, Layer], window: Window) -> list[Block]:
    """Cut a site into blocks along the borders of its largest chunks."""
    snap = snap_m(layers) / site.metres
    height, width = (cells * snap for cells in window.shape)
    bands = [b for layer in site.layers.values() for b in layer.files[0].bands]
    wide = max(bands, key=lambda b: b.chunk[1] * b.grid.step)
    high = max(bands, key=lambda b: b.chunk[0] * b.grid.step)
    xs = _edges(
        site.bounds.left, site.bounds.right, wide.grid.left, wide.chunk[1] * wide.grid.step,
        width, snap, window.per_block,
    )  # fmt: skip
    # from north to south: coordinates with their sign turned grow like columns do
    ys = _edges(
        -site.bounds.top, -site.bounds.bottom, -_first_chunk_edge(high),
        high.chunk[0] * high.grid.step, height, snap, window.per_block,
    )  # fmt: skip
    return [
        Block(
            number,
            Bounds(x0, -y1, x1, -y0),
            int((x1 - x0) / width + 1e-6),
            int((y1 - y0) / height + 1e-6),
        )
        for y0, y1 in pairwise(ys)
        for x0, x1 in pairwise(xs)
    ]


def _first_chunk_edge(band: StoredBand) -> float:
    """Return the northing of a border between chunks."""
    grid = band.grid
    return grid.bounds.bottom if grid.is_y_ascending else grid.top


def _edges(
    low: float, high: float, origin: float, chunk: float, side: float, snap: float, most: int
) -> list[float]:
    """Return the edges of blocks along one axis, ascending; no block is narrower than a window."""
    low = origin + math.ceil((low - origin) / snap - 1e-6) * snap
    high = origin + math.floor((high - origin) / snap + 1e-6) * snap
    length = chunk * max(1, math.ceil(2 * side / chunk - 1e-6))
    length /= math.ceil(length / (most * side) - 1e-6)
    first = math.floor((low - origin) / length + 1e-6) + 1
    inner = []
    for k in range(first, math.ceil((high - origin) / length - 1e-6)):
        inner.append(origin + math.floor(k * length / snap + 1e-6) * snap)
    edges = [low]
    for edge in inner:
        if edge - edges[-1] >= side * (1 - 1e-6):
            edges.append(edge)
    if len(edges) > 1 and high - edges[-1] < side * (1 - 1e-6):
        edges.pop()
    return [*edges, high]


def hold_out(
    sites: Sequence[Site], blocks: Sequence[Block], rule: HeldOut
) -> tuple[list[Block], list[Block], int]:
    """Deal blocks to training and validation, and keep them apart.

    Returns:
        Training blocks, held-out blocks, and how many training blocks were left out because they
        overlap a held-out one (of another site, say a neighbouring tile) or come too near.

    Raises:
        ConfigError: A site is not known, or nothing would be left to train on.
    """
    names = [site.name for site in sites]
    known, wanted = set(names), set(rule.sites)
    for name in rule.sites:
        if name not in known:
            raise ConfigError(
                f"data.init_args.held_out.sites: no site {name!r}; there are "
                f"{', '.join(names[:12])}.{nearest(name, names)}"
            )
    if rule.sites:
        held = np.array([names[b.site] in wanted for b in blocks])
    else:
        count = round(rule.val_fraction * len(blocks))
        count = max(count, 1) if rule.val_fraction and len(blocks) > 1 else count
        held = np.zeros(len(blocks), bool)
        order = np.random.default_rng([rule.seed, len(blocks)]).permutation(len(blocks))
        held[order[:count]] = True
    val = [b for b, h in zip(blocks, held, strict=True) if h]
    rest = [b for b, h in zip(blocks, held, strict=True) if not h]
    near = overlapping(sites, rest, val, rule.gap)
    train = [b for b, n in zip(rest, near, strict=True) if not n]
    if not train:
        raise ConfigError(
            f"data.init_args.held_out: {len(val)} of {len(blocks)} blocks are held out and no "
            "other is left for training. Lower val_fraction or gap."
        )
    return train, val, int(near.sum())


def overlapping(
    sites: Sequence[Site], blocks: Sequence[Block], others: Sequence[Block], gap_m: float = 0.0
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which blocks overlap one of the others, or come nearer than the gap.

    Blocks of one reference system are compared in it, those of different ones in degrees, by
    rectangles that contain them.
    """
    hit = np.zeros(len(blocks), bool)
    ours, theirs = _by_crs(sites, blocks), _by_crs(sites, others)
    for crs in ours.keys() & theirs.keys():
        rows = ours[crs]
        gap = gap_m / sites[blocks[rows[0]].site].metres
        hit[rows] = _meet(_rectangles(blocks, rows), _rectangles(others, theirs[crs]), gap)
    if len(ours.keys() | theirs.keys()) == 1 or not blocks or not others:
        return hit
    left, right = (_all_degrees(b, groups) for b, groups in ((blocks, ours), (others, theirs)))
    for crs, rows in ours.items():
        is_foreign = np.ones(len(others), bool)
        is_foreign[theirs.get(crs, [])] = False
        for turn in (-360.0, 0.0, 360.0):  # rectangles across the date line go beyond 180 degrees
            shifted = left[rows] + np.array([turn, 0, turn, 0])
            hit[rows] |= _meet(shifted, right[is_foreign], gap_m / METRES_PER_DEGREE)
    return hit


def _meet(
    left: np.ndarray[Any, Any], right: np.ndarray[Any, Any], gap: float
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which rectangles (left, bottom, right, top) overlap another or come too near.

    Touching is no overlap. The others are asked in growing random parts, and a rectangle only
    until one of them meets it: where all sites show one place, every one would meet every other.

    Args:
        left: (n, 4).
        right: The others, (m, 4).
        gap: Least distance along each axis.

    Returns:
        (n,)
    """
    shapely = require("shapely", "geo")
    slack = 1e-6 * (left[0, 2] - left[0, 0])
    grown = left + (gap - slack) * np.array([-1, -1, 1, 1])
    low, high = grown[:, :2].min(0), grown[:, 2:].max(0)
    near = right[(right[:, 2:] >= low).all(1) & (right[:, :2] <= high).all(1)]
    near = near[np.random.default_rng(0).permutation(len(near))]
    boxes, hit = shapely.box(*grown.T), np.zeros(len(left), bool)
    start, size = 0, 64
    while start < len(near):
        tree = shapely.STRtree(shapely.box(*near[start : start + size].T))
        left_over = np.flatnonzero(~hit)
        hit[left_over[tree.query(boxes[left_over])[0]]] = True
        start, size = start + size, 4 * size
    return hit


def _by_crs(sites: Sequence[Site], blocks: Sequence[Block]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, block in enumerate(blocks):
        groups.setdefault(sites[block.site].crs, []).append(i)
    return groups


def _rectangles(blocks: Sequence[Block], rows: Sequence[int]) -> np.ndarray[Any, Any]:
    every = (blocks[i].bounds for i in rows)
    return np.array([(b.left, b.bottom, b.right, b.top) for b in every])


def _all_degrees(
    blocks: Sequence[Block], groups: Mapping[str, Sequence[int]]
) -> np.ndarray[Any, Any]:
    """Return the rectangles in degrees that contain the blocks, (blocks, 4)."""
    out = np.empty((len(blocks), 4))
    for crs, rows in groups.items():
        out[rows] = _degrees(_rectangles(blocks, rows), crs)
    return out


def _degrees(rectangles: np.ndarray[Any, Any], crs: str) -> np.ndarray[Any, Any]:
    """Return rectangles in degrees that contain those of a reference system, (n, 4)."""
    transformer = require("pyproj", "geo").Transformer.from_crs(crs, 4326, always_xy=True)
    steps = np.linspace(0, 1, _EDGE_POINTS)
    left, bottom, right, top = (side[:, None] for side in rectangles.T)
    across, along = left + (right - left) * steps, bottom + (top - bottom) * steps
    ones = np.ones(_EDGE_POINTS)
    x = np.concatenate([across, across, left * ones, right * ones], axis=1)
    y = np.concatenate([bottom * ones, top * ones, along, along], axis=1)
    lon, lat = transformer.transform(x, y)
    is_cut = np.ptp(lon, axis=1) > 180  # it lies across the date line
    lon[is_cut] %= 360
    return np.stack([lon.min(1), lat.min(1), lon.max(1), lat.max(1)], axis=1)
