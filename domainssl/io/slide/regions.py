"""Regions drawn on slides: QuPath's GeoJSON, or pictures whose numbers are classes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainssl.errors import ConfigError, DataError, parsing, require
from domainssl.files import read_small
from domainssl.io.slide.picture import read_label_picture
from domainssl.io.slide.tissue import area_fractions

__all__ = ["ENDINGS", "Regions", "check_regions", "read_regions", "regions_for"]

logger = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]
ENDINGS = (".geojson", ".json", ".png", ".tif", ".tiff")
_LARGEST = 2**28  # bytes of GeoJSON
_SMALLEST = 2.0  # pixels that regions have at least
_ASPECT = 0.01  # relative difference of the sides of mask and slide
_ROUNDED = 0.1  # by which those of a small mask may differ more


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Named regions of a slide.

    Attributes:
        path: The file.
        names: Names of the classes; an empty text where a region has none.
        shapes: Outline of every class in level-0 pixels (shapely), for GeoJSON.
        ignored: Outline that is left out (classes of QuPath that end in `*`), or None.
        mask: Index of the class in `names` plus 1, 0 is outside, (H, W), for pictures.
    """

    path: str
    names: tuple[str, ...]
    shapes: tuple[Any, ...] = ()
    ignored: Any = None
    mask: Array | None = None

    def under(
        self, coords: Array, size: tuple[int, int], slide_size: tuple[int, int]
    ) -> tuple[Array, Array]:
        """Return the class with the largest share under every tile, and the share of all.

        Args:
            coords: Upper left corners in level-0 pixels, (N, 2), x and y.
            size: Width and height of tiles in level-0 pixels.
            slide_size: Width and height of level 0.

        Returns:
            Names (N,) str, and shares in [0, 1], (N,).

        Raises:
            DataError: The regions are not those of this slide.
        """
        if self.mask is not None:
            shares = self._by_mask(coords, size, slide_size)
        else:
            shares = self._by_shape(coords, size, slide_size)
        if not len(shares):
            return np.full(len(coords), "", object), np.zeros(len(coords))
        names = np.array(self.names, object)[shares.argmax(0)]
        total = np.minimum(shares.sum(0), 1.0)
        return np.where(total > 0, names, ""), total

    def _by_mask(self, coords: Array, size: tuple[int, int], slide: tuple[int, int]) -> Array:
        assert self.mask is not None
        height, width = self.mask.shape
        downsample = slide[0] / width, slide[1] / height
        if abs(downsample[0] / downsample[1] - 1) > _ASPECT + min(_ROUNDED, 1 / min(height, width)):
            raise DataError(
                f"{self.path}: a mask of {width} x {height} pixels for a slide of {slide[0]} x "
                f"{slide[1]}, expected the same shape. Is it that of another slide?"
            )
        found = [
            area_fractions(self.mask == n + 1, downsample, coords, size)
            for n in range(len(self.names))
        ]
        return np.stack(found) if found else np.zeros((0, len(coords)))

    def _by_shape(self, coords: Array, size: tuple[int, int], slide: tuple[int, int]) -> Array:
        shapely = require("shapely", "pathology")
        slide_box = shapely.box(0, 0, *slide)
        inside = [shape.intersects(slide_box) for shape in self.shapes]
        bounds = shapely.total_bounds(np.array(self.shapes, object))
        if any(inside) and max(bounds[2:] - bounds[:2]) < _SMALLEST:
            raise DataError(
                f"{self.path}: all regions together are {max(bounds[2:] - bounds[:2]):.3g} pixels "
                "wide, so their coordinates are no level-0 pixels but fractions or millimetres. "
                "Export them in pixels."
            )
        if any(inside) and not all(inside):
            names = ", ".join(n or "(no class)" for n, i in zip(self.names, inside, strict=True)
                              if not i)  # fmt: skip
            logger.warning("%s: all regions of %s lie outside the slide", self.path, names)
        if self.shapes and not any(inside):
            shown = ", ".join(f"{value:.0f}" for value in bounds)
            raise DataError(
                f"{self.path}: all regions lie outside the slide ({shown}; the slide has "
                f"{slide[0]} x {slide[1]} pixels). Is it the file of another slide, or are its "
                "coordinates no level-0 pixels?"
            )
        x, y = coords[:, 0], coords[:, 1]
        boxes = shapely.box(x, y, x + size[0], y + size[1])
        found = []
        for shape in self.shapes:
            seen = shape if self.ignored is None else shape.difference(self.ignored)
            shapely.prepare(seen)
            share = np.zeros(len(coords))
            touched = shapely.intersects(seen, boxes)
            cut = shapely.intersection(seen, boxes[touched])
            share[touched] = shapely.area(cut) / (size[0] * size[1])
            found.append(share)
        return np.stack(found) if found else np.zeros((0, len(coords)))


def read_regions(path: str | os.PathLike[str], names: Mapping[int, str] | None = None) -> Regions:
    """Read the regions of one slide.

    Args:
        path: GeoJSON as QuPath exports it, or a picture of labels: 0 is outside, every other
            number a class. It covers the whole slide at any resolution.
        names: Names of the numbers of a picture.

    Raises:
        DataError: The file cannot be read or holds no regions.
    """
    path = str(path)
    if path.lower().endswith((".geojson", ".json")):
        return _from_geojson(path)
    mask = read_label_picture(path)
    values = [int(value) for value in np.unique(mask) if value]
    if len(values) > 256:
        raise DataError(
            f"{path}: holds {len(values)} different numbers, expected a picture of at most 256 "
            "classes. Is it a photograph?"
        )
    table = np.zeros(int(mask.max(initial=0)) + 1, np.uint16)
    table[values] = np.arange(1, len(values) + 1)
    known = names or {}
    return Regions(
        path=path,
        names=tuple(known.get(value, str(value)) for value in values),
        mask=table[mask],
    )


def check_regions(path: str | None, slides: int) -> None:
    """Refuse one file of regions for several slides, whose regions those are not.

    Raises:
        ConfigError: It is one, or nothing is there.
    """
    if path is None or os.path.isdir(path):
        return
    if not os.path.exists(path) or slides > 1:
        there = f"is one file for {slides} slides" if os.path.exists(path) else "nothing lies there"
        raise ConfigError(
            f"regions {path}: {there}; expected a folder with a file of regions for each slide, "
            f"of its name ({', '.join(ENDINGS)}), or the file of one slide."
        )


def regions_for(folder: str, slide: str) -> str | None:
    """Return the file of regions for a slide: in a folder, one of the slide's name."""
    if not os.path.isdir(folder):
        return folder
    name = os.path.basename(slide)
    stems = [name, os.path.splitext(name)[0], name.split(".")[0]]
    for stem in dict.fromkeys(stems):
        for ending in ENDINGS:
            path = os.path.join(folder, stem + ending)
            if os.path.isfile(path):
                return path
    return None


def _from_geojson(path: str) -> Regions:
    shapely = require("shapely", "pathology")
    text = read_small(path, limit=_LARGEST)
    with parsing(f"{path}: the GeoJSON", advice="Export it from QuPath again.",
                 also=(shapely.errors.ShapelyError,)):  # fmt: skip
        by_name: dict[str, list[Any]] = {}
        for feature in _features(json.loads(text)):
            shapes = list(_polygons(shapely.geometry.shape(feature["geometry"])))
            if not shapes:
                continue  # points and lines have no area
            shape = shapely.union_all(shapes) if len(shapes) > 1 else shapes[0]
            if not np.isfinite(shapely.total_bounds(shape)).all():
                raise ValueError("coordinates that are not finite")
            by_name.setdefault(_name(feature), []).append(shape)
        united = {name: shapely.union_all(shapes) for name, shapes in by_name.items()}
    ignored = [shape for name, shape in united.items() if name.endswith("*")]
    kept = {name: shape for name, shape in united.items() if not name.endswith("*")}
    if not kept:
        raise DataError(
            f"{path}: holds no polygons, expected the annotations of a slide as QuPath exports "
            "them (File, Export objects as GeoJSON)."
        )
    return Regions(
        path=path,
        names=tuple(sorted(kept)),
        shapes=tuple(kept[name] for name in sorted(kept)),
        ignored=shapely.union_all(ignored) if ignored else None,
    )


def _polygons(shape: Any) -> Iterator[Any]:
    """Yield the valid polygons of a geometry, also those of a collection; none that are empty."""
    shapely = require("shapely", "pathology")
    if shape.geom_type == "GeometryCollection":
        for part in shape.geoms:
            yield from _polygons(part)
    elif shape.geom_type in ("Polygon", "MultiPolygon") and not shape.is_empty:
        yield shape if shape.is_valid else shapely.make_valid(shape)


def _features(content: Any) -> Sequence[Mapping[str, Any]]:
    """Return the features of a collection, a list or a single one."""
    if isinstance(content, Mapping) and content.get("type") == "FeatureCollection":
        content = content.get("features", [])
    found = content if isinstance(content, list) else [content]
    if not all(isinstance(f, Mapping) and "geometry" in f for f in found):
        raise ValueError("no features with a geometry")
    placed = [f for f in found if f["geometry"] is not None]  # null is a feature without a place
    if not all(isinstance(f["geometry"], Mapping) for f in placed):
        raise ValueError("no features with a geometry")
    return placed


def _name(feature: Mapping[str, Any]) -> str:
    properties = feature.get("properties") or {}
    named = properties.get("classification") if isinstance(properties, Mapping) else None
    if isinstance(named, Mapping):
        found = named.get("name") or "/".join(map(str, named.get("names", ())))
        return str(found or "").strip()
    return str(named or "").strip()
