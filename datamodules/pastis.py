"""PASTIS, PASTIS-R and PASTIS-HD: crops in France, seen by Sentinel-1, Sentinel-2 and SPOT.

    data = PastisDataModule(root="sample", global_batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))     # s2 (8, T, 10, 16, 16), mask (8, 16, 16)

`io/series/pastis.py` maps files, `sources/tiles.py` cuts windows, `loading/stream.py` makes
batches of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from domainssl.datamodules.base import named_sample
from domainssl.datamodules.footprints import (
    ImageSensor,
    _FootprintDataModule,
    check_windows,
)
from domainssl.errors import ConfigError, DataError
from domainssl.io.series.pastis import (
    CLASSES,
    SERIES,
    VOID,
    PastisCatalogue,
    read_pastis,
    scan_pastis,
)
from domainssl.io.series.tile import Tile
from domainssl.loading.source import Loading, Source
from domainssl.modality import Batch
from domainssl.options import as_dataclass
from domainssl.sensors import S2_M
from domainssl.sources.dates import Dates
from domainssl.sources.tiles import TileSource
from domainssl.sources.windows import Window

__all__ = ["Folds", "PastisDataModule"]


_TILE_BYTES = {"s2": 16_000_000, "s1_asc": 9_000_000, "s1_des": 9_000_000, "spot": 5_000_000}
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
_PATCH_M = 1280.0
_WINDOW = Window(size=160.0, unit="m")


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


@dataclass(frozen=True, kw_only=True)
class Folds:
    """Folds of the data set, 1 to 5, each used once.

    Attributes:
        train: Folds to train on.
        val: Folds held out for validation.
        test: Folds to predict.
    """

    train: tuple[int, ...] = (1, 2, 3)
    val: tuple[int, ...] = (4,)
    test: tuple[int, ...] = (5,)

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        used = (*self.train, *self.val, *self.test)
        if len(set(used)) < len(used) or not set(used) <= set(range(1, 6)):
            raise ConfigError(
                f"data.init_args.folds: got {self}; expected folds from 1 to 5, each in one of "
                "them, as neighbouring patches share a fold."
            )


class PastisDataModule(_FootprintDataModule):
    """Sentinel series, optional SPOT images and crop types of PASTIS.

    An item is a window of a patch. Batches carry `mask` (class per pixel, -1 where void), `label`
    (the crop that covers most of the window; 0, background, where there is none) and
    `label_multi` (which of the 18 crops occur).

    Args:
        root: `sample` or `sample:crops`, made on first use in the cache, or the folder with
            `metadata.geojson`.
        modalities: What each key reads: `s2`, `s1_asc`, `s1_des` or `spot`; the series by default.
        global_batch_size: Windows per optimiser step, over all devices and accumulation.
        window: Their size, 160 m by default, flips and turns.
        windows_per_patch: Windows per patch and epoch; held-out ones lie on a regular grid.
        dates: Dates of the series; `all` is the only mode. There are no cloud masks.
        folds: Which of the data set's folds are trained on, held out and predicted.
        on_bad_sample: `raise`, or `replace` by the next good window.
        statistics: `published`, a YAML or JSON file, or `card` (those of the model's weights).
        seed: Seed of order, windows and dates.
        loading: Worker processes and memory.

    Raises:
        ConfigError: An argument cannot be used.
    """

    known = _MODALITIES
    image = ImageSensor("spot", ("R", "G", "B"), 1.0)
    published = _STATISTICS
    format = "PASTIS"
    sample = "pastis"
    label_names = CLASSES

    def __init__(
        self,
        root: str = "sample",
        modalities: dict[str, str] | None = None,
        global_batch_size: int = 8,
        window: Window | None = None,
        windows_per_patch: int = 1,
        dates: Dates | None = None,
        folds: Folds = Folds(),
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
        chosen = as_dataclass(Folds, folds)
        self.folds = {"train": chosen.train, "val": chosen.val, "test": chosen.test}
        check_windows(windows_per_patch=windows_per_patch)
        self.root = root
        self.windows_per_patch = windows_per_patch
        self.statistics = statistics
        reads = modalities or {name: name for name in SERIES}
        self._describe_modalities(reads, (window or Window()).sized(_WINDOW), dates, _PATCH_M)

    def _root(self) -> str:
        if self.root == "sample":
            return super()._root()
        name = named_sample(self.root, ("crops",))
        if name is None:
            return self.root
        from domainssl.datamodules.samples.pastis import sample_root

        return str(sample_root(name))

    def open_sources(self) -> dict[str, Source]:
        """Read the table; predictions are made for the test folds, else for held-out ones."""
        root = self._root()
        folds = self.folds.items()
        self._keep({split: scan_pastis(root, own, self.reads.values()) for split, own in folds})
        if not self.catalogues:
            raise DataError(f"{root}: metadata.geojson lists no patch of the folds {self.folds}.")
        return self._sources_of_splits()

    def _source(self, catalogue: PastisCatalogue, *, is_training: bool) -> TileSource:
        tile_m = catalogue.side * S2_M
        return TileSource(
            tiles=_Tiles(catalogue, tuple(self.reads.values())),
            modalities=self._modalities,
            reads=self.reads,
            margins={},
            window=self.window,
            tile_m=tile_m,
            step_m=S2_M,
            dates=self.dates,
            seed=self.seed,
            is_training=is_training,
            windows=self.windows_per_patch,
            tile_bytes=sum(_TILE_BYTES[name] for name in self.reads.values())
            * catalogue.side**2
            // 128**2,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(CLASSES)

    def _found(self, split: str, catalogue: PastisCatalogue) -> str:
        return (
            f"{len(catalogue.patches)} patches of {catalogue.side} x {catalogue.side} px in "
            f"fold(s) {', '.join(map(str, catalogue.folds))}, at {catalogue.root}"
        )
