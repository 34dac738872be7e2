"""TerraMesh: radar, optics, heights, land cover and vegetation of nine million locations.

    data = TerraMeshDataModule(root="sample", global_batch_size=32)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))     # s1 (32, 2, 224, 224), s2 (32, 12, 224, 224)

`io/ssl4eo/terramesh.py` finds shards; everything else is shared with `ssl4eo.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from domainssl.datamodules.ssl4eo import LocationLabels, ProductBands, SSL4EOS12DataModule
from domainssl.errors import ConfigError
from domainssl.io.ssl4eo.facts import LAND_COVER, TERRAMESH, Product
from domainssl.io.ssl4eo.land_cover import KEY
from domainssl.io.ssl4eo.layout import Catalogue, Group
from domainssl.io.ssl4eo.terramesh import scan_terramesh
from domainssl.loading.source import Loading
from domainssl.sources.windows import Window

__all__ = ["TerraMeshDataModule"]


class TerraMeshDataModule(SSL4EOS12DataModule):
    """Windows of TerraMesh: any of its products, read out of the shards without unpacking them.

    One item is one location at one date. A location that lacks a product has that modality as
    not `present`.

    Args:
        root: `sample` (made on first use in the cache), `sample:relief` (colours and heights whose
            class is to which side land rises), a folder, or an fsspec URL, that holds
            `train/<product>/` and `val/<product>/` with the shards.
        modalities: Product of each modality key: S1GRD, S1RTC, S2L1C, S2L2A, S2RGB, DEM, NDVI or
            LULC. A mapping with `product` and `bands` takes some of its bands.
        global_batch_size: Locations per optimiser step, over all devices and accumulation.
        window: Training windows; without size, 224 pixels. Held-out items are the central pixels.
        labels: `auto` (the table beside the data, if any), the path of a table, None, or a mapping
            with `table` and `mask`: whether batches carry land cover per pixel.
        dn_offset: What stored Sentinel-2 values carry: 0, 1000, or `auto`, location by location.
        on_bad_sample: `raise`, or `replace` by the next good location.
        statistics: `published`, a YAML or JSON file, or `card` (those of the model's weights).
        seed: Seed of order and windows.
        loading: Worker processes and memory.
        storage_options: As for `SSL4EOS12DataModule`.

    Raises:
        ConfigError: An argument cannot be used.
    """

    known: ClassVar[Mapping[str, Product]] = TERRAMESH
    format: ClassVar[str] = "TerraMesh"
    samples: ClassVar[tuple[str, ...]] = ("relief",)
    pieces: ClassVar[str] = "runs"
    default: ClassVar[Mapping[str, str]] = {"s1": "S1RTC", "s2": "S2L2A"}
    default_window: ClassVar[Window] = Window(size=224)

    def __init__(
        self,
        root: str = "sample",
        modalities: dict[str, str | ProductBands] | None = None,
        global_batch_size: int = 128,
        window: Window | None = None,
        labels: LocationLabels | str | None = "auto",
        dn_offset: Literal[0, 1000, "auto"] = "auto",
        on_bad_sample: Literal["raise", "replace"] = "raise",
        statistics: str = "published",
        seed: int = 0,
        loading: Loading | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            root=root,
            modalities=modalities,
            global_batch_size=global_batch_size,
            window=window,
            labels=labels,
            dn_offset=dn_offset,
            on_bad_sample=on_bad_sample,
            statistics=statistics,
            seed=seed,
            loading=loading,
            storage_options=storage_options,
        )
        if KEY in self.products:
            raise ConfigError(
                f"data.init_args.modalities.{KEY}: this name is taken by the land cover per pixel; "
                "call the modality lulc, or set data.init_args.labels.mask: true."
            )

    def _sample_root(self, name: str = "") -> str:
        if name == "relief":
            from domainssl.datamodules.samples.relief import sample_root as relief_root

            return str(relief_root())
        from domainssl.datamodules.samples.terramesh import sample_root

        return str(sample_root())

    def _scan(self, root: str, split: str) -> Catalogue:
        beside = {KEY: LAND_COVER.name} if self.labels.mask else {}
        return scan_terramesh(root, split, self.products, self.storage_options, beside)

    def _land_cover(self, catalogue: Catalogue) -> dict[str, Group]:
        """The groups themselves: the scan has found the maps beside the products."""
        return {
            group.key: replace(group, products={KEY: LAND_COVER.name}) for group in catalogue.groups
        }

    def _title(self, catalogue: Catalogue) -> str:
        return self.format
