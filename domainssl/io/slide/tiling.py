"""Grids of many slides as files: a table of tiles, coordinates for other tools, a picture.

<output>/tiling.json             how the grids were made
<output>/tiles/<id>.parquet      one row per tile
<output>/patches/<id>_patches.h5 coordinates in TRIDENT's layout
<output>/thumbnails/<id>.png     tissue outlined, kept tiles drawn
<output>/slides/<id>.json        facts of the slide; written last, so it marks a slide as done
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from domainssl.errors import ConfigError, DataError, require, unwritable
from domainssl.files import read_json, remove_parts, write_json, write_whole
from domainssl.io.ids import ids_of
from domainssl.io.slide.grid import MIN_REGION, MIN_TISSUE, TileGrid, plan_grid
from domainssl.io.slide.listed import ListedSlide
from domainssl.io.slide.overview import draw_overview
from domainssl.io.slide.pyramid import Slide, SlideReading
from domainssl.io.slide.regions import ENDINGS, read_regions, regions_for
from domainssl.io.slide.tissue import TissueMask, TissueOptions, slide_tissue
from domainssl.io.storage.paths import stamp

__all__ = ["GridOptions", "SlideTiling", "write_grid"]

_log = logging.getLogger(__name__)
_FACTS = "tiling.json"
_PARTS = ("tiles", "patches", "thumbnails", "slides")
_POWER_UM = 10.0


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """How grids are made; see `plan_grid`.

    Attributes:
        size_px: Side of a tile.
        mpp_um: Micrometres per pixel of a tile.
        overlap_px: Pixels that neighbours share.
        min_tissue: Least share of tissue.
        min_region: Least share of regions.
        partial: Whether tiles may reach beyond the slide.
        regions: A file of regions, or a folder with one per slide.
        reading: What the user says about slides.
        tissue: How tissue is told from glass.
    """

    size_px: int = 256
    mpp_um: float = 0.5
    overlap_px: int = 0
    min_tissue: float = MIN_TISSUE
    min_region: float = MIN_REGION
    partial: bool = False
    regions: str | None = None
    reading: SlideReading = field(default_factory=SlideReading)
    tissue: TissueOptions = field(default_factory=TissueOptions)


@dataclass(frozen=True, kw_only=True)
class SlideTiling:
    """The grids of some slides: entries that can be built in pieces; pickled to processes.

    Attributes:
        folder: Where they are written.
        slides: The slides, named by their ids, which tell nothing about patients unless asked
            for.
        options: How grids are made.
    """

    folder: Path
    slides: Sequence[ListedSlide]
    options: GridOptions

    @property
    def keys(self) -> Sequence[str]:
        """Ids of the slides."""
        return [slide.name for slide in self.slides]

    @cached_property
    def _by_key(self) -> dict[str, ListedSlide]:
        return {slide.name: slide for slide in self.slides}

    def open(self, key: str) -> Slide:
        """Return a slide, read with the resolution that is known of it."""
        listed = self._by_key[key]
        return Slide(listed.path, self.options.reading, listed.mpp_um)

    def claim(self, *, restart: bool = False) -> None:
        """Write how the grids are made, or compare it with what is there.

        Raises:
            ConfigError: The folder holds grids that were made otherwise.
            StorageError: It cannot be written.
        """
        path = self.folder / _FACTS
        wanted = json.loads(json.dumps(asdict(self.options)))
        if self.options.regions is not None:  # the name may be that of a slide
            wanted["regions"] = ids_of([self.options.regions], "hashed")[0]
        if path.is_file() and not restart:
            found = read_json(path)
            known = found.get("options", {}) if isinstance(found, dict) else {}
            differing = [k for k in wanted if known.get(k) != wanted[k]]
            if differing:
                raise ConfigError(
                    f"{self.folder}: holds grids that were made otherwise ({', '.join(differing)} "
                    "differ). Choose another --output, or add --restart to replace them."
                )
            return
        try:
            for part in _PARTS:
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            if restart:
                for key in self.keys:
                    self._mark(key).unlink(missing_ok=True)
            write_json(path, {"options": wanted, "layout": "domainssl tile, version 1"})
        except OSError as error:
            raise unwritable(error.filename or self.folder, error) from error

    def is_ready(self, key: str) -> bool:
        """Tell whether the grid of a slide is there, made from its files as they are."""
        if not self._mark(key).is_file():
            return False
        return self.described(key).get("files", self._files(key)) == self._files(key)

    def _files(self, key: str) -> list[list[float]]:
        """Return time of change and size of a slide and its regions, and what a table says."""
        slide, found = self._by_key[key], None
        if self.options.regions is not None:
            found = regions_for(self.options.regions, slide.path)
        states: list[list[float]] = [
            list(stamp(each)[2:]) for each in (slide.path, found) if each is not None
        ]
        return states if slide.mpp_um is None else [*states, [slide.mpp_um]]

    def make(self, key: str) -> None:
        """Write the grid of a slide, its mark last.

        Raises:
            DataError: The slide or its regions cannot be read.
            StorageError: The grid cannot be written.
        """
        path, files = self._by_key[key].path, self._files(key)
        options = self.options
        if self._mark(key).is_file():
            _log.warning(
                "%s: the slide, its regions or its resolution have changed since; tiled again", key
            )
        for part in _PARTS:
            remove_parts(self.folder / part, key)
            remove_parts(self.folder / part, f"{key}_patches")
        with self.open(key) as slide:
            slide.refuse_channels()
            regions = None
            if options.regions is not None:
                found = regions_for(options.regions, path)
                if found is None:
                    stem = os.path.splitext(os.path.basename(path))[0]
                    raise DataError(
                        f"{path}: no regions in {options.regions}, expected a file of the slide's "
                        f"name, such as {stem}{ENDINGS[0]}."
                    )
                regions = read_regions(found)
            tissue = slide_tissue(slide, options.tissue) if options.min_tissue > 0 else None
            grid = plan_grid(
                slide,
                options.size_px,
                options.mpp_um,
                options.overlap_px,
                options.min_tissue,
                regions,
                min_region=options.min_region,
                partial=options.partial,
                tissue=tissue,
            )
            try:
                self._write(key, slide, grid, tissue, files)
            except OSError as error:
                raise unwritable(error.filename or self.folder, error) from error

    def described(self, key: str) -> dict[str, Any]:
        """Return what was written about a slide.

        Raises:
            DataError: It cannot be read.
        """
        found = read_json(self._mark(key))
        if not isinstance(found, dict):
            raise DataError(f"{self._mark(key)}: no facts of a slide. Delete it and call again.")
        return found

    def _mark(self, key: str) -> Path:
        return self.folder / "slides" / f"{key}.json"

    def _write(
        self, key: str, slide: Slide, grid: TileGrid, tissue: TissueMask | None, files: list[Any]
    ) -> None:
        write_grid(self.folder, key, slide, grid)
        picture = draw_overview(slide, grid, tissue, key)
        write_whole(self.folder / "thumbnails" / f"{key}.png", picture)
        facts = slide.facts
        write_json(
            self._mark(key),
            {
                "id": key,
                "files": files,
                "tiles": len(grid),
                "grid": list(grid.shape),
                "size_level0": list(grid.size_level0),
                "step_level0": list(grid.step_level0),
                "level0_size": list(facts.size),
                "mpp": list(facts.resolution()),
                "mpp_source": facts.mpp_source,
                "backend": facts.backend,
                "tissue": None if tissue is None else round(float(tissue.mask.mean()), 6),
                "pen": None if tissue is None else round(tissue.pen_fraction, 6),
                "labels": _counts(grid),
                "damaged": [[d.level, d.x, d.y] for d in slide.damaged],
                "warnings": list(facts.warnings),
            },
        )


def _counts(grid: TileGrid) -> dict[str, int] | None:
    if grid.labels is None:
        return None
    names, counts = np.unique(grid.labels.astype(str), return_counts=True)
    return {str(name): int(count) for name, count in zip(names, counts, strict=True)}


def write_grid(folder: Path, key: str, slide: Slide, grid: TileGrid) -> None:
    """Write a grid as a Parquet table of tiles and as coordinates in TRIDENT's layout.

    Args:
        folder: Folder with `tiles` and `patches`.
        key: Id of the slide.
        slide: The slide.
        grid: Its tiles.

    Raises:
        OSError: The files cannot be written.
    """
    arrow = require("pyarrow", "pathology")
    parquet = require("pyarrow.parquet", "pathology")
    count = len(grid)
    mpp = slide.facts.resolution()
    columns = {
        "slide_id": np.full(count, key, object),
        "x": grid.coords[:, 0],
        "y": grid.coords[:, 1],
        "row": grid.rows,
        "column": grid.columns,
        "size_level0": np.full(count, grid.size_level0[0], np.int64),
        "size_level0_y": np.full(count, grid.size_level0[1], np.int64),
        "mpp": np.full(count, grid.mpp_um),
        "level0_mpp": np.full(count, mpp[0]),
        "level0_mpp_y": np.full(count, mpp[1]),
        "tissue_fraction": grid.tissue_fraction,
    }
    if grid.labels is not None:
        columns["label"] = grid.labels
    content = io.BytesIO()
    strings = {"slide_id", "label"}
    table = arrow.table(
        {n: arrow.array(v, arrow.string() if n in strings else None) for n, v in columns.items()}
    )
    parquet.write_table(table, content)
    write_whole(folder / "tiles" / f"{key}.parquet", content.getbuffer())
    write_whole(folder / "patches" / f"{key}_patches.h5", _coordinates(key, slide, grid))


def _coordinates(key: str, slide: Slide, grid: TileGrid) -> bytes:
    """Return `coords` with the attributes that TRIDENT writes."""
    h5py = require("h5py", "pathology")
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        found = file.create_dataset("coords", data=grid.coords)
        width, height = slide.facts.size
        for name, value in {
            "patch_size": grid.size_px,
            "patch_size_level0": grid.size_level0[0],
            "level0_magnification": _short(_POWER_UM / slide.facts.resolution()[0]),
            "target_magnification": _short(_POWER_UM / grid.mpp_um),
            "overlap": grid.overlap_px,
            "name": key,
            "savetodir": "None",
            "level0_width": width,
            "level0_height": height,
        }.items():
            found.attrs[name] = value
        if grid.size_level0[0] != grid.size_level0[1]:
            found.attrs["patch_size_level0_y"] = grid.size_level0[1]
    return content.getvalue()


def _short(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-9 else value
