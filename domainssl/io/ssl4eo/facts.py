"""What is published about SSL4EO-S12 v1.1: products, bands, units, statistics, mask classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from domainssl.errors import DataError, nearest

__all__ = [
    "CLOUD_CLASSES",
    "L1C_BANDS",
    "L2A_BANDS",
    "NO_DATA_CLASS",
    "OBSCURED_CLASSES",
    "PRODUCTS",
    "Product",
    "canonical_band",
    "check_bands",
    "product",
]

L1C_BANDS = (
    "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12",
)  # fmt: skip
L2A_BANDS = tuple(band for band in L1C_BANDS if band != "B10")
CLOUD_CLASSES = (
    "land", "water", "snow", "thin cloud", "thick cloud", "cloud shadow", "no data",
)  # fmt: skip
OBSCURED_CLASSES = (3, 4, 5)
NO_DATA_CLASS = 6

_CENTRES_NM = {
    "B01": 442.7, "B02": 492.7, "B03": 559.8, "B04": 664.6, "B05": 704.1, "B06": 740.5,
    "B07": 782.8, "B08": 832.8, "B8A": 864.7, "B09": 945.1, "B10": 1373.5, "B11": 1613.7,
    "B12": 2202.4,
}  # fmt: skip
_NAMES = {  # of STAC and its catalogues, without blanks, hyphens and underscores
    "coastal": "B01", "aerosol": "B01", "coastalaerosol": "B01", "blue": "B02", "green": "B03",
    "red": "B04", "rededge": "B05", "rededge1": "B05", "rededge2": "B06", "rededge3": "B07",
    "rededge071": "B05", "rededge075": "B06", "rededge078": "B07", "nir": "B08", "nir08": "B8A",
    "nirnarrow": "B8A", "b08a": "B8A", "nir09": "B09", "watervapor": "B09", "watervapour": "B09",
    "cirrus": "B10", "swir1": "B11", "swir16": "B11", "swir2": "B12", "swir22": "B12",
    "vv": "VV", "vh": "VH",
}  # fmt: skip
_SEPARATORS = re.compile(r"[\s_\-]+")


@dataclass(frozen=True)
class Product:
    """One product of the data set; statistics are of offset-free DN, dB or 8-bit values."""

    name: str
    bands: tuple[str, ...]
    value_unit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    valid_range: tuple[float, float]
    nodata: float | None = None
    has_offset: bool = False

    @property
    def wavelengths_nm(self) -> tuple[float, ...] | None:
        """Centre wavelengths of Sentinel-2A, None for radar."""
        if not set(self.bands) <= set(_CENTRES_NM):
            return None
        return tuple(_CENTRES_NM[band] for band in self.bands)


# Release A publishes the means of its S2 products with the +1000 left in; the values here are
# those of release B, 1000 lower, which is what batches carry.
PRODUCTS: dict[str, Product] = {
    p.name: p
    for p in (
        Product(
            "S1GRD", ("VV", "VH"), "db", (-12.577, -20.265), (5.179, 5.872), (-60.0, 40.0)
        ),
        Product(
            "S2L1C",
            L1C_BANDS,
            "dn",
            (1607.345, 1393.068, 1320.225, 1373.963, 1562.536, 2110.071, 2392.832, 2321.154,
             2583.770, 838.712, 21.753, 2205.112, 1545.798),
            (786.523, 849.702, 875.318, 1143.578, 1126.248, 1161.980, 1273.505, 1246.790,
             1342.755, 576.795, 45.626, 1340.347, 1145.036),
            (-1000.0, 32767.0),
            nodata=0.0,
            has_offset=True,
        ),
        Product(
            "S2L2A",
            L2A_BANDS,
            "dn",
            (793.243, 924.863, 1184.553, 1340.936, 1671.402, 2240.082, 2468.412, 2563.244,
             2627.704, 2711.071, 2416.714, 1849.625),
            (1160.144, 1201.092, 1219.943, 1397.225, 1400.035, 1373.136, 1429.170, 1485.025,
             1447.836, 1652.703, 1471.002, 1365.307),
            (-1000.0, 32767.0),
            nodata=0.0,
            has_offset=True,
        ),
        Product(
            "S2RGB", ("B04", "B03", "B02"), "rgb8",
            (100.708, 87.489, 61.932), (68.550, 47.647, 40.592), (0.0, 255.0),
        ),
    )
}  # fmt: skip


def product(name: str) -> Product:
    """Look up a product by its name.

    Raises:
        DataError: There is no such product.
    """
    if name not in PRODUCTS:
        raise DataError(
            f"SSL4EO-S12: unknown product {name!r}, expected one of {', '.join(PRODUCTS)}."
            + nearest(name, PRODUCTS)
        )
    return PRODUCTS[name]


def canonical_band(name: str) -> str:
    """Return the canonical spelling of a band: `b2`, `B02`, `blue` -> `B02`; `vv` -> `VV`."""
    text = str(name).strip()
    plain = _SEPARATORS.sub("", text.lower())
    if plain in _NAMES:
        return _NAMES[plain]
    text = text.upper()
    if text.startswith("B") and text[1:].isdigit():
        return f"B{int(text[1:]):02d}"
    return text


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
