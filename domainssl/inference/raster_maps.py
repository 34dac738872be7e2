"""Class maps of rasters: cloud-optimised GeoTIFF on the grid of the input's finest pixels.

Windows are read from the files and complete rows go to a file, so that a scene of any size takes
the memory of a few windows; a killed call goes on after the last complete rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from domainssl.backbones.base import Backbone
from domainssl.errors import DataError
from domainssl.inference.predict import LabelMap, PredictOptions, Predictor, predict_map
from domainssl.inference.scenes import Scene, SceneOptions, open_scene
from domainssl.inference.sliding import Box
from domainssl.io.raster.bands import is_store
from domainssl.io.raster.class_map import write_class_map
from domainssl.io.raster.grid import Bounds
from domainssl.io.raster.read import read_pixels
from domainssl.modality import Batch, key

__all__ = ["RasterPrediction", "find_scenes"]

_ENDINGS = (".tif", ".tiff", ".zarr", ".zarr.zip")
_NODATA = {True: 255, False: -1}  # of uint8 and int16


def find_scenes(path: str, backbone: Backbone, options: SceneOptions) -> list[Scene]:
    """Return the scenes of an input.

    Args:
        path: A GeoTIFF or Zarr store; or a folder, either with one raster per modality, named like
            it (`s1.tif`, `s2.zarr`), or with one scene per raster.
        backbone: Whose modalities are read.
        options: What the user says.

    Raises:
        DataError: Nothing lies there, or no raster.
    """
    if not os.path.isdir(path) or is_store(path):
        return [open_scene(path, backbone, options)]
    inside = [entry for entry in sorted(os.listdir(path)) if entry.endswith(_ENDINGS)]
    if not inside:
        raise DataError(f"{path}: holds no rasters, expected files that end in {_ENDINGS}.")
    named = {entry.partition(".")[0]: os.path.join(path, entry) for entry in inside}
    own = {name: named[name] for name in backbone.modalities if name in named}
    if own:
        name = os.path.basename(os.path.abspath(path))
        return [open_scene(own, backbone, options, name)]
    return [open_scene(found, backbone, options) for found in named.values()]


@dataclass(frozen=True, kw_only=True)
class RasterPrediction:
    """Class maps of scenes: entries that are made one by one (see `pieces.build`).

    Attributes:
        folder: Where `<name>.tif` go.
        scenes: The scenes.
        task: In evaluation mode, on its device.
        options: Windows and blending.
    """

    folder: Path
    scenes: Sequence[Scene]
    task: Predictor
    options: PredictOptions = field(default_factory=PredictOptions)

    @property
    def keys(self) -> Sequence[str]:
        """Names of the scenes."""
        return [scene.name for scene in self.scenes]

    def path(self, name: str) -> Path:
        """Return the file of a scene."""
        return self.folder / f"{name}.tif"

    def is_ready(self, key: str) -> bool:
        """Tell whether the map of a scene is there."""
        return self.path(key).is_file()

    def make(self, key: str) -> None:
        """Predict a scene.

        Raises:
            DataError: A file cannot be read.
        """
        scene = self.scenes[self.keys.index(key)]
        classes = len(self.task.classes)
        grid = _Pixels(scene)
        found = LabelMap(self.path(key), grid.shape, classes, scene.facts)
        nodata = _NODATA[found.labels.dtype == np.uint8]
        predict_map(self.task, grid.read, found, self.options, nothing=nodata)
        write_class_map(
            self.path(key),
            found.labels,
            crs=scene.crs,
            corner=(scene.bounds.left, scene.bounds.top),
            step=grid.step,
            nodata=nodata,
            classes=self.task.classes,
        )
        found.remove()


class _Pixels:
    """The finest pixels of a scene, from its north-west corner on.

    Attributes:
        step: Side of a pixel in CRS units.
        shape: Rows and columns.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.step = min(part.target.step for part in scene.parts.values())
        bounds = scene.bounds
        self.shape = tuple(int(side / self.step + 1e-6) for side in (bounds.height, bounds.width))

    def read(self, box: Box) -> Batch:
        """Return the batch of a box, of one item."""
        bounds, batch = self._scene.bounds, Batch()
        rows, columns = box
        around = Bounds(
            bounds.left + columns.start * self.step,
            bounds.top - rows.stop * self.step,
            bounds.left + columns.stop * self.step,
            bounds.top - rows.start * self.step,
        )
        for name, part in self._scene.parts.items():
            pixels = read_pixels(part.file, part.dates, around, part.target)
            values, valid = pixels.values, pixels.valid & np.isfinite(pixels.values).all(1)
            values = np.where(valid[:, None], values, np.float32(0))
            times = part.file.times[list(part.dates)]
            days = times.astype("datetime64[D]").astype(np.int64).astype(np.int32)
            dates = torch.from_numpy(days)
            is_series = part.modality.kind == "series"
            batch[name] = torch.from_numpy(values if is_series else values[0])[None]
            batch[key(name, "valid")] = torch.from_numpy(valid if is_series else valid[0])[None]
            if not np.isnat(times).any():
                batch[key(name, "dates")] = dates[None] if is_series else dates
        return batch
