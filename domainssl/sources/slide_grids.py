"""Tiles that are cut out of slides while they are read: one grid per slide, for all its stains.

The grid is laid over the first stain that a slide has; the others are read at the same place in
micrometres, so they have to be registered. Grids are kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.cache import kept_folder
from domainssl.errors import ConfigError, DataError
from domainssl.files import new_file
from domainssl.io.slide.grid import plan_grid
from domainssl.io.slide.manifest import TileSet
from domainssl.io.slide.pyramid import Slide, SlideReading
from domainssl.io.slide.regions import ENDINGS, check_regions, read_regions, regions_for
from domainssl.io.slide.tissue import TissueOptions
from domainssl.io.storage.paths import stamp
from domainssl.io.subjects import first_few

__all__ = ["SlideTiles", "with_grids"]

_WHERE = "data.init_args.slides"
_VERSION = "1"  # changes with what is kept
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SlideTiles:
    """How tiles are cut out of slides.

    Attributes:
        size_px: Side of a tile in pixels of `tiles.mpp_um`; None is that of the window.
        overlap_px: Pixels that neighbours share.
        min_tissue: Least share of tissue in a tile.
        tissue: How tissue is told from glass.
        regions: Folder with a GeoJSON file of QuPath, or a picture of labels, by the name of each
            slide: tiles lie inside of regions and have their names as labels. None for no regions.
        reading: What is said of slides whose files leave it open, such as `mpp_um`.
    """

    size_px: int | None = None
    overlap_px: int = 0
    min_tissue: float = 0.2
    tissue: TissueOptions = field(default_factory=TissueOptions)
    regions: str | None = None
    reading: SlideReading = field(default_factory=SlideReading)

    def __post_init__(self) -> None:
        if self.size_px is not None and self.size_px < 1:
            raise ConfigError(f"{_WHERE}.size_px: got {self.size_px!r}, expected at least 1.")


def with_grids(
    sets: Sequence[TileSet], options: SlideTiles, size_px: int, mpp_um: float
) -> tuple[list[TileSet], list[str]]:
    """Return slides with the tiles of their grids, and why others are left out.

    A slide that cannot be read, or whose resolution is not known, is left out; of several stains
    the others are kept.

    Args:
        sets: From `find_tiles`; those that are pictures of tiles are returned as they are.
        options: How tiles are cut.
        size_px: Side of a tile.
        mpp_um: Micrometres per pixel of a tile.

    Raises:
        DataError: No slide is left.
    """
    done: list[TileSet] = []
    problems: list[str] = []
    lost: list[str] = []
    check_regions(options.regions, sum(bool(each.slides) for each in sets))
    folder = kept_folder("tile-grids", _VERSION)
    for known in sets:
        if not known.slides:
            done.append(known)
            continue
        each = _readable(known, options, lost)
        if not each.slides:
            continue
        path = next(iter(each.slides.values()))
        regions = None if options.regions is None else regions_for(options.regions, path)
        if options.regions is not None and regions is None:
            stem = os.path.splitext(os.path.basename(path))[0]
            problems.append(
                f"{path}: no regions in {options.regions}, such as {stem}{ENDINGS[0]}; the slide "
                "is left out"
            )
            continue
        try:
            corners, labels = _grid(path, regions, options, size_px, mpp_um, folder)
        except DataError as error:
            lost.append(f"{error} The slide is left out.")
            continue
        if not len(corners):
            within = f" and lies in the regions of {regions}" if regions else ""
            problems.append(
                f"{path}: no tile of {size_px} px at {mpp_um:g} um holds {options.min_tissue:.0%} "
                f"tissue{within}; the slide is left out"
            )
            continue
        own = each.labels[0] if each.labels else ""
        done.append(
            replace(
                each,
                names=[f"{each.id}/{x}_{y}" for x, y in corners.tolist()],
                corners=corners,
                labels=labels or ([own] * len(corners) if own else []),
            )
        )
    count = sum(bool(each.slides) for each in sets)
    lost = first_few(lost, f"{len(lost)} files of {count} slides cannot be read and are left out.")
    if not done and lost and not problems:
        raise DataError(f"{lost[0]} No slide of {count} is left.")
    if not done:
        raise DataError(
            f"{problems[0] if problems else 'no slide'}: not one tile is left. Lower "
            f"{_WHERE}.min_tissue, or change {_WHERE}.tissue"
            + (f", or correct {_WHERE}.regions." if options.regions else ".")
            + "".join(f" {text}" for text in lost[:1])
        )
    return done, [*lost, *problems]


def _readable(each: TileSet, options: SlideTiles, lost: list[str]) -> TileSet:
    """Return a slide with those of several stains that can be read; the grid tells of one."""
    if len(each.slides) == 1:
        return each
    kept = {}
    for name, path in each.slides.items():
        try:
            with Slide(path, options.reading) as slide:
                slide.refuse_channels()
                slide.facts.resolution()
        except DataError as error:
            lost.append(f"{error} The stain {name!r} of the slide {each.id!r} is left out.")
        else:
            kept[name] = path
    return replace(each, slides=kept)


def _grid(
    path: str,
    regions: str | None,
    options: SlideTiles,
    size_px: int,
    mpp_um: float,
    folder: Path,
) -> tuple[Array, list[str]]:
    """Return corners (N, 2) and labels of the tiles of a slide, kept in a folder."""
    facts = [stamp(path), asdict(replace(options, regions=None)), size_px, mpp_um]
    facts += [stamp(regions)] if regions else []
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    kept = folder / f"{key}.npz"
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as found:
            return found["corners"], found["labels"].tolist()
    with Slide(path, options.reading) as slide:
        grid = plan_grid(
            slide,
            size_px,
            mpp_um,
            options.overlap_px,
            options.min_tissue,
            None if regions is None else read_regions(regions),
            tissue=options.tissue,
        )
    labels = [] if grid.labels is None else [str(name) for name in grid.labels]
    _keep(kept, grid.coords, labels)
    return grid.coords, labels


def _keep(path: Path, corners: Array, labels: Sequence[str]) -> None:
    with new_file(path) as file:
        np.savez(file, corners=corners, labels=np.array(labels, np.str_))
