"""Tiles with images and time series on one footprint, as a source of the block stream.

A block is a tile, an item a window of it. All modalities are cut by the same window in metres,
flipped and turned together; dates are chosen per (seed, epoch, item).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, from_numpy

from domainssl.errors import ConfigError, nearest
from domainssl.io.series.tile import (
    Image,
    Series,
    Tile,
    even_dates,
    join_days,
    measured,
    typical_dates,
)
from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows
from domainssl.modality import Batch, Modality, collate, key
from domainssl.sources.windows import Window

__all__ = ["Footprint", "SeriesDates", "TileSource", "Tiles"]

_WINDOW, _DATES = 31, 32  # tags that keep the streams of random numbers apart
_CHOICES = ("drawn", "even", "typical")


@dataclass(frozen=True)
class SeriesDates:
    """Which acquisitions of a series are delivered, in the order of time.

    Attributes:
        most: Most dates of an item, for all series or by modality; None delivers all. Items have
            fewer where fewer were acquired.
        choice: How training takes `most` out of more: `drawn` at random, `even`ly spread, or the
            `typical` clear one of each of as many equal runs (MAESTRO's temporal binning).
            Held-out items are spread evenly instead of drawn.
        cloud_percent: A pixel is cloudy if the probability of cloud or snow is larger.
        mask_clouds: Cloudy pixels are not valid.
        min_clear: Dates with a smaller share of valid, cloudless pixels are left out. Dates
            without a single valid pixel always are.
        join_days: Lay acquisitions of one day over each other, as they repeat each other.
    """

    most: int | dict[str, int] | None = None
    choice: Literal["drawn", "even", "typical"] = "drawn"
    cloud_percent: float = 0.0
    mask_clouds: bool = False
    min_clear: float = 0.0
    join_days: bool = True

    def __post_init__(self) -> None:
        if self.choice not in _CHOICES:
            raise ConfigError(
                f"data.init_args.dates.choice: got {self.choice!r}, expected one of {_CHOICES}."
                f"{nearest(self.choice, _CHOICES)}"
            )
        given = self.most if isinstance(self.most, dict) else {"": self.most}
        for name, value in given.items():
            if value is not None and value < 1:
                where = f"most.{name}" if name else "most"
                raise ConfigError(
                    f"data.init_args.dates.{where}: got {value!r}, expected at least 1."
                )
        if not 0 <= self.min_clear <= 1:
            raise ConfigError(
                f"data.init_args.dates.min_clear: got {self.min_clear!r}, expected a share "
                "between 0 and 1."
            )

    def check(self, names: Sequence[str]) -> None:
        """Refuse numbers of dates for a modality that is no series here.

        Raises:
            ConfigError: Names the key.
        """
        for name in self.most if isinstance(self.most, dict) else ():
            if name not in names:
                raise ConfigError(
                    f"data.init_args.dates.most.{name}: no such series; there are "
                    f"{', '.join(names) or 'none'}.{nearest(name, names)}"
                )

    def most_of(self, name: str) -> int | None:
        """Return the most dates of one modality."""
        return self.most.get(name) if isinstance(self.most, dict) else self.most


@dataclass(frozen=True)
class Footprint:
    """The square of ground that an item shows.

    Attributes:
        size_m: Side in metres; None takes whole tiles. Training draws the place, held-out items
            lie in the middle.
        flips: Mirror at random along both axes.
        quarter_turns: Turn at random by 0, 90, 180 or 270 degrees.
    """

    size_m: float | None = None
    flips: bool = True
    quarter_turns: bool = True

    def side_m(self, tile_m: float, step_m: float) -> float:
        """Return the side in metres.

        Args:
            tile_m: Side of a tile.
            step_m: Pixel of the series, to which windows are aligned.

        Raises:
            ConfigError: The side does not fit the tile or its pixels.
        """
        side = tile_m if self.size_m is None else self.size_m
        if not 0 < side <= tile_m or abs(side / step_m - round(side / step_m)) > 1e-6:
            raise ConfigError(
                f"data.init_args.footprint.size_m: got {side:g}, expected a multiple of "
                f"{step_m:g} m (one pixel of the series) up to {tile_m:g} m, the "
                "side of a tile."
            )
        return side


class Tiles(Protocol):
    """Where tiles come from; pickled to workers, so it holds paths and options only."""

    def __len__(self) -> int:
        """Return the number of tiles."""

    def read(self, number: int) -> Tile:
        """Read a tile as it is stored."""

    def labels(self, number: int, classes: np.ndarray[Any, Any] | None) -> Batch:
        """Return what is known about an item.

        Args:
            number: The tile.
            classes: Class per pixel of the window, (H, W), where the tile has them.
        """


@dataclass
class TileSource:
    """Cuts windows out of tiles.

    Attributes:
        tiles: The tiles.
        modalities: What an item holds.
        margins: Pixels outside of the common footprint on each side of an image, by modality.
        footprint: Windows.
        tile_m: Side of a tile.
        step_m: Pixel of the series and of class maps, to which windows are aligned.
        dates: Choice of dates.
        seed: Seed of windows and dates.
        is_training: Draw; otherwise the middle, and dates evenly spread.
        windows: Windows per tile and epoch.
        tile_bytes: Bytes of a tile, roughly.
    """

    tiles: Tiles
    modalities: Mapping[str, Modality]
    margins: Mapping[str, int]
    footprint: Footprint
    tile_m: float
    step_m: float
    dates: SeriesDates
    seed: int
    is_training: bool
    windows: int = 1
    tile_bytes: int = 1_000_000

    def __post_init__(self) -> None:
        self.footprint.side_m(self.tile_m, self.step_m)

    @property
    def sizes(self) -> list[int]:
        """Windows per tile."""
        return [self.windows] * len(self.tiles)

    @property
    def num_bytes(self) -> int:
        """Bytes decoded in an epoch, roughly."""
        return self.tile_bytes * len(self.tiles)

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Read one tile and cut its windows; the number of dates is that of the longest."""
        tile = self.tiles.read(piece.block)
        items = [self._item(tile, piece, i, epoch) for i in range(piece.start, piece.stop)]
        rows = Rows(collate(items), len(items), bytes_decoded=tile.bytes_decoded)
        values = [v for v in rows.data.values() if isinstance(v, Tensor)]
        rows.bytes_needed = sum(v.numel() * v.element_size() for v in values)
        rows.bytes_decoded = max(rows.bytes_decoded, rows.bytes_needed)
        return rows

    def window(self, epoch: int, index: int, which: int = 0) -> Window:
        """Return the window of an item on the pixels of the series."""
        cells = round(self.tile_m / self.step_m)
        side = round(self.footprint.side_m(self.tile_m, self.step_m) / self.step_m)
        if self.is_training:
            rng = generator(self.seed, epoch, _WINDOW, index)
            top, left = (int(v) for v in rng.integers(0, cells - side + 1, 2))
            flips, turns = rng.integers(0, 2, 2), int(rng.integers(0, 4))
            return Window(
                top,
                left,
                side,
                side,
                bool(flips[0]) and self.footprint.flips,
                bool(flips[1]) and self.footprint.flips,
                turns if self.footprint.quarter_turns else 0,
            )
        if self.windows == 1:
            return Window((cells - side) // 2, (cells - side) // 2, side, side)
        per_row = int(np.ceil(self.windows**0.5))
        places = np.linspace(0, cells - side, per_row).round()
        return Window(int(places[which // per_row]), int(places[which % per_row]), side, side)

    def _item(self, tile: Tile, piece: Piece, which: int, epoch: int) -> Batch:
        """Make one item out of a tile."""
        index = piece.block * self.windows + which
        window = self.window(epoch, index, which)
        many = self.windows > 1
        item: Batch = {"index": index, "id": f"{tile.id}_{which}" if many else tile.id}
        corner = _corner(tile, self.modalities, self.margins)
        for name, modality in self.modalities.items():
            own = self._scaled(window, modality)
            if modality.kind == "series":
                # each series its own stream: equal draws would tell which two belong together
                tag = (_DATES << 32) + crc32(name.encode())
                rng = generator(self.seed, epoch, tag, index)
                item |= self._series(name, modality, tile.series.get(name), own, rng)
            else:
                item |= self._image(name, modality, tile.images.get(name), own)
            if corner is not None:
                (x, y), crs = corner
                margin = self.margins.get(name, 0)
                step = _gsd(modality)
                geo = own.geo(x - margin * step, y + margin * step, step)
                item[key(name, "geo")] = {"crs": crs, **geo}
        classes = None
        if tile.classes is not None:
            classes = np.ascontiguousarray(window.view(tile.classes))
        return item | self.tiles.labels(piece.block, classes)

    def _scaled(self, window: Window, modality: Modality) -> Window:
        """Return the window on the pixels of a modality."""
        times = round(self.step_m / _gsd(modality))
        margin = self.margins.get(modality.name, 0)
        return Window(
            margin + window.top * times,
            margin + window.left * times,
            window.side * times,
            window.side * times,
            window.is_flipped_y,
            window.is_flipped_x,
            window.turns,
        )

    def _image(self, name: str, modality: Modality, image: Image | None, window: Window) -> Batch:
        """Return an image and its companions; a filler where there is none."""
        if image is None:
            values = np.zeros((modality.num_channels, window.side, window.side), np.float32)
        else:
            values = np.ascontiguousarray(window.view(image.values))
        shape = values.shape[1:]
        return {
            name: from_numpy(values),
            key(name, "valid"): from_numpy(np.full(shape, image is not None)),
            key(name, "present"): image is not None,
            key(name, "dates"): torch.tensor(0 if image is None else image.day, dtype=torch.int32),
        }

    def _series(
        self,
        name: str,
        modality: Modality,
        series: Series | None,
        window: Window,
        rng: np.random.Generator,
    ) -> Batch:
        """Return a series and its companions; one empty date where there is none."""
        found = None if series is None else self._choose(name, series, window, rng)
        if found is None:
            shape = (1, modality.num_channels, window.side, window.side)
            found = (
                np.zeros(shape, np.float32),
                np.zeros((1, window.side, window.side), bool),
                np.zeros(1, np.int32),
            )
            frames = np.zeros(1, bool)
        else:
            frames = np.ones(len(found[0]), bool)
        values, valid, days = found
        return {
            name: from_numpy(np.ascontiguousarray(values)),
            key(name, "valid"): from_numpy(np.ascontiguousarray(valid)),
            key(name, "present"): bool(frames.any()),
            key(name, "dates"): from_numpy(days.astype(np.int32)),
            key(name, "frames"): from_numpy(frames),
        }

    def _choose(
        self, name: str, series: Series, window: Window, rng: np.random.Generator
    ) -> tuple[np.ndarray[Any, Any], ...] | None:
        """Return values, valid and days of the chosen dates, None where no date is left."""
        options = self.dates
        values, valid = measured(window.view(series.values), series.unit)
        days = series.days
        cloudy = np.zeros_like(valid)
        if series.cloud is not None:
            cloudy = window.view(series.cloud) > options.cloud_percent
        if options.join_days:
            values, valid, days, cloudy = join_days(values, valid, days, cloudy)
        clear = (valid & ~cloudy).mean((1, 2))
        kept = np.flatnonzero(valid.any((1, 2)) & (clear >= options.min_clear))
        if not len(kept):
            return None
        most = options.most_of(name)
        if most is not None and most < len(kept):
            kept = kept[self._subset(values[kept], (cloudy | ~valid)[kept], most, rng)]
        if options.mask_clouds:
            valid &= ~cloudy
            values *= valid[:, None]
        return values[kept], valid[kept], days[kept]

    def _subset(
        self,
        values: np.ndarray[Any, Any],
        masked: np.ndarray[Any, Any],
        most: int,
        rng: np.random.Generator,
    ) -> np.ndarray[Any, Any]:
        """Return `most` ascending positions."""
        if self.dates.choice == "typical":
            offset = int(rng.integers(0, len(values) % most + 1)) if self.is_training else 0
            return typical_dates(values, masked, most, offset)
        if self.dates.choice == "drawn" and self.is_training:
            return np.sort(rng.choice(len(values), most, replace=False))
        return even_dates(len(values), most)


def _gsd(modality: Modality) -> float:
    assert modality.gsd_m is not None
    return modality.gsd_m


def _corner(
    tile: Tile, modalities: Mapping[str, Modality], margins: Mapping[str, int]
) -> tuple[tuple[float, float], int | str] | None:
    """Return the corner of the common footprint and its CRS, of an image that has one."""
    for name, modality in modalities.items():
        image = tile.images.get(name)
        if image is not None and image.corner is not None:
            inset = margins.get(name, 0) * _gsd(modality)
            return (image.corner[0] + inset, image.corner[1] - inset), image.crs
    return None
