"""What is published about SSL4EO-S12 v1.1: products, bands, units, statistics, mask classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    "NO_DATA_CLASS",
    "OBSCURED_CLASSES",
    "PRODUCTS",
    "Product",
    "check_bands",
    "product",
]

CLOUD_CLASSES = (
    "land", "water", "snow", "thin cloud", "thick cloud", "cloud shadow", "no data",
)  # fmt: skip
OBSCURED_CLASSES = (3, 4, 5)
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

    @property
    def valid_range(self) -> tuple[float, float]:
        """Lowest and highest plausible value."""
        return VALID_RANGES[self.value_unit]

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
        ),
    )
}  # fmt: skip

# The map of land cover (Esri, Impact Observatory) is no modality: it is delivered as `mask`.
LAND_COVER = Product(name="LULC", bands=("LULC",), value_unit="class", mean=(0.0,), std=(1.0,))
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
    if name == LAND_COVER.name:
        return LAND_COVER
    if name not in PRODUCTS:
        raise DataError(
            f"SSL4EO-S12: unknown product {name!r}, expected one of {', '.join(PRODUCTS)}."
            + nearest(name, PRODUCTS)
        )
    return PRODUCTS[name]


def check_bands(found: Sequence[str], expected: Product, where: str) -> None:
    """Refuse band names that are not those of the product, in its order.

    Raises:
        DataError: Names the file and both lists.
    """
    names = tuple(canonical_band(name) for name in found)
    if expected.name == "S2RGB" and names in (("R", "G", "B"), ("RED", "GREEN", "BLUE")):
        return
    if names != expected.bands:
        kind = "order" if sorted(names) == sorted(expected.bands) else "set"
        raise DataError(
            f"{where}: wrong {kind} of bands for {expected.name}: found {len(names)} "
            f"({' '.join(names)}), expected {len(expected.bands)} ({' '.join(expected.bands)}). "
            f"Check that this folder really holds {expected.name}."
        )
