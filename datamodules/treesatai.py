"""TreeSatAI Time Series: aerial images with a year of Sentinel-1 and Sentinel-2 on 60 m of forest.

    data = TreeSatAIDataModule(root="sample", global_batch_size=16)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))     # aerial (16, 4, 300, 300), s2 (16, T, 10, 6, 6)

`io/series/treesatai.py` reads files, `sources/tiles.py` cuts windows, `loading/stream.py` makes
batches of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from domainssl.datamodules.footprints import (
    ImageSensor,
    _FootprintDataModule,
    check_windows,
)
from domainssl.errors import DataError
from domainssl.io.series.tile import Tile
from domainssl.io.series.treesatai import (
    GENERA,
    SERIES,
    TreeSatCatalogue,
    read_treesat,
    scan_treesat,
)
from domainssl.loading.source import Loading, Source
from domainssl.modality import Batch
from domainssl.sensors import S2_M
from domainssl.sources.dates import Dates
from domainssl.sources.tiles import TileSource
from domainssl.sources.windows import Window

__all__ = ["TreeSatAIDataModule"]

_log = logging.getLogger(__name__)

_TILE_M = 60.0
_MARGIN = {"aerial": 2}  # 304 px are 60.8 m; Sentinel covers 60 m in the middle
_TILE_BYTES = {"aerial": 370_000, "s2": 240_000, "s1_asc": 35_000, "s1_des": 70_000}
# Aerial: published with OmniSat. The series have no published statistics: those of SSL4EO-S12,
# which, like these, are of all dates, clouds included.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "aerial": ((151.27, 93.12, 85.05, 81.05), (48.71, 33.60, 28.00, 33.68)),
    "s2": (
        (924.863, 1184.553, 1340.936, 1671.402, 2240.082, 2468.412, 2563.244, 2627.704,
         2416.714, 1849.625),
        (1201.092, 1219.943, 1397.225, 1400.035, 1373.136, 1429.170, 1485.025, 1447.836,
         1471.002, 1365.307),
    ),
    "s1_asc": ((-12.577, -20.265), (5.179, 5.872)),
    "s1_des": ((-12.577, -20.265), (5.179, 5.872)),
}  # fmt: skip
_MODALITIES = ("aerial", *SERIES)


@dataclass(frozen=True)
class _Tiles:
    """The tiles of a split, as the source reads them."""

    catalogue: TreeSatCatalogue
    modalities: tuple[str, ...]
    threshold: float

    def __len__(self) -> int:
        return len(self.catalogue.tiles)

    def read(self, number: int) -> Tile:
        return read_treesat(self.catalogue, self.catalogue.tiles[number], self.modalities)

    def labels(self, number: int, classes: np.ndarray[Any, Any] | None) -> Batch:
        """Return the genus with the largest share, -1 if unknown, and all above the threshold."""
        shares = np.zeros(len(self.catalogue.names), np.float32)
        given = self.catalogue.tiles[number].shares
        shares[: len(given)] = given
        return {
            "label": int(shares.argmax()) if shares.any() else -1,
            "label_multi": torch.from_numpy(shares > self.threshold),
        }


class TreeSatAIDataModule(_FootprintDataModule):
    """Aerial images and Sentinel series of the TreeSatAI Time Series data set.

    One item is one tile of 60 m, or a window of it; an epoch visits each tile once.

    Args:
        root: `sample` (made on first use in the cache), or a folder with `aerial/`,
            `sentinel-ts/` and tables of the splits.
        modalities: What each key reads: `aerial`, `s2`, `s1_asc` or `s1_des`; all by default.
        global_batch_size: Tiles per optimiser step, over all devices and accumulation.
        window: Their size, whole tiles by default, flips and turns.
        windows_per_tile: Windows cut from each training tile per epoch, read from disk once;
            held-out tiles give the one in their middle.
        dates: Dates of the series; `all` is the only mode.
        label_threshold: A genus is in `label_multi` if its share of the area is larger.
        on_bad_sample: `raise`, or `replace` by the next good tile.
        statistics: `published`, a YAML or JSON file, or `card` (those of the model's weights).
        seed: Seed of order, windows and dates.
        loading: Worker processes and memory.

    Raises:
        ConfigError: An argument cannot be used.
    """

    known = _MODALITIES
    image = ImageSensor("aerial", ("NIR", "G", "B", "R"), 0.2)
    published = _STATISTICS
    format = "TreeSatAI Time Series"
    sample = "treesatai"
    label_names = GENERA

    def __init__(
        self,
        root: str = "sample",
        modalities: dict[str, str] | None = None,
        global_batch_size: int = 384,
        window: Window | None = None,
        windows_per_tile: int = 1,
        dates: Dates | None = None,
        label_threshold: float = 0.07,
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
        check_windows(windows_per_tile=windows_per_tile)
        self.root = root
        self.windows_per_tile = windows_per_tile
        self.label_threshold = label_threshold
        self.statistics = statistics
        reads = modalities or {name: name for name in _MODALITIES}
        self._describe_modalities(reads, window or Window(), dates, _TILE_M)

    def open_sources(self) -> dict[str, Source]:
        """Read the tables that are there; predictions are made for `test`, else held-out tiles."""
        root = self._root()
        splits = ("train", "val", "test")
        self._keep({split: scan_treesat(root, split, self.reads.values()) for split in splits})
        if not self.catalogues:
            raise DataError(
                f"data.init_args.root={root!r}: found neither train.csv nor "
                "train_filenames.lst (nor those of val or test) there; expected the folder of "
                "TreeSatAI Time Series with aerial/ and sentinel-ts/. 'sample' is the embedded "
                "sample."
            )
        if "val" not in self.catalogues:
            _log.warning("%s has no val.csv: nothing is held out for validation", root)
        names = {found.names for found in self.catalogues.values()}
        if len(names) > 1:
            raise DataError(f"{root}: the tables list different genera, {sorted(names)}.")
        self.label_names = names.pop()
        return self._sources_of_splits()

    def _source(self, catalogue: TreeSatCatalogue, *, is_training: bool) -> TileSource:
        return TileSource(
            tiles=_Tiles(catalogue, tuple(self.reads.values()), self.label_threshold),
            modalities=self._modalities,
            reads=self.reads,
            margins=_MARGIN,
            window=self.window,
            tile_m=_TILE_M,
            step_m=S2_M,
            dates=self.dates,
            seed=self.seed,
            is_training=is_training,
            windows=self.windows_per_tile if is_training else 1,
            tile_bytes=sum(_TILE_BYTES[name] for name in self.reads.values()),
        )

    @property
    def num_classes(self) -> int:
        """Number of genera."""
        return len(self.label_names or GENERA)

    def _found(self, split: str, catalogue: TreeSatCatalogue) -> str:
        return (
            f"{len(catalogue.tiles)} tiles listed by {catalogue.table}, series in "
            f"{catalogue.folder}/, at {catalogue.root}"
        )
