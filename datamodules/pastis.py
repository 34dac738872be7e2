"""PASTIS, PASTIS-R and PASTIS-HD: crops in France, seen by Sentinel-1, Sentinel-2 and SPOT.

    data = PastisDataModule(root="sample", global_batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))     # s2 (8, T, 10, 16, 16), mask (8, 16, 16)

`readers/pastis.py` maps files, `series.py` cuts windows and chooses dates, `stream.py` makes
batches of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from domainssl.datamodules.base import DomainDataModule
from domainssl.datamodules.series import Footprint, SeriesDates, TileSource
from domainssl.datamodules.statistics import statistics_of
from domainssl.datamodules.stream import Loading, Source
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.modality import Batch, Modality
from domainssl.readers.pastis import (
    CLASSES,
    SERIES,
    VOID,
    PastisCatalogue,
    read_pastis,
    scan_pastis,
)
from domainssl.readers.series import Tile

__all__ = ["PastisDataModule"]

_log = logging.getLogger(__name__)

_SENTINEL_M, _SPOT_M = 10.0, 1.0
_TILE_BYTES = {"s2": 16_000_000, "s1_asc": 9_000_000, "s1_des": 9_000_000, "spot": 5_000_000}
_S2_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
_S2_NM = (492.7, 559.8, 664.6, 704.1, 740.5, 782.8, 832.8, 864.7, 1613.7, 2202.4)
# Series: published beside the data, those of fold 1. SPOT has none: the middle of its range.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "s2": (
        (1165.940, 1375.653, 1429.219, 1764.799, 2719.273, 3063.612, 3205.902, 3319.110,
         2422.905, 1639.370),
        (1942.616, 1881.923, 1959.380, 1867.224, 1754.585, 1769.405, 1784.861, 1767.710,
         1458.964, 1299.283),
    ),
    "s1_asc": ((-10.931, -17.349), (3.286, 3.213)),
    "s1_des": ((-11.106, -17.502), (3.376, 3.171)),
    "spot": ((127.5, 127.5, 127.5), (64.0, 64.0, 64.0)),
}  # fmt: skip
_MODALITIES = (*SERIES, "spot")


@dataclass(frozen=True)
class _Tiles:
    """The patches of some folds, as the source reads them."""

    catalogue: PastisCatalogue
    modalities: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.catalogue.patches)

    def read(self, number: int) -> Tile:
        return read_pastis(self.catalogue, self.catalogue.patches[number], self.modalities)

    def labels(self, number: int, classes: np.ndarray[Any, Any] | None) -> Batch:
        """Return the class per pixel, the largest crop, and all crops that occur."""
        if classes is None:
            return {}
        mask = classes.astype(np.int64)
        mask[(mask < 0) | (mask >= VOID)] = -1
        counts = np.bincount(mask[mask >= 0], minlength=len(CLASSES))
        if counts[1:].any():
            label = 1 + int(counts[1:].argmax())
        else:
            label = 0 if counts[0] else -1
        return {
            "mask": torch.from_numpy(mask),
            "label": label,
            "label_multi": torch.from_numpy(counts[1:] > 0),
        }


class PastisDataModule(DomainDataModule):
    """Sentinel series, optional SPOT images and crop types of PASTIS.

    An item is a window of a patch. Batches carry `mask` (class per pixel, -1 where void), `label`
    (the crop that covers most of the window; 0, background, where there is none) and
    `label_multi` (which of the 18 crops occur).

    Args:
        root: `sample` (made on first use in the cache), or the folder with `metadata.geojson`.
        modalities: Which of `s2`, `s1_asc`, `s1_des`, `spot` are read.
        global_batch_size: Windows per optimiser step, over all devices and accumulation.
        footprint: Window in metres, flips and turns, the same for all modalities.
        windows_per_patch: Windows per patch and epoch; held-out ones lie on a regular grid.
        dates: Choice of dates of the series. There are no cloud masks.
        train_folds: Folds to train on, 1 to 5.
        val_folds: Folds held out for validation.
        test_folds: Folds to predict.
        on_bad_sample: `raise`, or `replace` by the next good window.
        statistics: `published`, a YAML or JSON file, or `card` (those of the model's weights).
        seed: Seed of order, windows and dates.
        loading: Worker processes and memory.

    Raises:
        ConfigError: An argument cannot be used.
    """

    def __init__(
        self,
        root: str = "sample",
        modalities: Sequence[str] = tuple(SERIES),
        global_batch_size: int = 8,
        footprint: Footprint | None = None,
        windows_per_patch: int = 1,
        dates: SeriesDates | None = None,
        train_folds: Sequence[int] = (1, 2, 3),
        val_folds: Sequence[int] = (4,),
        test_folds: Sequence[int] = (5,),
        on_bad_sample: Literal["raise", "replace"] = "raise",
        statistics: str = "published",
        seed: int = 0,
        loading: Loading | None = None,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            seed=seed,
            on_bad_sample=on_bad_sample,
            loading=loading,
        )
        _check_names(modalities)
        self.folds = {
            "train": tuple(train_folds),
            "val": tuple(val_folds),
            "test": tuple(test_folds),
        }
        _check_folds(self.folds)
        if windows_per_patch < 1:
            raise ConfigError(
                f"data.init_args.windows_per_patch: got {windows_per_patch!r}, expected at least 1."
            )
        self.root = root
        self.footprint = footprint or Footprint(size_m=160.0)
        if self.footprint.size_m is None:
            raise ConfigError(
                "data.init_args.footprint.size_m: null, expected the side of a window in metres, "
                "such as 160, or 1280 for whole patches."
            )
        self.windows_per_patch = windows_per_patch
        self.dates = dates or SeriesDates()
        self.dates.check([name for name in modalities if name in SERIES])
        self.statistics = statistics
        self.catalogues: dict[str, PastisCatalogue] = {}
        self._side_m = self.footprint.side_m(self.footprint.size_m, _SENTINEL_M)
        self._modalities = {name: self._modality(name) for name in modalities}
        self.label_names = CLASSES

    @property
    def modalities(self) -> dict[str, Modality]:
        """The modalities asked for; statistics as asked for."""
        return self._modalities

    @property
    def context_size(self) -> int:
        """Side in pixels of the finest modality; each modality's own is in its `size`."""
        return max(modality.size[0] for modality in self._modalities.values())

    def _modality(self, name: str) -> Modality:
        mean, std = _STATISTICS[name]
        gsd = _SPOT_M if name == "spot" else _SENTINEL_M
        side = round(self._side_m / gsd)
        if name == "spot":
            channels: tuple[str, ...] = ("R", "G", "B")
            unit, limits = "rgb8", (0.0, 255.0)
        elif name == "s2":
            channels, unit, limits = _S2_BANDS, "dn", (-1000.0, 32767.0)
        else:
            channels, unit, limits = ("VV", "VH"), "db", (-60.0, 40.0)
        plain = Modality(
            name=name,
            kind="image" if name == "spot" else "series",
            channels=channels,
            value_unit=unit,
            size=(side, side),
            gsd_m=gsd,
            mean=mean,
            std=std,
            valid_range=limits,
            nodata=None,  # batches mark it in `valid`
            wavelengths_nm=_S2_NM if name == "s2" else None,
        )
        return statistics_of(plain, self.statistics)

    def prepare_data(self) -> None:
        """Write the embedded sample, once per machine."""
        self._root()

    def _root(self) -> str:
        if self.root != "sample":
            return self.root
        from domainssl.datamodules.samples.pastis import sample_root

        return str(sample_root())

    def open_sources(self) -> dict[str, Source]:
        """Read the table; predictions are made for the test folds, else for held-out ones."""
        root = self._root()
        for split, folds in self.folds.items():
            found = scan_pastis(root, folds, self._modalities)
            if found is not None:
                self.catalogues[split] = found
                for problem in found.problems:
                    _log.warning("%s: %s", split, problem)
        if not self.catalogues:
            raise DataError(f"{root}: metadata.geojson lists no patch of the folds {self.folds}.")
        sources: dict[str, Source] = {
            split: self._source(found, is_training=split == "train")
            for split, found in self.catalogues.items()
            if split != "test"
        }
        last = list(self.catalogues.values())[-1]
        sources["predict"] = self._source(last, is_training=False)
        return sources

    def _source(self, catalogue: PastisCatalogue, *, is_training: bool) -> TileSource:
        tile_m = catalogue.side * _SENTINEL_M
        return TileSource(
            _Tiles(catalogue, tuple(self._modalities)),
            self._modalities,
            {},
            self.footprint,
            tile_m,
            _SENTINEL_M,
            self.dates,
            self.seed,
            is_training,
            self.windows_per_patch,
            tile_bytes=sum(_TILE_BYTES[name] for name in self._modalities)
            * catalogue.side**2
            // 128**2,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(CLASSES)

    def identity(self) -> dict[str, Any]:
        """Return hash of the table, folds and number of patches."""
        return {
            "format": "PASTIS",
            "root": self.root,
            "splits": {split: found.identity() for split, found in self.catalogues.items()},
        }

    def describe(self) -> list[str]:
        """Return lines that tell what was found."""
        lines = []
        for split, found in self.catalogues.items():
            lines.append(
                f"PASTIS, {split}: {len(found.patches)} patches of {found.side} x {found.side} px "
                f"in fold(s) {', '.join(map(str, found.folds))}, at {found.root}"
            )
            lines += [f"problem: {text}" for text in found.problems]
        for name, modality in self._modalities.items():
            most = self.dates.most_of(name)
            dates = f", {f'at most {most}' if most else 'all'} dates" if name in SERIES else ""
            lines.append(
                f"{name}: {modality.value_unit}, {modality.num_channels} bands "
                f"{' '.join(modality.channels)}, {modality.size[0]} px of {modality.gsd_m:g} m"
                f"{dates}"
            )
        lines.append(f"labels: {', '.join(CLASSES)}")
        return lines + super().describe()


def _check_names(modalities: Sequence[str]) -> None:
    for name in modalities:
        if name not in _MODALITIES:
            raise ConfigError(
                f"data.init_args.modalities: unknown modality {name!r}, expected some of "
                f"{', '.join(_MODALITIES)}.{nearest(name, _MODALITIES)}"
            )
    if not modalities or len(set(modalities)) < len(modalities):
        raise ConfigError(
            f"data.init_args.modalities: got {list(modalities)}, expected one or more different "
            f"ones of {', '.join(_MODALITIES)}."
        )


def _check_folds(folds: dict[str, tuple[int, ...]]) -> None:
    every = [fold for some in folds.values() for fold in some]
    if len(set(every)) < len(every) or not set(every) <= set(range(1, 6)):
        raise ConfigError(
            f"data.init_args: train_folds, val_folds and test_folds are {list(folds.values())}; "
            "expected folds from 1 to 5, each in one of them, as neighbouring patches share a fold."
        )
