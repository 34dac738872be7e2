"""Maps of classes or numbers of rasters: cloud-optimised GeoTIFF on the grid of the finest pixels.

Windows are read from the files and complete rows go to a file, so that a scene of any size takes
the memory of a few windows; a killed call goes on after the last complete rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, DataError
from domainssl.inference.inputs import (
    RASTERS,
    Found,
    find_inputs,
    is_manifest,
    is_raster,
    open_each,
    open_scenes,
)
from domainssl.inference.map_preview import (
    class_colours,
    write_class_preview,
    write_number_preview,
)
from domainssl.inference.outputs import (
    beside,
    file_name,
    is_made_from,
    keep_source,
    tell_again,
)
from domainssl.inference.predict import (
    LabelMap,
    NumberMap,
    PredictOptions,
    Predictor,
    predict_map,
)
from domainssl.inference.scenes import Scene, SceneOptions, open_scene, stem
from domainssl.inference.sliding import Box
from domainssl.io.raster.class_map import MapPlace, write_class_map, write_number_map
from domainssl.io.raster.grid import Bounds
from domainssl.io.raster.safe import is_safe
from domainssl.modality import Batch, key

__all__ = ["ChangeTask", "RasterPrediction", "ScenePair", "find_pairs", "find_scenes"]

_ENDINGS = (".tif", ".tiff", ".zarr", ".zarr.zip")
_NODATA = {True: 255, False: -1}  # of uint8 and int16
_PAIR = 2
_SUBPIXEL = 1e-3  # of a pixel, up to which two grids are one


class ChangeTask(Protocol):
    """What pairs ask of a task of change."""

    backbone: Backbone
    dated: tuple[str, ...]


def find_scenes(
    path: str,
    backbone: Backbone,
    options: SceneOptions,
    left_out: dict[str, str] | None = None,
    output: Path | None = None,
) -> list[Scene]:
    """Return the scenes of an input.

    Args:
        path: A GeoTIFF or Zarr store; or a folder, either with one raster per modality, named like
            it (`s1.tif`, `s2.zarr`), or with one scene per raster; where it has none itself, the
            folders below it; or a manifest.
        backbone: Whose modalities are read.
        options: What the user says.
        left_out: Takes why one cannot be opened, by its name; None ends at the first such.
        output: Where maps go; they are no scenes.

    Raises:
        DataError: Nothing lies there, or no raster; or one cannot be opened.
    """
    return open_scenes(_scene_files(path, backbone, output), backbone, options, left_out)


def _scene_files(path: str, backbone: Backbone, output: Path | None = None) -> list[Found]:
    names = list(backbone.modalities)
    if os.path.isdir(path) and not is_raster(path):
        entries = (entry for entry in sorted(os.listdir(path)) if entry[0] != ".")
        inside = [os.path.join(path, entry) for entry in entries]
        inside = [each for each in inside if each.lower().endswith(_ENDINGS) or is_safe(each)]
        if inside:
            return _together(path, [Found(stem(each), each) for each in inside], names)
    found = find_inputs(path, names, is_raster, RASTERS, output)
    if is_manifest(path) or not os.path.isdir(path):
        return found
    folders: dict[str, list[Found]] = {}
    for each in found:
        folders.setdefault(os.path.dirname(str(each.files)), []).append(each)
    return [
        scene
        for folder, inside in folders.items()
        for scene in _together(folder, inside, names, os.path.relpath(folder, path))
    ]


def _together(
    folder: str, found: list[Found], names: Sequence[str], relative: str = ""
) -> list[Found]:
    """Return the rasters of a folder as one scene where they are named like modalities."""
    named = {os.path.basename(str(f.files)).partition(".")[0]: str(f.files) for f in found}
    own = {name: named[name] for name in names if name in named}
    if not own:
        return found
    return [Found(file_name(relative or os.path.basename(os.path.abspath(folder))), own)]


@dataclass(frozen=True)
class ScenePair:
    """One place at two dates, whose pixels lie on one grid.

    Attributes:
        before: The first date.
        after: The second date.
        dated: Modalities that are read of both; others are read of the first.
    """

    before: Scene
    after: Scene
    dated: tuple[str, ...]

    def __post_init__(self) -> None:
        """Compare the grids.

        Raises:
            DataError: The dates have other modalities, systems or pixels, or share no area.
        """
        first, second = self.before, self.after
        names = [n for n in first.parts if n in self.dated]
        where = f"{first.name} and {second.name}"
        if names != [n for n in second.parts if n in self.dated]:
            raise DataError(
                f"{where}: the dates have {', '.join(first.parts)} and {', '.join(second.parts)}, "
                "expected the same modalities of both."
            )
        for name in names:
            one, two = (scene.parts[name].target.step for scene in (first, second))
            b, a = first.bounds, second.bounds
            shifts = ((b.left - a.left) / one, (b.top - a.top) / one)
            apart = max(abs(shift - round(shift)) for shift in shifts)
            if first.crs != second.crs or abs(one / two - 1) > 1e-6 or apart > _SUBPIXEL:
                raise DataError(
                    f"{where}: pixels of {name} of {one:g} in {first.crs[:40]} and of {two:g} in "
                    f"{second.crs[:40]}, {apart:.2g} of a pixel apart; expected one grid for both "
                    "dates. Warp one onto the other."
                )
        least = max(part.target.step for part in first.parts.values())
        shared = first.bounds.shared(second.bounds)
        if min(shared.width, shared.height) < least * (1 - 1e-6):
            raise DataError(f"{where}: the dates share no area.")

    @property
    def name(self) -> str:
        """Names of both."""
        same = self.before.name == self.after.name
        return self.before.name if same else f"{self.before.name}__{self.after.name}"

    @property
    def facts(self) -> dict[str, Any]:
        """What the result rests on."""
        return {"before": self.before.facts, "after": self.after.facts}

    def scenes(self) -> tuple[Scene, Scene]:
        """Return both over the area that they share."""
        bounds = self.before.bounds.shared(self.after.bounds)
        return replace(self.before, bounds=bounds), replace(self.after, bounds=bounds)


def find_pairs(
    sources: Sequence[str],
    task: ChangeTask,
    options: SceneOptions,
    dates: Sequence[str] = (),
    left_out: dict[str, str] | None = None,
) -> list[ScenePair]:
    """Return the pairs of an input.

    Args:
        sources: Two places of rasters, see `find_scenes`, with as many scenes; or one with cubes.
        task: Its backbone sees each date as images.
        options: What the user says.
        dates: Two dates of cubes; empty takes the only two.
        left_out: Takes why a pair cannot be opened, by name; None ends at the first such.

    Raises:
        ConfigError: There are neither two inputs nor two dates.
        DataError: The dates of a pair lie on different grids.
    """
    if len(sources) == 1:
        first, second = dates if len(dates) == _PAIR else ("first", "last")
        if len(dates) not in (0, _PAIR):
            raise ConfigError(
                f"--date: got {' '.join(dates)}; change is between two dates of a cube, or between "
                "two inputs: predict TASK BEFORE AFTER."
            )
        both = replace(options, date=first), replace(options, date=second)
    else:
        if dates:
            raise ConfigError("--date: chooses dates of one cube; two inputs are two dates.")
        both = options, options
    befores, afters = (_scene_files(source, task.backbone) for source in (sources[0], sources[-1]))
    if len(befores) != len(afters):
        raise DataError(
            f"{sources[0]} holds {len(befores)} scenes and {sources[-1]} {len(afters)}; expected "
            "as many before as after, in the order of their names."
        )

    def pair(files: tuple[Found, Found]) -> ScenePair:
        before, after = (
            open_scene(each.files, task.backbone, own, each.name)
            for each, own in zip(files, both, strict=True)
        )
        if len(sources) == 1 and not dates:
            _refuse_more_dates(before)
        return ScenePair(before, after, task.dated)

    of_dates = zip(befores, afters, strict=True)
    return open_each(
        [before.name for before in befores], [partial(pair, files) for files in of_dates], left_out
    )


def _refuse_more_dates(scene: Scene) -> None:
    for part in scene.parts.values():
        days = [str(time.astype("datetime64[D]")) for time in np.unique(part.file.times)]
        if len(days) != _PAIR:
            shown = ", ".join(days[:6]) + (", ..." if len(days) > 6 else "")
            there = f"{len(days)} dates ({shown})" if len(days) > 1 else "one image"
            raise ConfigError(
                f"{part.file.path}: {there}, but change is between two dates. Give two inputs: "
                "predict TASK BEFORE AFTER, or choose two dates of a cube: --date FIRST SECOND."
            )


@dataclass(frozen=True, kw_only=True)
class RasterPrediction:
    """Maps of scenes or pairs: entries that are made one by one (see `pieces.build`).

    Attributes:
        folder: Where `<name>.tif` go.
        scenes: The scenes, or pairs of them for a task of change.
        task: In evaluation mode, on its device.
        options: Windows and blending.
        writes_numbers: The task predicts numbers, not classes.
        left_out: Why a scene cannot be opened, by its name.
    """

    folder: Path
    scenes: Sequence[Scene | ScenePair]
    task: Predictor
    options: PredictOptions = field(default_factory=PredictOptions)
    writes_numbers: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> Sequence[str]:
        """Names of the scenes."""
        return [scene.name for scene in self.scenes]

    def path(self, name: str) -> Path:
        """Return the file of a scene."""
        return self.folder / f"{name}.tif"

    def is_ready(self, key: str) -> bool:
        """Tell whether the map of a scene is there, made from its files as they are."""
        return is_made_from(self.path(key), self._scene(key).facts)

    @cached_property
    def _by_key(self) -> dict[str, Scene | ScenePair]:
        return dict(
            zip(reversed(self.keys), reversed(self.scenes), strict=True)
        )  # the first counts

    def _scene(self, key: str) -> Scene | ScenePair:
        return self._by_key[key]

    def make(self, key: str) -> None:
        """Predict a scene.

        Raises:
            DataError: A file cannot be read.
        """
        scene, source = self._scene(key), self._scene(key).facts
        tell_again(self.path(key))
        count, path = len(self.task.classes), self.path(key)
        grid = _Pair(scene) if isinstance(scene, ScenePair) else _Pixels(scene)
        if self.writes_numbers:
            numbers = NumberMap(path, grid.shape, count, source)
            predict_map(self.task, grid.read, numbers, self.options)
            write_number_preview(beside(path, "png"), numbers.numbers[0], self.task.classes[0])
            write_number_map(path, numbers.numbers, grid.place, self.task.classes)
            keep_source(path, source)
            numbers.remove()
            return
        found = LabelMap(path, grid.shape, count, source)
        nodata = _NODATA[found.labels.dtype == np.uint8]
        predict_map(self.task, grid.read, found, self.options, nothing=nodata)
        write_class_preview(beside(path, "png"), found.labels, self.task.classes, nodata)
        write_class_map(
            path, found.labels, grid.place, nodata=nodata, classes=self.task.classes,
            colours=class_colours(count),
        )  # fmt: skip
        keep_source(path, source)
        found.remove()


class _Pixels:
    """The finest pixels of a scene, from its north-west corner on.

    Attributes:
        step: Side of a pixel in CRS units.
        shape: Rows and columns.
        place: Where they lie.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.step = min(part.target.step for part in scene.parts.values())
        bounds = scene.bounds
        self.shape = tuple(int(side / self.step + 1e-6) for side in (bounds.height, bounds.width))
        corner = (bounds.left, bounds.top)
        self.place = MapPlace(crs=scene.crs, corner=corner, step=self.step)

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
            pixels = part.read(around)
            values, valid = pixels.values, pixels.valid & np.isfinite(pixels.values).all(1)
            values = np.where(valid[:, None], values, np.float32(0))
            times = part.times
            days = times.astype("datetime64[D]").astype(np.int64).astype(np.int32)
            dates = torch.from_numpy(days)
            is_series = part.modality.kind == "series"
            batch[name] = torch.from_numpy(values if is_series else values[0])[None]
            batch[key(name, "valid")] = torch.from_numpy(valid if is_series else valid[0])[None]
            if not np.isnat(times).any():
                batch[key(name, "dates")] = dates[None] if is_series else dates
        return batch


class _Pair:
    """The finest pixels of the area of two dates; modalities are series of two.

    Attributes:
        shape: Rows and columns.
        place: Where they lie.
    """

    def __init__(self, pair: ScenePair) -> None:
        self._dated = pair.dated
        self._both = tuple(_Pixels(scene) for scene in pair.scenes())
        self.shape, self.place = self._both[0].shape, self._both[0].place

    def read(self, box: Box) -> Batch:
        """Return the batch of a box, of one item: series (1, 2, C, H, W) of what has dates."""
        before, after = (pixels.read(box) for pixels in self._both)
        batch = Batch()
        for name, values in before.items():
            if name.partition(".")[0] not in self._dated:
                batch[name] = values
            elif name in after:
                batch[name] = torch.stack([values, after[name]], 1)
        return batch
