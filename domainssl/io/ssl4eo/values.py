"""Stored values of SSL4EO-S12 v1.1: which pixels are measurements, and which offset they carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from domainssl.errors import DataError
from domainssl.io.ssl4eo.facts import NO_DATA_CLASS, OBSCURED_CLASSES, Product
from domainssl.missing import beyond, tell
from domainssl.sensors import DARK_DN, DARK_FRACTION

__all__ = ["DNOffset", "Validity", "find_offset", "remove_offset"]

DNOffset = Literal[0, 1000, "auto"]
Array = np.ndarray[Any, Any]

_OFFSET = 1000
_MAY_CARRY = ("A", "TerraMesh")  # releases whose S2L2A has the offset unless tiles are too dark
_CIRRUS_LIMIT = 800  # cirrus is 0..100 DN without the offset


@dataclass(frozen=True)
class Validity:
    """What makes a pixel of a product a measurement; the same rule for any part of a tile.

    Attributes:
        product: The product.
        mask_clouds: Thin and thick cloud and cloud shadow are not valid.
        file: Where the values come from, for what is said about numbers such as -9999.
    """

    product: Product
    mask_clouds: bool = False
    file: str = ""

    def settle(self, values: Array, cloud: Array | None) -> tuple[Array, int]:
        """Tell where measurements are, and put 0 in place of what is none.

        None are numbers that are not finite, and those that the unit cannot hold (-9999 dB).

        Args:
            values: Stored values, (T, C, h, w); changed in place.
            cloud: Cloud classes, (T, h, w), if there are any.

        Returns:
            The mask (T, h, w), True where the pixel is a measurement, and how many values were
            not finite.
        """
        valid = self._nonzero(values)
        count = 0
        bad = beyond(values, self.product.value_unit)
        if bad is not None:
            if values.dtype.kind == "f":
                count = int((~np.isfinite(values)).sum())
            tell(f"{self.product.name}{f', {self.file}' if self.file else ''}", values[bad])
            values[bad] = 0
            valid &= ~bad.any(axis=1)
        if cloud is not None:
            valid &= cloud != NO_DATA_CLASS
            if self.mask_clouds:
                valid &= ~np.isin(cloud, OBSCURED_CLASSES)
        return valid, count

    def _nonzero(self, values: Array) -> Array:
        """Return where not every band is 0: no data in S2, and what absent chunks are."""
        if not self.product.zero_is_data:
            is_used = values[:, 0] != 0
            return is_used if is_used.all() else is_used | values.any(axis=1)
        return np.ones((len(values), *values.shape[2:]), bool)


def find_offset(
    values: Array, cloud: Array | None, validity: Validity, release: str, dn_offset: DNOffset
) -> Array:
    """Return the offset of each location.

    Args:
        values: Stored values, signed, (n, T, C, Y, X).
        cloud: Cloud classes, (n, T, Y, X), if there are any.
        validity: Which pixels count.
        release: `A`, `B` or `TerraMesh`.
        dn_offset: What the values carry, or `auto`.

    Returns:
        int16 (n,).

    Raises:
        DataError: `dn_offset` is not one of its values.
    """
    if dn_offset not in (0, _OFFSET, "auto"):
        raise DataError(f"dn_offset: {dn_offset!r} is not one of 0, 1000, 'auto'")
    if dn_offset != "auto":
        return np.full(len(values), dn_offset, np.int16)
    clouds = [None] * len(values) if cloud is None else cloud
    found = [_verdict(*pair, validity, release) for pair in zip(values, clouds, strict=True)]
    return np.array(found, np.int16)


def remove_offset(values: Array, offset: Array) -> None:
    """Subtract the offset (n,) in place from all values (n, T, C, Y, X) but stored zeros."""
    for item, amount in zip(values, offset, strict=True):
        if amount:
            np.subtract(item, amount, out=item)
            item[item == -amount] = 0  # stored 0 is no data and stays 0


def _verdict(item: Array, cloud: Array | None, validity: Validity, release: str) -> int:
    """Return the offset of one location, (T, C, Y, X) and (T, Y, X), by every 4th pixel."""
    product = validity.product

    def mask() -> Array:
        classes = None if cloud is None else cloud[:, ::4, ::4]
        return validity.settle(item[:, :, ::4, ::4], classes)[0]

    if product.name == "S2L1C":
        cirrus = item[:, product.bands.index("B10"), ::4, ::4][mask()]
        if cirrus.size:
            high = np.count_nonzero(cirrus > _CIRRUS_LIMIT)  # the median, without sorting
            return _OFFSET if 2 * high > cirrus.size else 0
    elif release in _MAY_CARRY:
        # Whole rows first: four times the pixels, but side by side in memory.
        is_dark = item[:, :, ::4].min(axis=1)[..., ::4] < DARK_DN
        if is_dark.any():
            valid = mask()
            if np.count_nonzero(is_dark & valid) > DARK_FRACTION * np.count_nonzero(valid):
                return 0
    return _OFFSET if release in _MAY_CARRY else 0
