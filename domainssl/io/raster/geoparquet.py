"""One vector per item as Parquet; as GeoParquet 1.1 where items lie on the earth.

The metadata `geo` is written with pyarrow: footprints are polygons in WKB, in longitude and
latitude (OGC:CRS84), with a covering box.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainssl.errors import require
from domainssl.io.raster.grid import Bounds

__all__ = ["Footprint", "vector_table"]

Array = np.ndarray[Any, Any]
_EDGE_POINTS = 5  # along a side: straight lines of a projection are curves in degrees


@dataclass(frozen=True)
class Footprint:
    """Where an item lies.

    Attributes:
        crs: `EPSG:n` or WKT of the bounds.
        bounds: The rectangle.
    """

    crs: str
    bounds: Bounds

    def ring(self) -> list[tuple[float, float]]:
        """Return the closed outline in longitude and latitude, counter-clockwise."""
        pyproj = require("pyproj", "geo")
        b = self.bounds
        corners = [(b.left, b.bottom), (b.right, b.bottom), (b.right, b.top), (b.left, b.top)]
        points = []
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            points += [
                (x0 + (x1 - x0) * i / _EDGE_POINTS, y0 + (y1 - y0) * i / _EDGE_POINTS)
                for i in range(_EDGE_POINTS)
            ]
        change = pyproj.Transformer.from_crs(self.crs, "OGC:CRS84", always_xy=True)
        xs, ys = change.transform(*zip(*points, strict=True))
        ring = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
        return [*ring, ring[0]]


def _wkb(ring: Sequence[tuple[float, float]]) -> bytes:
    head = struct.pack("<BIII", 1, 3, 1, len(ring))
    return head + b"".join(struct.pack("<dd", *point) for point in ring)


def vector_table(
    ids: Sequence[str],
    vectors: Array,
    *,
    footprints: Sequence[Footprint | None] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    facts: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> bytes:
    """Return the bytes of a Parquet file.

    Args:
        ids: Of the items.
        vectors: float (N, E), NaN where an item has nothing valid.
        footprints: Where items lie; None writes plain Parquet.
        columns: Further columns.
        facts: Plain data, kept under the key `domainssl` of the file's metadata.
        dtype: Of the vectors as stored; int8 adds the column `scale`.
    """
    pa, pq = require("pyarrow", "geo"), require("pyarrow.parquet", "geo")
    arrays: dict[str, Any] = {"id": pa.array(list(ids), pa.string())}
    metadata = {"domainssl": json.dumps(dict(facts or {}))}
    if footprints is not None:
        rings = [None if f is None else f.ring() for f in footprints]
        arrays["geometry"] = pa.array([None if r is None else _wkb(r) for r in rings], pa.binary())
        boxes = [
            None
            if r is None
            else {
                "xmin": min(x for x, _ in r), "ymin": min(y for _, y in r),
                "xmax": max(x for x, _ in r), "ymax": max(y for _, y in r),
            }
            for r in rings
        ]  # fmt: skip
        names = ("xmin", "ymin", "xmax", "ymax")
        arrays["bbox"] = pa.array(boxes, pa.struct([(name, pa.float64()) for name in names]))
        known = [box for box in boxes if box is not None]
        column: dict[str, Any] = {
            "encoding": "WKB",
            "geometry_types": ["Polygon"],
            "covering": {"bbox": {name: ["bbox", name] for name in names}},
        }
        if known:
            column["bbox"] = [
                pick(box[name] for box in known)
                for name, pick in zip(names, (min, min, max, max), strict=True)
            ]
        geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
        metadata["geo"] = json.dumps(geo)
    for name, values in (columns or {}).items():
        arrays[name] = pa.array(list(values))
    stored = vectors
    if dtype == "int8":
        from domainssl.io.raster.geozarr import quantize

        quantized, scale = quantize(vectors.T)
        stored, arrays["scale"] = quantized.T, pa.array(scale)
    flat = np.ascontiguousarray(stored.astype(dtype)).reshape(-1)
    arrays["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1])
    table = pa.table(arrays).replace_schema_metadata(metadata)
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    return content.getvalue()
