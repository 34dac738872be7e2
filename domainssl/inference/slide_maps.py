"""Classes of the tiles of slides, as regions that QuPath opens and as a table of tiles.

A slide is laid out in tiles of the size and resolution of training, on tissue; its files take
their names when they are complete, the regions last.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainssl.errors import ConfigError, DataError, require
from domainssl.files import write_whole
from domainssl.inference.outputs import file_states, is_made_from, keep_source, tell_again
from domainssl.inference.predict import PredictOptions
from domainssl.inference.tables import ItemTask, answer
from domainssl.io.slide.annotations import geojson_of
from domainssl.io.slide.grid import MIN_TISSUE, TileGrid, plan_grid
from domainssl.io.slide.listed import ListedSlide
from domainssl.io.slide.pyramid import Slide, SlideReading
from domainssl.modality import Modality, batch_to, key

__all__ = ["SlidePrediction"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SlidePrediction:
    """Classes of the tiles of slides: entries that are made one by one (see `pieces.build`).

    Attributes:
        folder: Where `<name>.geojson` and `<name>_tiles.parquet` go.
        slides: The slides.
        task: In evaluation mode, on its device; its backbone takes tiles of one stain.
        options: Tiles at once, their side, and the device.
        reading: What the user says about slides.
        min_tissue: Least share of tissue in a tile; 0 takes all tiles.
    """

    folder: Path
    slides: Sequence[ListedSlide]
    task: ItemTask
    options: PredictOptions = field(default_factory=PredictOptions)
    reading: SlideReading = field(default_factory=SlideReading)
    min_tissue: float = MIN_TISSUE

    @property
    def modality(self) -> Modality:
        """The stain that is read.

        Raises:
            ConfigError: The task reads several.
        """
        (modality, *others) = self.task.backbone.modalities.values()
        if others:
            raise ConfigError(
                f"The task reads tiles of {', '.join(self.task.backbone.modalities)}; slides are "
                "predicted for one stain."
            )
        return modality

    @property
    def side(self) -> int:
        """Side of a tile in pixels.

        Raises:
            ConfigError: Nothing says it.
        """
        side = self.options.window or self.modality.size
        if not side or len(set(side)) > 1:
            raise ConfigError(
                f"--window: got {list(side)}, expected the side of a tile in pixels, as in "
                "training."
            )
        return side[0]

    @property
    def keys(self) -> Sequence[str]:
        """Names of the slides."""
        return [slide.name for slide in self.slides]

    def path(self, name: str) -> Path:
        """Return the regions of a slide."""
        return self.folder / f"{name}.geojson"

    def is_ready(self, key: str) -> bool:
        """Tell whether the regions of a slide are there, made from its file as it is."""
        return is_made_from(self.path(key), self._source(key))

    @cached_property
    def _by_key(self) -> dict[str, ListedSlide]:
        return dict(zip(self.keys, self.slides, strict=True))

    def _source(self, key: str) -> dict[str, Any]:
        """Return what the regions of a slide rest on."""
        slide = self._by_key[key]
        said = slide.mpp_um or self.reading.mpp_um
        return {"files": file_states([slide.path]), "mpp_um": said}

    def is_empty(self, key: str) -> bool:
        """Tell whether no tile of a predicted slide held tissue."""
        return not json.loads(self.path(key).read_bytes())["features"]

    def make(self, key: str) -> None:
        """Predict a slide.

        Raises:
            DataError: It cannot be read, or the task gives numbers that are not finite.
        """
        listed, source = self._by_key[key], self._source(key)
        tell_again(self.path(key))
        with Slide(listed.path, self.reading, listed.mpp_um) as slide:
            slide.tell_overruled()
            resolution = self.modality.mpp_um
            assert resolution is not None  # or the task would read rasters
            grid = plan_grid(slide, self.side, resolution, min_tissue=self.min_tissue)
            kept, chances = self._chances(slide, grid)
            if slide.damaged:
                first = slide.damaged[0]
                logger.warning(
                    "%s: %d stored tiles cannot be read, the first at (%d, %d) of level %d; their "
                    "pixels are not valid.", key, len(slide.damaged), first.x, first.y, first.level,
                )  # fmt: skip
        grid = grid.only(kept)
        names = self.task.classes
        if getattr(self.task, "multi_label", False):
            is_class = chances > 0.5
        else:
            is_class = chances.argmax(1)[:, None] == np.arange(len(names))
        self._write_tiles(key, grid, is_class, chances)
        write_whole(self.path(key), geojson_of(grid, is_class, chances, names))
        keep_source(self.path(key), source)

    def _chances(self, slide: Slide, grid: TileGrid) -> tuple[Array, Array]:
        """Return the tiles that have a valid pixel, and the probabilities of each, (N, K)."""
        name, size = self.modality.name, self.options.batch_size
        kept: list[int] = []
        found: list[Array] = []
        for first in range(0, len(grid), size):
            pictures, masks = [], []
            for number in range(first, min(first + size, len(grid))):
                x, y = grid.coords[number].tolist()
                rgb, valid = slide.read(x, y, self.side, grid.mpp_um)
                if valid.any():
                    kept.append(number)
                    pictures.append(rgb)
                    masks.append(valid)
            if not pictures:
                continue
            values = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
            batch = {name: values, key(name, "valid"): torch.from_numpy(np.stack(masks))}
            with torch.inference_mode():
                logits, _ = self.task.with_weights(batch_to(batch, self.options.device))
            if not torch.isfinite(logits).all():
                raise DataError(
                    f"{slide.path}: the task gives numbers that are not finite; its weights are "
                    "damaged."
                )
            found.append(answer(self.task, logits).cpu().numpy())
            if self.options.progress is not None:
                self.options.progress(min(first + size, len(grid)), len(grid))
        chances = np.concatenate(found) if found else np.zeros((0, len(self.task.classes)))
        return np.array(kept, np.int64), chances

    def _write_tiles(self, name: str, grid: TileGrid, is_class: Array, chances: Array) -> None:
        """Write place, size, class and probabilities of every tile."""
        arrow, parquet = require("pyarrow", "pathology"), require("pyarrow.parquet", "pathology")
        classes = np.array(self.task.classes, object)
        columns = {
            "x": grid.coords[:, 0],
            "y": grid.coords[:, 1],
            "row": grid.rows,
            "column": grid.columns,
            "size_level0": np.full(len(grid), grid.size_level0[0], np.int64),
            "size_level0_y": np.full(len(grid), grid.size_level0[1], np.int64),
            "predicted": arrow.array([";".join(classes[row]) for row in is_class], arrow.string()),
            **{f"p({c})": chances[:, i].astype(np.float32) for i, c in enumerate(classes)},
        }
        content = io.BytesIO()
        parquet.write_table(arrow.table(columns), content)
        write_whole(self.folder / f"{name}_tiles.parquet", content.getbuffer())
