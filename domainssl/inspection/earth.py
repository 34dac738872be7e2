"""Earth-observation data sets that are opened by their folder alone, for `inspect` and `stats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from domainssl.io.raster.safe import is_safe, safe_bands
from domainssl.io.ssl4eo.first import sensors_at
from domainssl.io.ssl4eo.terramesh import products_at, scan_terramesh
from domainssl.io.storage.paths import join
from domainssl.sensors import L1C_BANDS
from domainssl.sources.cube_options import Layer, Mask
from domainssl.sources.windows import Window

if TYPE_CHECKING:
    from domainssl.datamodules.cubes import SentinelCubeDataModule
    from domainssl.datamodules.dataset import DatasetDataModule
    from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule
    from domainssl.datamodules.terramesh import TerraMeshDataModule

__all__ = [
    "benchmark_at", "open_benchmark", "open_first", "open_safe", "open_terramesh", "safe_products",
]  # fmt: skip

# module, class and what lies in the folder
_BENCHMARKS = (
    ("bigearthnet", "BigEarthNetV2", ("metadata.parquet", "BigEarthNet-S2", "BigEarthNet-S1")),
    ("dfc2020", "DFC2020", ("ROIs0000_test", "ROIs0000_validation")),
    ("flair_hub", "FlairHub", ("FLAIR-HUB_TRAIN.csv", "FLAIR-HUB_VALID.csv", "*_AERIAL_RGBI")),
    ("eurosat_sar", "EuroSATSAR", ("AnnualCrop", "HerbaceousVegetation", "SeaLake")),
)
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
        modalities={**names},
        global_batch_size=1,
        window=Window(size=min(side, 224)),
        storage_options=dict(options),
    )


def open_first(root: str) -> SSL4EOS12DataModule:
    """Return the sensors of SSL4EO-S12 v1.0 at a local folder."""
    from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule

    return SSL4EOS12DataModule(
        root=root, modalities={**sensors_at(root)}, global_batch_size=1, window=Window(size=224)
    )


def benchmark_at(names: Sequence[str] | None) -> str | None:
    """Return the class of the benchmark set whose files a folder holds, None for no such set."""
    there = set(names or ())
    for module, title, marks in _BENCHMARKS:
        if all(any(fnmatch(name, mark) for name in there) for mark in marks):
            return f"domainssl.datamodules.{module}.{title}"
    return None


def open_benchmark(root: str, names: Sequence[str] | None) -> DatasetDataModule:
    """Return the benchmark set in a folder, with the splits that it has."""
    from domainssl.datamodules.dataset import DatasetClass, DatasetDataModule

    name = benchmark_at(names)
    assert name is not None
    return DatasetDataModule(root=root, dataset=DatasetClass(name), global_batch_size=1)


def safe_products(path: str, names: Sequence[str] | None) -> list[str]:
    """Return the Sentinel-2 products at a path: itself, or those in a folder of `names`."""
    if is_safe(path):
        return [path]
    return [join(path, name) for name in names or () if is_safe(join(path, name))]


def open_safe(
    root: str, products: Sequence[str], options: Mapping[str, Any]
) -> SentinelCubeDataModule:
    """Return the products as sites, by tile, with the bands of the first one."""
    from domainssl.datamodules.cubes import SentinelCubeDataModule

    bands = tuple(safe_bands(products[0], options)) or L1C_BANDS
    mask = None if "B10" in bands else Mask()
    return SentinelCubeDataModule(
        root=root,
        modalities={"s2": Layer(bands=bands, path=".", mask=mask)},
        global_batch_size=1,
        window=Window(size=1200, unit="m"),
        labels=None,
        storage_options=dict(options),
    )
