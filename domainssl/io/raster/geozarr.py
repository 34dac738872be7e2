"""Write grids of vectors as Zarr v3: GeoZarr for maps, plain axes with an affine for volumes.

    store = VectorStore(path)
    store.create(layout)                                # metadata, coordinates, empty shards
    store.write((slice(0, 64), slice(64, 128)), values)  # float (E, h, w), NaN where not valid

An array `embedding` (band, y, x) of whole shards, coordinates of the centres of cells, and, for
maps, a grid mapping `spatial_ref` (CF 1.12, with GDAL's GeoTransform) beside the attributes
`proj:code` and `spatial:transform` of the Zarr conventions. With int8, every vector has its own
`scale` beside it: value = stored * scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from domainssl.errors import DataError, require, unwritable

__all__ = ["INT8_NODATA", "Dtype", "VectorLayout", "VectorStore", "quantize"]

Array = np.ndarray[Any, Any]
Dtype = Literal["float32", "float16", "int8"]
INT8_NODATA = -128
_FORMAT = "domainssl embedding 1"


@dataclass(frozen=True, kw_only=True)
class VectorLayout:
    """What a store holds.

    Attributes:
        shape: Cells along each axis, (y, x) or (x, y, z).
        shard: Cells of a shard: what is written at once.
        chunk: Cells of a chunk, which divide those of a shard: what is read at once.
        dim: Length of a vector.
        dtype: Of the numbers as stored.
        crs: `EPSG:n` or WKT of a map; empty for a volume.
        left, top: Outer corner of the first cell of a map.
        step: Side of a cell of a map, in CRS units.
        affine: Cell to RAS mm of a volume, (4, 4), rows; empty for a map.
        facts: Further attributes, plain data.
    """

    shape: tuple[int, ...]
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    dim: int
    dtype: Dtype = "float32"
    crs: str = ""
    left: float = 0.0
    top: float = 0.0
    step: float = 1.0
    affine: tuple[tuple[float, ...], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def transform(self) -> tuple[float, ...]:
        """Affine map from (column, row) of outer corners, (a, b, c, d, e, f)."""
        return (self.step, 0.0, self.left, 0.0, -self.step, self.top)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes after the first."""
        return ("y", "x") if len(self.shape) == 2 else ("x", "y", "z")


def quantize(values: Array) -> tuple[Array, Array]:
    """Return int8 vectors and the scale of each: value = stored * scale.

    Args:
        values: float (E, *S); NaN in the whole vector where it is not valid.

    Returns:
        int8 (E, *S), -128 where not valid, and float32 (*S), NaN where not valid.
    """
    largest = np.abs(values).max(0).astype(np.float32)  # NaN stays NaN
    scale = np.where(largest > 0, largest / 127, np.where(np.isnan(largest), np.nan, 1)).astype(
        np.float32
    )
    stored = np.rint(values / scale)
    return np.where(np.isnan(stored), INT8_NODATA, stored).astype(np.int8), scale


class VectorStore:
    """A Zarr store of vectors on a grid; handles open when they are used and are not pickled.

    Args:
        path: The store, a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._group: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_group": None}

    @property
    def group(self) -> Any:
        """The Zarr group.

        Raises:
            DataError: There is none, or it is no embedding.
        """
        if self._group is None:
            zarr = require("zarr", "geo")
            try:
                group = zarr.open_group(
                    str(self.path), mode="r+", zarr_format=3, use_consolidated=False
                )
            except (OSError, ValueError, KeyError) as error:
                raise DataError(f"{self.path}: no Zarr store can be opened ({error}).") from error
            if group.attrs.get("format") != _FORMAT:
                raise DataError(
                    f"{self.path}: no embedding: expected the attribute format {_FORMAT!r}, got "
                    f"{group.attrs.get('format')!r}. Choose another --output."
                )
            self._group = group
        return self._group

    @property
    def facts(self) -> dict[str, Any]:
        """Attributes of the store."""
        return dict(self.group.attrs)

    def create(self, layout: VectorLayout) -> None:
        """Write everything but the vectors.

        Raises:
            StorageError: It cannot be written.
        """
        zarr = require("zarr", "geo")
        attributes: dict[str, Any] = {
            "Conventions": "CF-1.12",
            "format": _FORMAT,
            **layout.facts,
        }
        mapping: dict[str, Any] = {}
        if layout.crs:
            place = _geozarr(layout)
            attributes |= place
            mapping = {"grid_mapping": "spatial_ref", "coordinates": "spatial_ref", **place}
        elif layout.affine:
            attributes["affine_ras_mm"] = [list(row) for row in layout.affine]
        try:
            group = zarr.open_group(str(self.path), mode="w", zarr_format=3, attributes=attributes)
            self._vectors(group, layout, mapping)
            for name, (values, more) in _coordinates(layout).items():
                made = group.create_array(
                    name,
                    shape=values.shape,
                    dtype=values.dtype,
                    chunks=values.shape or "auto",
                    dimension_names=[name] if values.ndim else None,
                    attributes=more,
                )
                made[...] = values
            with warnings.catch_warnings():  # xarray looks for it, the specification lacks it yet
                warnings.filterwarnings("ignore", ".*", category=zarr.errors.ZarrUserWarning)
                zarr.consolidate_metadata(str(self.path), zarr_format=3)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._group = None

    def _vectors(self, group: Any, layout: VectorLayout, mapping: Mapping[str, Any]) -> None:
        is_float = layout.dtype != "int8"
        fill = float("nan") if is_float else INT8_NODATA
        group.create_array(
            "embedding",
            shape=(layout.dim, *layout.shape),
            dtype=layout.dtype,
            shards=(layout.dim, *layout.shard),
            chunks=(layout.dim, *layout.chunk),
            fill_value=fill,
            dimension_names=["band", *layout.axes],
            attributes={
                "long_name": "features of a self-supervised backbone",
                "units": "1",
                **mapping,
                **_fill(layout.dtype),
            },
        )
        if not is_float:
            group.create_array(
                "scale",
                shape=layout.shape,
                dtype="float32",
                shards=layout.shard,
                chunks=layout.chunk,
                fill_value=float("nan"),
                dimension_names=list(layout.axes),
                attributes={
                    "long_name": "factor of the vector: value = embedding * scale",
                    **mapping,
                    **_fill("float32"),
                },
            )

    def write(self, box: Sequence[slice], values: Array) -> None:
        """Write the vectors of whole shards.

        Args:
            box: Cells, one slice per axis.
            values: float (E, *cells), NaN where not valid.

        Raises:
            StorageError: They cannot be written.
        """
        group = self.group
        try:
            if group["embedding"].dtype == np.int8:
                stored, scale = quantize(values)
                group["scale"][tuple(box)] = scale
            else:
                stored = values.astype(group["embedding"].dtype)
            group["embedding"][(slice(None), *box)] = stored
        except OSError as error:
            raise unwritable(self.path, error) from error

    def read(self, box: Sequence[slice]) -> Array:
        """Return vectors as float32 (E, *cells), NaN where not valid; int8 scaled back."""
        group = self.group
        stored = np.asarray(group["embedding"][(slice(None), *box)])
        if stored.dtype != np.int8:
            return stored.astype(np.float32)
        return stored.astype(np.float32) * np.asarray(group["scale"][tuple(box)])[None]


def _fill(dtype: str) -> dict[str, Any]:
    """Return `_FillValue` as xarray reads it from Zarr v3: base64 of a little-endian double."""
    import base64
    import struct

    if dtype == "int8":
        return {"_FillValue": INT8_NODATA}
    return {"_FillValue": base64.standard_b64encode(struct.pack("<d", float("nan"))).decode()}


def _geozarr(layout: VectorLayout) -> dict[str, Any]:
    name = "proj:code" if layout.crs.startswith("EPSG:") else "proj:wkt2"
    left, top = layout.left, layout.top
    right = left + layout.step * layout.shape[1]
    bottom = top - layout.step * layout.shape[0]
    return {
        name: layout.crs,
        "spatial:dimensions": ["y", "x"],
        "spatial:transform": list(layout.transform),
        "spatial:bbox": [left, bottom, right, top],
        "spatial:shape": list(layout.shape),
        "spatial:registration": "pixel",
    }


def _coordinates(layout: VectorLayout) -> dict[str, tuple[Array, dict[str, Any]]]:
    """Return coordinate arrays with their attributes, by name."""
    found: dict[str, tuple[Array, dict[str, Any]]] = {
        "band": (np.arange(layout.dim, dtype=np.int32), {"long_name": "number of the feature"})
    }
    if not layout.crs:
        return found
    pyproj = require("pyproj", "geo")
    crs = pyproj.CRS.from_user_input(layout.crs)
    facts = {axis["axis"].lower(): axis for axis in crs.cs_to_cf() if "axis" in axis}
    for axis, first, step, count in (
        ("y", layout.top, -layout.step, layout.shape[0]),
        ("x", layout.left, layout.step, layout.shape[1]),
    ):
        centres = first + step * (np.arange(count, dtype=np.float64) + 0.5)
        found[axis] = (centres, dict(facts.get(axis, {"axis": axis.upper()})))
    a, b, c, d, e, f = layout.transform
    mapping = {
        **crs.to_cf(),
        "spatial_ref": crs.to_wkt(),
        "GeoTransform": " ".join(repr(float(v)) for v in (c, a, b, f, d, e)),
    }
    found["spatial_ref"] = (np.zeros((), np.int64), mapping)
    return found
