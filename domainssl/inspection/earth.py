"""Earth-observation data sets that are opened by their folder alone, for `inspect` and `stats`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from domainssl.io.ssl4eo.terramesh import products_at, scan_terramesh
from domainssl.sources.windows import Window

if TYPE_CHECKING:
    from domainssl.datamodules.terramesh import TerraMeshDataModule

__all__ = ["open_terramesh"]

_KEYS = {"S1RTC": "s1", "S1GRD": "s1_grd", "S2L2A": "s2", "S2L1C": "s2_l1c", "S2RGB": "rgb"}


def open_terramesh(root: str, options: Mapping[str, Any]) -> TerraMeshDataModule:
    """Return all products of a folder of TerraMesh, in windows that fit into its tiles."""
    from domainssl.datamodules.terramesh import TerraMeshDataModule

    products = products_at(root, options)
    names = {_KEYS.get(p, p.lower()): p for found in products.values() for p in found}
    split, found = next(iter(products.items()))
    side = min(scan_terramesh(root, split, {p: p for p in found}, options).size)
    return TerraMeshDataModule(
        root=root,
        modalities=names,
        global_batch_size=1,
        window=Window(size=min(side, 224)),
        storage_options=dict(options),
    )
