"""What is published about SSL4EO-S12 v1.1 and TerraMesh: products, bands, units, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from domainssl.errors import DataError, nearest
from domainssl.sensors import (
    L1C_BANDS,
    L2A_BANDS,
    S1_BANDS,
    VALID_RANGES,
    canonical_band,
    wavelengths_nm,
)

__all__ = [
    "CLOUD_CLASSES",
    "LAND_COVER",
    "LAND_COVER_CLASSES",
    "LAYERS",
    "NO_DATA_CLASS",
    "OBSCURED_CLASSES",
    "PRODUCTS",
    "TERRAMESH",
    "Product",
    "check_bands",
    "product",
]

CLOUD_CLASSES = (
    "land", "water", "snow", "thin cloud", "thick cloud", "cloud shadow", "no data",
)  # fmt: skip
OBSCURED_CLASSES = (3, 4, 5)
_DTYPES = {"dn": np.int16, "rgb8": np.uint8, "class": np.uint8}
_RANGES = {"m": (-500.0, 9000.0), "index": (-1.0, 1.0), "class": (0.0, 255.0)}
NO_DATA_CLASS = 6


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product of the data set; statistics are of offset-free DN, dB or 8-bit values."""

    name: str
    bands: tuple[str, ...]
    value_unit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    nodata: float | None = None
    has_offset: bool = False
    zero_is_data: bool = False

    @property
    def valid_range(self) -> tuple[float, float]:
        """Lowest and highest plausible value."""
        return VALID_RANGES.get(self.value_unit) or _RANGES[self.value_unit]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of delivered values, which all stored ones fit into."""
        return np.dtype(_DTYPES.get(self.value_unit, np.float32))

    @property
    def wavelengths_nm(self) -> tuple[float, ...] | None:
        """Centre wavelengths, None for radar."""
        return wavelengths_nm(self.bands)


# Release A publishes the means of its S2 products with the +1000 left in; the values here are
# those of release B, 1000 lower, which is what batches carry.
PRODUCTS: dict[str, Product] = {
    p.name: p
    for p in (
        Product(
            name="S1GRD",
            bands=S1_BANDS,
            value_unit="db",
            mean=(-12.577, -20.265),
            std=(5.179, 5.872),
        ),
        Product(
            name="S2L1C",
            bands=L1C_BANDS,
            value_unit="dn",
            mean=(1607.345, 1393.068, 1320.225, 1373.963, 1562.536, 2110.071, 2392.832, 2321.154,
             2583.770, 838.712, 21.753, 2205.112, 1545.798),
            std=(786.523, 849.702, 875.318, 1143.578, 1126.248, 1161.980, 1273.505, 1246.790,
             1342.755, 576.795, 45.626, 1340.347, 1145.036),
            nodata=0.0,
            has_offset=True,
        ),
        Product(
            name="S2L2A",
            bands=L2A_BANDS,
            value_unit="dn",
            mean=(793.243, 924.863, 1184.553, 1340.936, 1671.402, 2240.082, 2468.412, 2563.244,
             2627.704, 2711.071, 2416.714, 1849.625),
            std=(1160.144, 1201.092, 1219.943, 1397.225, 1400.035, 1373.136, 1429.170, 1485.025,
             1447.836, 1652.703, 1471.002, 1365.307),
            nodata=0.0,
            has_offset=True,
        ),
        Product(
            name="S2RGB", bands=("B04", "B03", "B02"), value_unit="rgb8",
            mean=(100.708, 87.489, 61.932), std=(68.550, 47.647, 40.592),
            zero_is_data=True,  # black is a colour
        ),
    )
}  # fmt: skip

# The map of land cover (Esri, Impact Observatory), delivered as `mask` or as a modality.
LAND_COVER = Product(name="LULC", bands=("LULC",), value_unit="class", mean=(0.0,), std=(1.0,))
# Products beside images: release B holds them, TerraMesh too.
LAYERS: dict[str, Product] = {
    p.name: p
    for p in (
        Product(name="DEM", bands=("DEM",), value_unit="m", mean=(435.726,), std=(560.326,),
                zero_is_data=True),
        Product(name="NDVI", bands=("NDVI",), value_unit="index", mean=(0.327,), std=(0.322,),
                zero_is_data=True),
        LAND_COVER,
    )
}  # fmt: skip
# TerraMesh has the products above, and radar corrected for terrain. Its published statistics of
# Sentinel-2 are of a mixture of tiles with and without the +1000. Those here are of offset-free
# values, as far as that can be told: 48.4 % of the tiles carry it (mean of B10 506 instead of 22),
# so the means are 484 lower, and the spread of the offset, 500, is taken out of the deviations.
_CARRY = 0.484
_L1C = (
    (2357.090, 2137.398, 2018.799, 2082.998, 2295.663, 2854.548, 3122.860, 3040.571, 3306.491,
     1473.849, 506.072, 2472.840, 1838.943),
    (1673.639, 1722.641, 1602.205, 1873.138, 1866.055, 1779.839, 1776.496, 1724.114, 1771.041,
     1079.786, 512.404, 1340.879, 1172.435),
)  # fmt: skip
_L2A = (
    (1390.461, 1503.332, 1718.211, 1853.926, 2199.116, 2779.989, 2987.025, 3083.248, 3132.235,
     3162.989, 2424.902, 1857.665),
    (2131.157, 2163.666, 2059.311, 2152.477, 2105.179, 1912.773, 1842.326, 1893.568, 1775.656,
     1814.907, 1436.282, 1336.155),
)  # fmt: skip


def _without_offset(name: str, published: tuple[tuple[float, ...], tuple[float, ...]]) -> Product:
    mean, std = published
    spread = 1000**2 * _CARRY * (1 - _CARRY)
    return replace(
        PRODUCTS[name],
        mean=tuple(round(value - 1000 * _CARRY, 3) for value in mean),
        std=tuple(round((value**2 - spread) ** 0.5, 3) for value in std),
    )


TERRAMESH: dict[str, Product] = {
    p.name: p
    for p in (
        PRODUCTS["S1GRD"],
        replace(PRODUCTS["S1GRD"], name="S1RTC", mean=(-10.930, -17.329), std=(4.391, 4.459)),
        _without_offset("S2L1C", _L1C),
        _without_offset("S2L2A", _L2A),
        replace(PRODUCTS["S2RGB"], mean=(110.349, 99.507, 75.843), std=(69.905, 53.708, 53.378)),
        replace(LAYERS["DEM"], mean=(651.663,), std=(928.168,)),
        LAYERS["NDVI"],
        LAND_COVER,
    )
}
# Class of each stored number from 1 on; 0 is no data, and `clouds` means that nothing is known.
LAND_COVER_CLASSES = (
    "water", "trees", "flooded vegetation", "crops", "built", "bare ground", "snow and ice",
    "clouds", "rangeland",
)  # fmt: skip


def product(name: str) -> Product:
    """Look up a product by its name.

    Raises:
        DataError: There is no such product.
    """
    known = {**TERRAMESH, **LAYERS, **PRODUCTS}
    if name not in known:
        raise DataError(
            f"SSL4EO-S12: unknown product {name!r}, expected one of {', '.join(known)}."
            + nearest(name, known)
        )
    return known[name]


def check_bands(found: Sequence[str], expected: Product, where: str) -> None:
    """Refuse band names that are not those of the product, in its order.

    Raises:
        DataError: Names the file and both lists.
    """
    names = tuple(canonical_band(name) for name in found)
    if len(expected.bands) == len(names) == 1:
        return  # a map has one band, however it is called
    if expected.name == "S2RGB" and names in (("R", "G", "B"), ("RED", "GREEN", "BLUE")):
        return
    if names != expected.bands:
        kind = "order" if sorted(names) == sorted(expected.bands) else "set"
        raise DataError(
            f"{where}: wrong {kind} of bands for {expected.name}: found {len(names)} "
            f"({' '.join(names)}), expected {len(expected.bands)} ({' '.join(expected.bands)}). "
            f"Check that this folder really holds {expected.name}."
        )
