"""What DataModules of one image and Sentinel series on a footprint share.

A subclass says which sensors there are, scans its tables and reads its tiles; see `treesatai.py`
and `pastis.py`.
"""

from __future__ import annotations

import importlib
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from domainssl.datamodules.base import DomainDataModule
from domainssl.datamodules.statistics import statistics_of
from domainssl.errors import ConfigError, nearest
from domainssl.io.leaks import repeated
from domainssl.loading.source import Source
from domainssl.modality import Modality
from domainssl.sensors import L2A_BANDS, S1_BANDS, S2_M, VALID_RANGES, wavelengths_nm
from domainssl.sources.dates import Dates
from domainssl.sources.tiles import TileSource
from domainssl.sources.windows import Window

__all__ = ["ImageSensor", "check_windows"]

_log = logging.getLogger(__name__)

_USED_DATES = (
    "max_dates", "min_valid_fraction", "choice", "cloud_percent", "mask_clouds", "join_days",
)  # fmt: skip
_S2_BANDS = tuple(band for band in L2A_BANDS if band not in ("B01", "B09"))


@dataclass(frozen=True)
class ImageSensor:
    """The sensor of the single 8-bit image, in the order in which its channels are stored."""

    name: str
    channels: tuple[str, ...]
    gsd_m: float


class _Catalogue(Protocol):
    """What was found of a split."""

    @property
    def problems(self) -> Sequence[str]:
        """Texts for the log."""

    @property
    def titles(self) -> Sequence[str]:
        """What the tiles are called."""

    def identity(self) -> dict[str, Any]:
        """Return plain data that tell these files from others."""


class _FootprintDataModule(DomainDataModule):
    """Base of DataModules whose tiles are one image and series of `s2`, `s1_asc`, `s1_des`.

    Attributes:
        known: All modalities, in the order of batches.
        image: The one that is no series.
        published: Mean and standard deviation per band, by modality.
        format: Name of the data set.
        sample: Module of `datamodules/samples` that makes the embedded sample.
    """

    known: ClassVar[tuple[str, ...]]
    image: ClassVar[ImageSensor]
    published: ClassVar[Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]]
    format: ClassVar[str]
    sample: ClassVar[str]

    root: str
    window: Window  # in pixels of the series
    dates: Dates
    reads: dict[str, str]
    statistics: str
    catalogues: dict[str, Any]

    def _describe_modalities(
        self, reads: Mapping[str, str], window: Window, dates: Dates | None, tile_m: float
    ) -> None:
        """Check the arguments and build the modalities; root and statistics are set.

        Args:
            reads: Published name of each modality key.
            window: As asked for, sizes filled in.
            dates: As asked for.
            tile_m: Side of a whole tile in metres.

        Raises:
            ConfigError: A name is unknown, or a length is none of whole pixels.
        """
        where = "data.init_args.modalities"
        for key, name in reads.items():
            if name not in self.known:
                raise ConfigError(
                    f"{where}.{key}: unknown modality {name!r}, expected one of "
                    f"{', '.join(self.known)}.{nearest(name, self.known)}"
                )
        if not reads:
            raise ConfigError(f"{where}: empty, expected some of {', '.join(self.known)}.")
        self.reads = dict(reads)
        self.dates = (dates or Dates()).of(("all",), _USED_DATES, min_valid_fraction=0.0)
        self.dates.check([key for key, name in reads.items() if name != self.image.name])
        self.catalogues = {}
        self._repeated: list[str] = []
        window.must_not_resize()
        names = set(reads.values())
        finest = self.image.gsd_m if self.image.name in names else S2_M
        whole = (round(tile_m / S2_M),) * 2
        self.window = window.on_grid(S2_M, px_m=finest, whole=whole, name="10 m pixels")
        self.window.check(whole, "tiles")
        self._modalities = {key: self._modality(key, name) for key, name in reads.items()}

    @property
    def modalities(self) -> dict[str, Modality]:
        """The modalities asked for; statistics as asked for."""
        return self._modalities

    def _modality(self, key: str, name: str) -> Modality:
        mean, std = self.published[name]
        is_image = name == self.image.name
        gsd = self.image.gsd_m if is_image else S2_M
        times = round(S2_M / gsd)
        if is_image:
            channels, unit = self.image.channels, "rgb8"
        else:
            channels, unit = (_S2_BANDS, "dn") if name == "s2" else (S1_BANDS, "db")
        plain = Modality(
            name=key,
            kind="image" if is_image else "series",
            channels=channels,
            value_unit=unit,
            size=tuple(cells * times for cells in self.window.shape),
            gsd_m=gsd,
            mean=mean,
            std=std,
            valid_range=VALID_RANGES[unit],
            nodata=None,  # batches mark it in `valid`
            wavelengths_nm=None if is_image else wavelengths_nm(channels),
        )
        return statistics_of(plain, self.statistics, alias=name)

    def prepare_data(self) -> None:
        """Write the embedded sample, once per machine."""
        self._root()

    def _root(self) -> str:
        if self.root != "sample":
            return self.root
        module = importlib.import_module(f"domainssl.datamodules.samples.{self.sample}")
        return str(module.sample_root())

    def _keep(self, found: Mapping[str, _Catalogue | None]) -> None:
        """Remember what is there of the splits, and log its problems."""
        self.catalogues = {split: c for split, c in found.items() if c is not None}
        names = {split: catalogue.titles for split, catalogue in self.catalogues.items()}
        self._repeated = repeated(names, self._root(), "tiles")
        for split, catalogue in self.catalogues.items():
            for problem in catalogue.problems:
                _log.warning("%s: %s", split, problem)
        for problem in self._repeated:
            _log.warning("%s", problem)

    @abstractmethod
    def _source(self, catalogue: Any, *, is_training: bool) -> TileSource:
        """Return the tiles of a split."""

    def _sources_of_splits(self) -> dict[str, Source]:
        """Return a source per split; predictions are made for the last one."""
        sources: dict[str, Source] = {
            split: self._source(found, is_training=split == "train")
            for split, found in self.catalogues.items()
        }
        last = list(self.catalogues.values())[-1]
        sources["predict"] = self._source(last, is_training=False)
        return sources

    def identity(self) -> dict[str, Any]:
        """Return format, root, and what tells the files of every split from others."""
        return {
            "format": self.format,
            "root": self.root,
            "splits": {split: found.identity() for split, found in self.catalogues.items()},
        }

    @abstractmethod
    def _found(self, split: str, catalogue: Any) -> str:
        """Return a line about a split."""

    @property
    def problems(self) -> list[str]:
        """What was left out of the splits, and why."""
        left_out = [text for found in self.catalogues.values() for text in found.problems]
        return left_out + self._repeated

    def describe(self) -> list[str]:
        """Return lines that tell what was found."""
        lines = []
        for split, found in self.catalogues.items():
            lines.append(f"{self.format}, {split}: {self._found(split, found)}")
        lines += [f"problem: {text}" for text in self.problems]
        for name, modality in self._modalities.items():
            most = self.dates.most(name)
            dates = f", {f'at most {most}' if most else 'all'} dates"
            lines.append(
                f"{name}: {modality.value_unit}, {modality.num_channels} bands "
                f"{' '.join(modality.channels)}, {modality.size[0]} px of {modality.gsd_m:g} m"
                + (dates if modality.kind == "series" else "")
            )
        lines.append(f"labels: {', '.join(self.label_names or ())}")
        return lines + super().describe()


def check_windows(**numbers: int) -> None:
    """Refuse numbers of windows below one; called with the name of the argument."""
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"data.init_args.{name}: got {number!r}, expected at least 1.")
