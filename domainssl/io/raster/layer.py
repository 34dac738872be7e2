"""Facts about one sensor in one file: what is stored of each band, where, and what it means.

A `LayerFile` holds paths and facts only, so it travels to worker processes. `bands.py`,
`geotiff.py` and `safe.py` find the facts; `read.py` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from domainssl.errors import DataError
from domainssl.io.raster.grid import Bounds, Grid

__all__ = ["OFFSET_BASELINE", "LayerFile", "StoredBand"]

OFFSET_BASELINE = 4.0  # from which on Sentinel-2 products store reflectance with 1000 added


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredBand:
    """Where one band is stored and what its numbers mean.

    Attributes:
        name: Canonical name.
        array: Path of the array in the store; empty for GeoTIFF.
        index: Position on the band axis; None where the array is the band.
        axes: What each axis of the array is: `time`, `band`, `y`, `x`.
        grid: Where its pixels lie.
        chunk: Rows and columns of a chunk.
        scale: Factor from stored to decoded values.
        offset: Added after scaling.
        nodata: Stored values that mean nothing was measured.
        limits: Lowest and highest stored value that is valid, where stated.
        unit: What the attributes call the unit of decoded values.
        is_integer: Stored as integers.
        is_byte: Stored as numbers of one byte.
        has_mask: The file marks missing pixels apart from the values: by a mask band, a `.msk`
            file or an alpha band (GeoTIFF).
        path: Its file, where a layer has one per band; empty means that of the `LayerFile`.
    """

    name: str
    array: str
    index: int | None
    axes: tuple[str, ...]
    grid: Grid
    chunk: tuple[int, int]
    scale: float = 1.0
    offset: float = 0.0
    nodata: tuple[float, ...] = ()
    limits: tuple[float, float] | None = None
    unit: str = ""
    is_integer: bool = False
    is_byte: bool = False
    has_mask: bool = False
    path: str = ""

    @property
    def is_scaled(self) -> bool:
        """True where stored and decoded values differ."""
        return self.scale != 1.0 or self.offset != 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFile:
    """One sensor in one file.

    Attributes:
        path: The file or store; the first one where each band has its own.
        kind: `zarr`, `geotiff` or `safe`.
        bands: The bands asked for, in that order.
        times: datetime64[s] per date; NaT where unknown.
        crs: `EPSG:n` or WKT.
        mask: The array that says which pixels to leave out, if asked for.
        options: fsspec options of a URL.
        baselines: Sentinel-2 processing baseline of each date; None where unknown.
        has_names: The file itself names its bands.
    """

    path: str
    kind: str
    bands: tuple[StoredBand, ...]
    times: Any
    crs: str
    mask: StoredBand | None = None
    options: Mapping[str, Any] | None = None
    baselines: tuple[float | None, ...] = ()
    has_names: bool = True

    def stored_unit(self, asked: str, date: int) -> str:
        """Return the stored unit of a date: the one asked for, or what `baseline` means for it.

        Raises:
            DataError: The date's baseline is not known.
        """
        if self.kind == "safe" and asked in ("baseline", "dn+1000"):
            return "dn"  # the metadata have said the offset of every band
        if asked != "baseline":
            return asked
        known = self.baselines[date] if self.baselines else None
        if known is None:
            raise DataError(
                f"{self.path}: stored_unit is 'baseline', but neither a product name nor a "
                "coordinate such as s2:processing_baseline tells the processing baseline of date "
                f"{date} ({self.times[date]}). Set stored_unit to dn or dn+1000."
            )
        return "dn+1000" if known >= OFFSET_BASELINE else "dn"

    @property
    def bounds(self) -> Bounds:
        """What all bands cover."""
        return reduce(Bounds.shared, (band.grid.bounds for band in self.bands))

    def on(self, name: str) -> StoredBand:
        """Return a band by its name."""
        return next(band for band in self.bands if band.name == name)
