"""Rasters as backbones see them: bands of the card, in its unit, on one grid of cells.

scene = open_scene("S2.tif", backbone, SceneOptions())     # files are described, not read
scene.read(windows, (slice(0, 8), slice(0, 8)))            # batch of one item over these cells
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, DataError, nearest, require
from domainssl.inference.outputs import file_states
from domainssl.inference.scene_bands import describe_scene, modality_of
from domainssl.inference.scene_units import refuse_other_unit
from domainssl.inference.tokens import TokenWindows
from domainssl.io.raster.grid import METRES_PER_DEGREE, Bounds, said_crs
from domainssl.io.raster.layer import LayerFile
from domainssl.io.raster.offset import settled_unit
from domainssl.io.raster.read import MaskRule, Pixels, Target, conversion, read_pixels
from domainssl.io.raster.time import day_in_name
from domainssl.io.storage.paths import is_url
from domainssl.modality import Batch, Modality, key

__all__ = ["Scene", "SceneOptions", "open_scene", "stem"]

Array = np.ndarray[Any, Any]
_UNITS = (
    "auto", "dn", "dn+1000", "baseline", "reflectance", "db", "linear", "amplitude", "arbitrary",
)  # fmt: skip
_SAME_GSD = 0.1  # relative difference up to which pixels count as those of the card


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """What a user says about rasters.

    Attributes:
        modality: Which one the raster is; None finds the one whose bands it has.
        bands: What the bands of a GeoTIFF are called, in their order, instead of its own names.
        stored_unit: What the files hold, see `sources.cube_options.Layer`; one for all modalities,
            or `s1=db,s2=dn`.
        date: Date of a cube, such as `2021-05-02`, `first` or `last`; None for the only one.
        max_dates: Dates of a series, evenly spread; None is all.
        mask: Array of a store that marks invalid pixels.
        mask_values: Its values that do.
        crs: Used where files do not say.
        group: Folder inside a store.
        any_gsd: Take pixels of another size than that of the card as they are.
        any_unit: Take values that look like those of another unit as they are.
    """

    modality: str | None = None
    bands: tuple[str, ...] = ()
    stored_unit: str = "auto"
    date: str | None = None
    max_dates: int | None = None
    mask: str | None = None
    mask_values: tuple[int, ...] = (0, 1, 3, 8, 9, 10)
    crs: str | None = None
    group: str = ""
    any_gsd: bool = False
    any_unit: bool = False

    def unit_of(self, modality: str) -> str:
        """Return what the files of a modality hold.

        Raises:
            ConfigError: It is no unit.
        """
        found = "auto"
        for part in self.stored_unit.split(","):
            name, sign, unit = part.strip().rpartition("=")
            if unit not in _UNITS:
                raise ConfigError(
                    f"--stored_unit: got {unit!r}, expected one of {', '.join(_UNITS)}, for all "
                    f"modalities or as s1=db,s2=dn.{nearest(unit, _UNITS)}"
                )
            if not sign or name == modality:
                found = unit
        return found

    def refuse_unknown_units(self, modalities: Collection[str]) -> None:
        """Refuse units of modalities that there are not.

        Raises:
            ConfigError: There are some.
        """
        for part in self.stored_unit.split(","):
            name, sign, _ = part.strip().rpartition("=")
            if sign and name not in modalities:
                raise ConfigError(
                    f"--stored_unit {part.strip()}: there is no modality {name!r}, only "
                    f"{', '.join(modalities)}.{nearest(name, modalities)}"
                )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One modality of a scene.

    Attributes:
        file: Where it lies.
        modality: What the backbone expects.
        dates: Positions of the dates that are read; of several entries of one time, such as two
            granules of one overpass, the first valid pixels count.
        target: What is delivered.
    """

    file: LayerFile
    modality: Modality
    dates: tuple[tuple[int, ...], ...]
    target: Target

    @property
    def times(self) -> Any:
        """datetime64[s] per date."""
        return self.file.times[[entries[0] for entries in self.dates]]

    def read(self, bounds: Bounds) -> Pixels:
        """Read all dates over a rectangle; see `read_pixels`."""
        entries = [entry for date in self.dates for entry in date]
        pixels = read_pixels(self.file, entries, bounds, self.target)
        counts = [len(date) for date in self.dates]
        return pixels if max(counts) == 1 else pixels.merged(counts)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A place with one raster per modality, all in one coordinate reference system.

    Attributes:
        name: What outputs are called.
        parts: By modality.
        crs: Coordinate reference system.
        bounds: What all rasters cover.
    """

    name: str
    parts: Mapping[str, _Part]
    crs: str
    bounds: Bounds

    @property
    def facts(self) -> dict[str, Any]:
        """What the result rests on, as plain data without paths."""
        found: dict[str, Any] = {}
        for name, part in self.parts.items():
            entry: dict[str, Any] = {
                "bands": [band.name for band in part.file.bands],
                "stored_unit": part.target.stored_unit,
                "value_unit": part.target.unit,
                "step": part.target.step,
                "dates": [str(time) for time in part.times],
            }
            states = _states(part.file)
            entry |= {"file": states[0]} if len(states) == 1 else {"files": states}
            if part.file.mask is not None:
                rule = part.target.rule
                entry["mask"] = [part.file.mask.array, *rule.values]
            found[name] = entry
        return {"crs": self.crs, "bounds": self._plain(self.bounds), "modalities": found}

    @staticmethod
    def _plain(bounds: Bounds) -> list[float]:
        return [bounds.left, bounds.bottom, bounds.right, bounds.top]

    @property
    def date(self) -> str:
        """The only date of the scene, ISO 8601; empty where there are several or none."""
        known = {str(time) for part in self.parts.values() for time in part.times}
        return known.pop() if len(known) == 1 and "NaT" not in known else ""

    @cached_property
    def _pixels(self) -> dict[str, tuple[int, int]]:
        """Rows and columns that each modality has whole, from the north-west corner on."""
        return {
            name: (
                int(self.bounds.height / part.target.step + 1e-6),
                int(self.bounds.width / part.target.step + 1e-6),
            )
            for name, part in self.parts.items()
        }

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the finest modality."""
        return max(self._pixels.values())

    def step(self, windows: TokenWindows) -> float:
        """Return the side of a cell in CRS units."""
        name, part = next(iter(self.parts.items()))
        return part.target.step * windows.cells(name)[0]

    def shape(self, windows: TokenWindows) -> tuple[int, ...]:
        """Return the cells (y, x) that hold at least one pixel of every modality."""
        counts = [
            tuple(math.ceil(n / c) for n, c in zip(pixels, windows.cells(name), strict=True))
            for name, pixels in self._pixels.items()
        ]
        return tuple(min(each) for each in zip(*counts, strict=True))

    def numbers(self, windows: TokenWindows) -> int:
        """Return how many numbers are read for a cell."""
        return sum(
            len(part.dates) * part.modality.num_channels * math.prod(windows.cells(name))
            for name, part in self.parts.items()
        )

    def place(self, windows: TokenWindows) -> dict[str, Any]:
        """Return where the cells lie; see `VectorLayout`."""
        return {
            "crs": self.crs,
            "left": self.bounds.left,
            "top": self.bounds.top,
            "step": self.step(windows),
        }

    def read(self, windows: TokenWindows, box: Sequence[slice]) -> Batch:
        """Read the pixels of some cells; those beyond the rasters are zero and not valid.

        Args:
            windows: Says how many pixels a cell has.
            box: Rows and columns of cells on the grid.

        Returns:
            One item: values, `valid` and `dates` of each modality.

        Raises:
            DataError: A file is damaged.
        """
        batch: Batch = {}
        for name, part in self.parts.items():
            sides = windows.cells(name)
            rows, columns = (
                (s.start * side, s.stop * side) for s, side in zip(box, sides, strict=True)
            )
            height, width = self._pixels[name]
            kept = min(rows[1], height), min(columns[1], width)
            step = part.target.step
            around = Bounds(
                self.bounds.left + columns[0] * step,
                self.bounds.top - kept[0] * step,
                self.bounds.left + kept[1] * step,
                self.bounds.top - rows[0] * step,
            )
            pixels = part.read(around)
            margins = ((0, rows[1] - kept[0]), (0, columns[1] - kept[1]))
            values, valid = pixels.values, pixels.valid & np.isfinite(pixels.values).all(1)
            if np.any(margins):
                values = np.pad(values, ((0, 0), (0, 0), *margins))
                valid = np.pad(valid, ((0, 0), *margins))
            if part.modality.kind == "image":
                values, valid = values[0], valid[0]
            batch[name] = torch.from_numpy(values)[None]
            batch[key(name, "valid")] = torch.from_numpy(np.ascontiguousarray(valid))[None]
            days = part.times.astype("datetime64[D]").astype(np.int64)
            if not np.isnat(part.times).any():
                dates = torch.from_numpy(days.astype(np.int32))
                batch[key(name, "dates")] = dates[None] if len(values.shape) == 4 else dates
        return batch

    def narrowed(self, windows: TokenWindows, batch: Batch, box: Sequence[slice]) -> Batch:
        """Return some cells of what `read` gave, counted from its first ones."""
        out: Batch = {}
        for name, values in batch.items():
            modality = name.partition(".")[0]
            if name not in (modality, key(modality, "valid")):
                out[name] = values
                continue
            sides = windows.cells(modality)
            place = tuple(slice(s.start * n, s.stop * n) for s, n in zip(box, sides, strict=True))
            out[name] = values[(..., *place)]
        return out


def open_scene(
    files: str | Mapping[str, str],
    backbone: Backbone,
    options: SceneOptions,
    name: str = "",
) -> Scene:
    """Describe rasters and compare them with the card of a backbone.

    Args:
        files: A GeoTIFF or Zarr store, or one per modality.
        backbone: Whose card says bands, unit, kind and pixel size.
        options: What the user says.
        name: What outputs are called; empty takes the name of the file.

    Raises:
        ConfigError: A modality or a date has to be chosen.
        DataError: Bands are missing, nothing says what the numbers are, or the rasters share no
            area.
        WeightsError: The data do not fit the weights.
    """
    if isinstance(files, str):
        found = options.modality or modality_of(files, backbone.modalities, **_described(options))
        files = {found: files}
    for known in files:
        if known not in backbone.modalities:
            raise ConfigError(
                f"modality {known!r}: the backbone knows {', '.join(backbone.modalities)}."
                f"{nearest(known, backbone.modalities)}"
            )
    if options.modality is not None and options.modality not in files:
        raise ConfigError(
            f"--modality {options.modality}: the files are named by modality already "
            f"({', '.join(files)}); leave it out."
        )
    options.refuse_unknown_units(backbone.modalities)
    parts = {n: _part(path, backbone.modalities[n], options) for n, path in files.items()}
    crs, bounds = None, None
    for part in parts.values():
        if crs is not None and part.file.crs != crs:
            raise DataError(
                f"{part.file.path} is in {part.file.crs[:60]}, its partner in {crs[:60]}. "
                "Reproject one of them: windows are cut, not warped."
            )
        crs = part.file.crs
        theirs = part.file.bounds
        bounds = theirs if bounds is None else bounds.shared(theirs)
    assert crs is not None and bounds is not None
    _refuse_unused_dates(parts, options)
    least = max(part.target.step for part in parts.values())
    if min(bounds.width, bounds.height) < least * (1 - 1e-6):
        raise DataError(f"{', '.join(files.values())}: the rasters share no area.")
    first = next(iter(files.values()))
    return Scene(name=name or stem(first), parts=parts, crs=crs, bounds=bounds)


def _refuse_unused_dates(parts: Mapping[str, _Part], options: SceneOptions) -> None:
    """Refuse a choice of dates that no modality has.

    Raises:
        ConfigError: There is one.
    """
    kinds = {part.modality.kind for part in parts.values()}
    if options.date is not None and kinds == {"series"}:
        raise ConfigError(
            f"--date {options.date}: chooses the only date that a backbone of images takes; this "
            "one takes a series, of which --max_dates limits the dates."
        )
    if options.max_dates is not None and "series" not in kinds:
        raise ConfigError(
            f"--max_dates {options.max_dates}: limits the dates of a series; this backbone takes "
            "images, of which --date chooses the date."
        )


def _states(file: LayerFile) -> list[list[int]]:
    """Return size and time of change of what is read; nothing of what lies behind a URL."""
    if is_url(file.path):
        return []
    layers = [*file.bands, *([file.mask] if file.mask is not None else [])]
    paths = dict.fromkeys(band.path or file.path for band in layers)
    if file.kind == "zarr" and os.path.isdir(file.path):
        paths = dict.fromkeys(os.path.join(file.path, band.array) for band in layers)
    masks = [f"{path}.msk" for path in paths if os.path.isfile(f"{path}.msk")]
    return file_states([*(path for path in paths if os.path.exists(path)), *masks])


def stem(path: str) -> str:
    """Return the name of a file without its ending."""
    name = os.path.basename(path.rstrip("/\\"))
    for ending in (".zarr.zip", ".zarr", ".safe.zip", ".safe", ".tiff", ".tif", ".nii.gz", ".nii"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return os.path.splitext(name)[0] or name


def _described(options: SceneOptions) -> dict[str, Any]:
    """Return how files are described; see `describe_scene`."""
    return {
        "names": options.bands, "mask": options.mask, "crs": options.crs, "group": options.group,
    }  # fmt: skip


def _part(path: str, modality: Modality, options: SceneOptions) -> _Part:
    if modality.kind not in ("image", "series") or modality.spatial_dims != 2:
        raise DataError(
            f"{path}: a raster, but modality {modality.name!r} of the backbone is of kind "
            f"{modality.kind!r}."
        )
    file = describe_scene(path, modality, **_described(options))
    _refuse_another_crs(file, options.crs)
    if len(file.times) == 1 and np.isnat(file.times[0]):  # neither the file nor a pattern says it
        day = day_in_name(os.path.basename(path.rstrip("/\\")))
        file = dataclasses.replace(file, times=np.array([day], "datetime64[s]"))
    dates = _dates(file, modality, options)
    asked = options.unit_of(modality.name)
    entries = [entry for date in dates for entry in date]
    unit = file.stored_unit(asked, entries[0])
    for date in entries:
        if file.stored_unit(asked, date) != unit:
            raise DataError(
                f"{path}: dates of Sentinel-2 processing baselines before and from 04.00 in one "
                "series; write one of both kinds, or the values without the offset."
            )
    rule = MaskRule(options.mask_values) if options.mask else MaskRule()
    unit = settled_unit(file, entries, unit, modality.value_unit, rule)
    for band in file.bands:
        conversion(band, modality.value_unit, unit, path)
    step = _step(file, modality, options)
    target = Target(modality.value_unit, unit, step, rule)
    part = _Part(file=file, modality=modality, dates=dates, target=target)
    if not options.any_unit:
        refuse_other_unit(file, entries, modality, target)
    return part


def _refuse_another_crs(file: LayerFile, said: str | None) -> None:
    """Refuse `--crs` that contradicts the file.

    Raises:
        ConfigError: It does.
    """
    if said is not None and said_crs(said) != file.crs:
        raise ConfigError(
            f"--crs {said}: {file.path} states {file.crs[:60]}; --crs is for rasters that state "
            "none. Leave it out, or mend the file (gdal_edit.py -a_srs)."
        )


def _dates(
    file: LayerFile, modality: Modality, options: SceneOptions
) -> tuple[tuple[int, ...], ...]:
    order: list[tuple[int, ...]] = []
    for entry in np.argsort(file.times, kind="stable").tolist():
        if order and file.times[entry] == file.times[order[-1][0]]:
            order[-1] = (*order[-1], entry)
        else:
            order.append((entry,))
    if modality.kind == "series":
        count = len(order) if options.max_dates is None else min(options.max_dates, len(order))
        return tuple(order[i * len(order) // count] for i in range(count))
    if options.date is None and len(order) == 1:
        return (order[0],)
    if options.date in ("first", "last"):
        return (order[0 if options.date == "first" else -1],)
    times = [str(file.times[entries[0]]) for entries in order]
    days = [time[:10] for time in times]
    fitting = [i for i, time in enumerate(times) if options.date in (time[:10], time[:16], time)]
    if len(fitting) == 1:
        return (order[fitting[0]],)
    if times == ["NaT"]:
        raise ConfigError(
            f"--date {options.date}: {file.path} is one image, whose date neither the file nor its "
            "name says. Leave it out."
        )
    names = times if fitting or len(set(days)) < len(days) else days
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    asked = f"--date {options.date}" if options.date else "--date is needed"
    raise ConfigError(
        f"{asked}: {file.path} has {len(days)} dates ({shown}), while the backbone takes one. "
        "Choose one of them, first or last."
    )


def _step(file: LayerFile, modality: Modality, options: SceneOptions) -> float:
    """Return the pixel size that is delivered, in CRS units."""
    own = min(band.grid.step for band in file.bands)
    wanted = modality.gsd_m
    if wanted is None or options.any_gsd:
        return own
    metres = _metres(file)
    if abs(own * metres / wanted - 1) <= _SAME_GSD:
        return own
    ratio = wanted / (own * metres)
    factor = ratio if ratio > 1 else 1 / ratio
    if abs(factor - round(factor)) > 1e-3:
        raise DataError(
            f"{file.path}: pixels of {own * metres:g} m, the weights were trained on {wanted:g} m, "
            "which is no whole multiple. Resample the raster, or take its pixels as they are "
            "with --any_gsd."
        )
    return own * round(ratio) if ratio > 1 else own / round(factor)


def _metres(file: LayerFile) -> float:
    """Return the metres of a unit of the CRS; degrees count along the meridian."""
    if file.crs.startswith(("EPSG:326", "EPSG:327")):
        return 1.0
    crs = require("pyproj", "geo").CRS.from_user_input(file.crs)
    if crs.is_geographic:
        return METRES_PER_DEGREE
    return float(crs.axis_info[0].unit_conversion_factor) if crs.axis_info else 1.0
