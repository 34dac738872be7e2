"""SSL4EO-S12: Sentinel-1 and Sentinel-2 at four dates, v1.1 (releases A and B) and v1.0.

    data = SSL4EOS12DataModule(root="sample", global_batch_size=32)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))     # s1 (32, 2, 120, 120), s2 (32, 12, 120, 120)

`sources/windows.py` cuts windows, `sources/ssl4eo.py` reads files, `loading/stream.py` batches.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from domainssl.datamodules.base import DomainDataModule, named_sample
from domainssl.datamodules.statistics import statistics_of
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.ssl4eo.facts import LAND_COVER, LAYERS, PRODUCTS, Product
from domainssl.io.ssl4eo.first import FOLDERS, PACKED, Packed, scan_first
from domainssl.io.ssl4eo.labels import Labels, labels, unmatched
from domainssl.io.ssl4eo.land_cover import LAND_COVER_NAMES
from domainssl.io.ssl4eo.layout import Catalogue, Group, scan
from domainssl.io.ssl4eo.leaks import leaks
from domainssl.io.ssl4eo.read import read
from domainssl.io.storage.paths import is_folder, is_url, join, list_folder
from domainssl.io.subjects import split_of
from domainssl.loading.source import Loading, Source
from domainssl.modality import Modality
from domainssl.options import as_dataclass
from domainssl.sources.dates import Dates
from domainssl.sources.ssl4eo import SSL4EOSource
from domainssl.sources.windows import Window

__all__ = ["LocationLabels", "ProductBands", "SSL4EOS12DataModule"]

_log = logging.getLogger(__name__)
_GSD_M = 10.0


@dataclass(frozen=True)
class LocationLabels:
    """What is known about locations besides their images.

    Attributes:
        table: `auto` (the one beside the data, if any), the path of a table, or None.
        mask: Deliver the land cover of every pixel, from the product LULC beside the images: that
            of the chosen date, of the last one of a series; -1 where it is not known.
    """

    table: str | None = "auto"
    mask: bool = False


@dataclass(frozen=True)
class ProductBands:
    """Some bands of a product.

    Attributes:
        product: As where a modality names its product alone.
        bands: Which of its bands are delivered, in this order; None takes all. Files are decoded
            whole all the same, and pixels without data in another band are not valid either.
    """

    product: str
    bands: tuple[str, ...] | None = None


class SSL4EOS12DataModule(DomainDataModule):
    """Sentinel-1 and Sentinel-2 windows of SSL4EO-S12 v1.1.

    One item is one location; an epoch visits each once. A file (release A) or a run of 64
    locations (release B) is decoded as a whole and once per epoch.

    Args:
        root: `sample` or `sample:objects` (made on first use in the cache), a folder, or an fsspec
            URL, that holds `train/<product>/` and `val/<product>/`.
        modalities: Product of each modality key: S1GRD, S2L1C, S2L2A or S2RGB; of release B also
            DEM, NDVI and LULC. A mapping with `product` and `bands` takes some of its bands.
        global_batch_size: Locations per optimiser step, over all devices and accumulation.
        window: Training windows, 60 to 180 pixels resized to 120 unless `size` is given. Held-out
            items are the central `size` pixels.
        dates: Dates, drawn per file and epoch; `one` by default.
        labels: `auto` (the table beside the data, if any), the path of a table, None, or a mapping
            with `table` and `mask`: whether batches carry land cover per pixel.
        dn_offset: What stored Sentinel-2 values carry: 0, 1000, or `auto`.
        on_bad_sample: `raise`, or `replace` by the next good location.
        statistics: `published`, a YAML or JSON file, or `card` (those of the model's weights).
        seed: Seed of order, windows and dates.
        loading: Worker processes and memory.
        storage_options: fsspec options for a URL. `retry: {attempts: 5, first_wait_s: 0.5}` is
            ours: how often a request that failed is repeated. Keys belong in the environment.
            `lmdb: {order: [s1, s2c], dtype: uint8}` says what the LMDB of v1.0 do not.

    Raises:
        ConfigError: An argument cannot be used.
    """

    known: ClassVar[Mapping[str, Product]] = {**PRODUCTS, **LAYERS}
    format: ClassVar[str] = "SSL4EO-S12 v1.1"
    pieces: ClassVar[str] = "files"
    samples: ClassVar[tuple[str, ...]] = ("objects",)
    default_window: ClassVar[Window] = Window(size=120, min_size=60, max_size=180)
    default: ClassVar[Mapping[str, str]] = {"s1": "S1GRD", "s2": "S2L2A"}

    def __init__(
        self,
        root: str = "sample",
        modalities: dict[str, str | ProductBands] | None = None,
        global_batch_size: int = 128,
        window: Window | None = None,
        dates: Dates | None = None,
        labels: LocationLabels | str | None = "auto",
        dn_offset: Literal[0, 1000, "auto"] = "auto",
        on_bad_sample: Literal["raise", "replace"] = "raise",
        statistics: str = "published",
        seed: int = 0,
        loading: Loading | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            seed=seed,
            on_bad_sample=on_bad_sample,
            loading=loading,
        )
        self.root = root
        self.storage_options = dict(storage_options or {})
        self._packed = Packed.of(self.storage_options)
        chosen = {
            name: ProductBands(value)
            if isinstance(value, str)
            else as_dataclass(ProductBands, value)
            for name, value in (modalities or self.default).items()
        }
        self.products = {name: each.product for name, each in chosen.items()}
        self.bands = {name: self._bands(name, each) for name, each in chosen.items()}
        if dn_offset not in (0, 1000, "auto"):
            raise ConfigError(
                f"data.init_args.dn_offset: got {dn_offset!r}, expected 0, 1000 or 'auto'."
            )
        self.window = (window or Window()).sized(self.default_window).on_grid(_GSD_M)
        self.dates = (dates or Dates()).of(
            ("one", "views", "all", "fixed"), ("max_dates", "positions", "mask_clouds")
        )
        self.dates.check(())
        if labels is None or isinstance(labels, str):
            labels = LocationLabels(labels)
        self.labels = as_dataclass(LocationLabels, labels)
        self.dn_offset = dn_offset
        self.statistics = statistics
        self.catalogues: dict[str, Catalogue] = {}
        self._labels: dict[str, Labels] = {}
        self._odd_labels: list[str] = []
        self._leaks: list[str] = []
        self._modalities: dict[str, Modality] | None = None

    def _bands(self, name: str, chosen: ProductBands) -> tuple[str, ...]:
        """Return the bands of a modality in the order of delivery.

        Raises:
            ConfigError: There is no such product or band, or a band is named twice.
        """
        where = f"data.init_args.modalities.{name}"
        if chosen.product not in self.known:
            raise ConfigError(
                f"{where}: unknown product {chosen.product!r}, expected one of "
                f"{', '.join(self.known)}.{nearest(chosen.product, self.known)}"
            )
        there = self.known[chosen.product].bands
        if chosen.bands is None:
            return there
        if not chosen.bands:
            raise ConfigError(
                f"{where}.bands: got none. Name some of {', '.join(there)}, or leave `bands` out."
            )
        for band in chosen.bands:
            if band not in there:
                raise ConfigError(
                    f"{where}.bands: {chosen.product} has no band {band!r}, expected some of "
                    f"{', '.join(there)}.{nearest(band, there)}"
                )
            if chosen.bands.count(band) > 1:
                raise ConfigError(f"{where}.bands: {band} is named twice.")
        return tuple(chosen.bands)

    @property
    def modalities(self) -> dict[str, Modality]:
        """The products by their keys; statistics as asked for."""
        if self._modalities is None:
            self._modalities = {m: self._modality(m, p) for m, p in self.products.items()}
        return self._modalities

    def _modality(self, name: str, product_name: str) -> Modality:
        facts = self.known[product_name]
        bands = self.bands[name]
        places = [facts.bands.index(band) for band in bands]
        plain = Modality(
            name=name,
            kind="series" if self.dates.is_series else "image",
            channels=bands,
            value_unit=facts.value_unit,
            size=self.window.shape,
            gsd_m=_GSD_M,
            mean=_some(facts.mean, places),
            std=_some(facts.std, places),
            valid_range=facts.valid_range,
            nodata=None,  # batches mark it in `valid`
            wavelengths_nm=_some(facts.wavelengths_nm, places),
        )
        return statistics_of(plain, self.statistics, alias=product_name)

    def prepare_data(self) -> None:
        """Write the embedded sample, once per machine."""
        self._root()

    def _root(self) -> str:
        if self.root == "sample":
            return self._sample_root()
        name = named_sample(self.root, self.samples) if self.samples else None
        return self.root if name is None else self._sample_root(name)

    def _sample_root(self, name: str = "") -> str:
        """Return the folder of an embedded sample, made on first use."""
        from domainssl.datamodules.samples.ssl4eo import sample_root

        return str(sample_root(self.products.values(), name))

    def open_sources(self) -> dict[str, Source]:
        """Scan the splits that are there; predictions are made for the held-out one."""
        root = self._root()
        # A folder that holds the products directly has no held-out part.
        splits = [
            s for s in ("train", "val") if is_folder(join(root, s), self.storage_options)
        ] or ["train"]
        self.catalogues = {split: self._scan(root, split) for split in splits}
        self._leaks = leaks(self.catalogues, root)
        for problem in self._leaks:
            _log.warning("%s", problem)
        if "train" in self.catalogues:
            self._log_clipping(self.catalogues["train"])
        self._labels = self._read_labels()
        if "val" not in self.catalogues:
            there = list_folder(root, self.storage_options)
            like = [name for name in there if split_of(name) == "val"]
            hint = f"; rename {like[0]!r} to it, if that is meant" if like else ""
            _log.warning("%s has no folder 'val': nothing is held out for validation%s", root, hint)
        sources: dict[str, Source] = {
            split: self._source(catalogue, is_training=split == "train")
            for split, catalogue in self.catalogues.items()
        }
        held_out = self.catalogues.get("val", self.catalogues[splits[0]])
        sources["predict"] = self._source(held_out, is_training=False)
        return sources

    def _scan(self, root: str, split: str) -> Catalogue:
        """Return the files of a split."""
        if not is_url(root):
            first = scan_first(root, split, self.products, self._packed)
            if first is not None:
                return first
        return scan(root, split, self.products, self.storage_options)

    def _source(self, catalogue: Catalogue, *, is_training: bool) -> SSL4EOSource:
        found = self._labels.get(catalogue.split)
        if found is not None:
            self.label_names = found.names
        return SSL4EOSource(
            catalogue=catalogue,
            window=self.window,
            dates=self.dates,
            seed=self.seed,
            is_training=is_training,
            labels=found,
            land_cover=self._land_cover(catalogue) if self.labels.mask else None,
            dn_offset=self.dn_offset,
            bands=self.bands,
        )

    def _read_labels(self) -> dict[str, Labels]:
        """Return the labels of the splits that have a table, which must name some location.

        Raises:
            DataError: A table names none.
        """
        if self.labels.table is None:
            return {}
        path = None if self.labels.table == "auto" else self.labels.table
        read = {
            split: labels(catalogue.root, split, self.storage_options, path)
            for split, catalogue in self.catalogues.items()
        }
        found = {split: one for split, one in read.items() if one is not None}
        odd = {split: unmatched(one, self.catalogues[split]) for split, one in found.items()}
        named = {found[split].path for split, text in odd.items() if text is None}
        self._odd_labels = [text for text, _ in filter(None, odd.values())]
        for split, text in odd.items():
            if text is not None and text[1] and found[split].path not in named:
                raise DataError(text[0])
        for problem in self._odd_labels:
            _log.warning("%s", problem)
        return found

    def _land_cover(self, catalogue: Catalogue) -> dict[str, Group]:
        """Return the groups of the product LULC that lie beside those of a split."""
        products = {"mask": LAND_COVER.name}
        found = scan(catalogue.root, catalogue.split, products, self.storage_options)
        return {group.key: group for group in found.groups}

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes: of land cover where batches carry it, else of the labels."""
        return LAND_COVER_NAMES if self.labels.mask else self.label_names

    def _log_clipping(self, catalogue: Catalogue) -> None:
        window, side = self.window, self.window.fitting(catalogue.size)
        if window.most > side:
            _log.info(
                "Scenes have %d x %d px: training windows are %d to %d px instead of %d to %d",
                *catalogue.size, window.least, side, window.least, window.most,
            )  # fmt: skip

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None without labels; known after setup."""
        return len(self.label_names) if self.label_names is not None else None

    def identity(self) -> dict[str, Any]:
        """Return release, names, sizes and header hashes of the files."""
        return {
            "format": self.format,
            "root": self.root,
            "splits": {split: found.identity() for split, found in self.catalogues.items()},
        }

    @property
    def problems(self) -> list[str]:
        """What was left out of the splits, and why."""
        left_out = [text for found in self.catalogues.values() for text in found.problems]
        return left_out + self._leaks + self._odd_labels

    def describe(self) -> list[str]:
        """Return lines that tell what was found."""
        lines = []
        for split, found in self.catalogues.items():
            lines.append(
                f"{self._title(found)}, {split}: {found.count} locations in "
                f"{len(found.groups)} {self.pieces} of {found.size[0]} x {found.size[1]} px, "
                f"{found.dates} {'date' if found.dates == 1 else 'dates'}, at {found.root}"
            )
        lines += [f"problem: {text}" for text in self.problems]
        for name, modality in self.modalities.items():
            lines.append(
                f"{name}: {self.products[name]} ({modality.value_unit}), "
                f"{modality.num_channels} bands {' '.join(modality.channels)}{self._offset(name)}"
            )
        lines.append(
            "labels: none" if self.label_names is None else f"labels: {', '.join(self.label_names)}"
        )
        return lines + super().describe()

    def _title(self, catalogue: Catalogue) -> str:
        if catalogue.release in (FOLDERS, PACKED):
            return f"SSL4EO-S12 v{catalogue.release}"
        return f"{self.format} release {catalogue.release}"

    def _offset(self, name: str) -> str:
        """Tell which offset the first location carries."""
        if not self.known[self.products[name]].has_offset or not self.catalogues:
            return ""
        catalogue = list(self.catalogues.values())[-1]
        try:
            block = read(catalogue.groups[0], name, [0], slice(0, 1), dn_offset=self.dn_offset)
        except DataError as error:
            return f", unreadable ({error})"
        how = "found" if self.dn_offset == "auto" else "as asked"
        return f", stored offset {int(block.offset[0])} ({how}, removed)"


def _some(values: tuple[float, ...] | None, places: Sequence[int]) -> tuple[float, ...] | None:
    """Return what a product states of some of its bands."""
    return None if values is None else tuple(values[place] for place in places)
