"""Tiles that are cut out of slides while they are read: one grid per slide, for all its stains.

The grid is laid over the first stain that a slide has; the others are read at the same place in
micrometres, so they have to be registered. Grids, and that a slide could be opened, are kept in the
cache folder: a later start opens no slide.
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
from domainssl.files import new_file, read_json, write_json
from domainssl.io.slide.grid import plan_grid
from domainssl.io.slide.manifest import TileSet
from domainssl.io.slide.pyramid import Slide, SlideReading
from domainssl.io.slide.regions import ENDINGS, check_regions, read_regions, regions_for
from domainssl.io.slide.tissue import TissueOptions
from domainssl.io.storage.paths import stamp
from domainssl.io.subjects import first_few

__all__ = ["SlideTiles", "with_grids"]

_WHERE = "data.init_args.slides"
_VERSION = "2"  # changes with what is kept
_UNLIKE = 0.02  # relative difference that is worth a word
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
        reading: What is said of slides whose files leave it open, such as `mpp_um`; a column
            `mpp_um` of the table says it for each.
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
    overruled: list[str] = []
    folder = kept_folder("tile-grids", _VERSION)
    for known in sets:
        if not known.slides:
            done.append(known)
            continue
        each = _readable(known, options, folder, lost, overruled)
        if not each.slides:
            continue
        name, path = next(iter(each.slides.items()))
        regions = None if options.regions is None else regions_for(options.regions, path)
        if options.regions is not None and regions is None:
            stem = os.path.splitext(os.path.basename(path))[0]
            problems.append(
                f"{path}: no regions in {options.regions}, such as {stem}{ENDINGS[0]}; the slide "
                "is left out"
            )
            continue
        try:
            corners, labels = _grid(
                path, regions, options, size_px, mpp_um, folder, each.mpp_um.get(name)
            )
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
    overruled = first_few(
        overruled, f"{len(overruled)} slides in all state another resolution than they are read at."
    )
    return done, [*lost, *problems, *overruled, *_of_pictures(sets, mpp_um)]


def _of_pictures(sets: Sequence[TileSet], mpp_um: float) -> list[str]:
    """Say which pictures of tiles have another resolution by the table than by `tiles.mpp_um`."""
    found = [
        f"{each.id}: the table says {value:g} um per pixel of its tiles, "
        f"data.init_args.tiles.mpp_um is {mpp_um:g}, which the weights are said to be trained on. "
        "Correct one of them."
        for each in sets
        if not each.slides
        for value in sorted(set(each.mpp_um.values()))
        if abs(value / mpp_um - 1) > _UNLIKE
    ]
    return first_few(found, f"{len(found)} slides in all have tiles of another resolution.")


def _readable(
    each: TileSet, options: SlideTiles, folder: Path, lost: list[str], overruled: list[str]
) -> TileSet:
    """Return a slide with those of its stains that can be read.

    Args:
        each: The slide.
        options: How tiles are cut.
        folder: Where it is kept that a file could be opened.
        lost: Takes why a stain is left out.
        overruled: Takes what files state otherwise than the user.
    """
    kept = {}
    for name, path in each.slides.items():
        try:
            told = _looked_at(path, options.reading, each.mpp_um.get(name), folder)
        except DataError as error:
            what = f"stain {name!r} of the slide {each.id!r}" if len(each.slides) > 1 else "slide"
            lost.append(f"{error} The {what} is left out.")
        else:
            kept[name] = path
            overruled += [f"{path}: {text}" for text in told]
    return replace(each, slides=kept)


def _looked_at(
    path: str, reading: SlideReading, mpp_um: float | None, folder: Path
) -> Sequence[str]:
    """Open a slide unless it was opened before, and return what its file states otherwise.

    Raises:
        DataError: It cannot be read, or its resolution is not known.
    """
    kept = folder / f"{_key(stamp(path), asdict(reading), mpp_um)}.json"
    if kept.is_file():
        found: list[str] = read_json(kept)["overruled"]
        return found
    with Slide(path, reading, mpp_um) as slide:
        slide.refuse_channels()
        slide.facts.resolution()
        found = slide.facts.overruled
    write_json(kept, {"overruled": found})
    return found


def _key(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _grid(
    path: str,
    regions: str | None,
    options: SlideTiles,
    size_px: int,
    mpp_um: float,
    folder: Path,
    level0_mpp_um: float | None,
) -> tuple[Array, list[str]]:
    """Return corners (N, 2) and labels of the tiles of a slide, kept in a folder."""
    facts = [stamp(path), asdict(replace(options, regions=None)), size_px, mpp_um, level0_mpp_um]
    facts += [stamp(regions)] if regions else []
    kept = folder / f"{_key(*facts)}.npz"
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as found:
            return found["corners"], found["labels"].tolist()
    with Slide(path, options.reading, level0_mpp_um) as slide:
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
