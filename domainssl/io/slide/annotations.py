"""Classes of tiles as regions that QuPath opens: GeoJSON in level-0 pixels with class colours."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from domainssl.errors import require
from domainssl.io.slide.grid import TileGrid
from domainssl.io.slide.overview import region_color

__all__ = ["geojson_of"]

Array = np.ndarray[Any, Any]
_NAMES = uuid.UUID("7a2f0d0e-5f7b-4d6c-9c39-0d5a6cf8f2c4")  # equal regions get equal ids


def geojson_of(grid: TileGrid, is_class: Array, chances: Array, classes: Sequence[str]) -> bytes:
    """Return GeoJSON with one annotation per connected region of a class.

    Tiles that share a side are one region, with the number of its tiles and their mean probability
    as measurements. Coordinates are whole level-0 pixels, x to the right and y down.

    Args:
        grid: Tiles that do not overlap.
        is_class: Which classes a tile has, bool (N, K).
        chances: Their probabilities, (N, K).
        classes: Their names.
    """
    features = [
        feature
        for number, name in enumerate(classes)
        for feature in _regions(grid, is_class[:, number], chances[:, number], number, name)
    ]
    content = {"type": "FeatureCollection", "features": features}
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def _regions(
    grid: TileGrid, chosen: Array, chances: Array, number: int, name: str
) -> Iterator[Mapping[str, Any]]:
    """Yield the annotations of one class."""
    shapely = require("shapely", "pathology")
    label = require("scipy.ndimage", "pathology").label
    cells = np.zeros(grid.shape, bool)
    cells[grid.rows[chosen], grid.columns[chosen]] = True
    of_cell, _ = label(cells)
    of_tile = of_cell[grid.rows, grid.columns] * chosen
    x, y = grid.coords.T
    width, height = grid.size_level0
    order = np.argsort(of_tile, kind="stable")
    borders = np.searchsorted(of_tile[order], np.arange(1, int(of_tile.max(initial=0)) + 2))
    for own in (order[a:b] for a, b in itertools.pairwise(borders)):
        boxes = shapely.box(x[own], y[own], x[own] + width, y[own] + height)
        outline = shapely.union_all(boxes)
        geometry = json.loads(shapely.to_geojson(outline.simplify(0)))
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(_NAMES, f"{name} {json.dumps(geometry)}")),
            "geometry": geometry,
            "properties": {
                "objectType": "annotation",
                "classification": {"name": name, "color": list(region_color(number))},
                "measurements": {
                    "tiles": len(own),
                    "mean probability": round(float(chances[own].mean()), 6),
                },
            },
        }
