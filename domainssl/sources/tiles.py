"""Tiles with images and time series on one footprint, as a source of the block stream.

A block is a tile, an item a window of it. All modalities are cut by the same window in metres,
flipped and turned together; dates are chosen per (seed, epoch, item).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from zlib import crc32

import numpy as np
from torch import Tensor

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
from domainssl.sources.dates import Dates
from domainssl.sources.items import companions
from domainssl.sources.windows import Cut, Window

__all__ = ["TileSource", "Tiles"]

_WINDOW, _DATES = 31, 32  # tags that keep the streams of random numbers apart


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


@dataclass(kw_only=True)
class TileSource:
    """Cuts windows out of tiles.

    Attributes:
        tiles: The tiles.
        modalities: What an item holds.
        reads: Published name of each modality.
        margins: Pixels outside of the common footprint on each side of an image, by its
            published name.
        window: Windows, in pixels of the series.
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
    reads: Mapping[str, str]
    margins: Mapping[str, int]
    window: Window
    tile_m: float
    step_m: float
    dates: Dates
    seed: int
    is_training: bool
    windows: int = 1
    tile_bytes: int = 1_000_000

    def __post_init__(self) -> None:
        self.window.check(self._room, "tiles")

    @property
    def _room(self) -> tuple[int, int]:
        """Pixels of a tile in the series."""
        return (round(self.tile_m / self.step_m),) * 2

    @property
    def items_per_unit(self) -> int:
        """Windows of a tile."""
        return self.windows

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
        rows = Rows(data=collate(items), count=len(items), bytes_decoded=tile.bytes_decoded)
        values = [v for v in rows.data.values() if isinstance(v, Tensor)]
        rows.bytes_needed = sum(v.numel() * v.element_size() for v in values)
        rows.bytes_decoded = max(rows.bytes_decoded, rows.bytes_needed)
        return rows

    def cut(self, epoch: int, index: int, which: int = 0) -> Cut:
        """Return the cut of an item on the pixels of the series."""
        room = self._room
        if self.is_training:
            return self.window.draw(generator(self.seed, epoch, _WINDOW, index), room)
        if self.windows == 1:
            return self.window.middle(room)
        per_row = int(np.ceil(self.windows**0.5))
        begin = tuple(
            int(np.linspace(0, cells - taken, per_row).round()[place])
            for cells, taken, place in zip(
                room, self.window.shape, divmod(which, per_row), strict=True
            )
        )
        return Cut(begin=begin, extent=self.window.shape, size=self.window.shape)

    def _item(self, tile: Tile, piece: Piece, which: int, epoch: int) -> Batch:
        """Make one item out of a tile."""
        index = piece.block * self.windows + which
        cut = self.cut(epoch, index, which)
        many = self.windows > 1
        item: Batch = {"index": index, "id": f"{tile.id}_{which}" if many else tile.id}
        corner = self._corner(tile)
        for name, modality in self.modalities.items():
            read = self.reads[name]
            margin = self.margins.get(read, 0)
            own = cut.scaled(round(self.step_m / _gsd(modality)), margin)
            if modality.kind == "series":
                # each series its own stream: equal draws would tell which two belong together
                tag = (_DATES << 32) + crc32(read.encode())
                rng = generator(self.seed, epoch, tag, index)
                item |= self._series(name, modality, tile.series.get(read), own, rng)
            else:
                item |= self._image(name, modality, tile.images.get(read), own)
            if corner is not None:
                (x, y), crs = corner
                step = _gsd(modality)
                geo = own.geo(x - margin * step, y + margin * step, step)
                item[key(name, "geo")] = {"crs": crs, **geo}
        classes = None
        if tile.classes is not None:
            classes = np.ascontiguousarray(cut.view(tile.classes))
        return item | self.tiles.labels(piece.block, classes)

    def _corner(self, tile: Tile) -> tuple[tuple[float, float], int | str] | None:
        """Return the corner of the common footprint and its CRS, of an image that has one."""
        for name, modality in self.modalities.items():
            image = tile.images.get(self.reads[name])
            if image is not None and image.corner is not None:
                inset = self.margins.get(self.reads[name], 0) * _gsd(modality)
                return (image.corner[0] + inset, image.corner[1] - inset), image.crs
        return None

    def _image(self, name: str, modality: Modality, image: Image | None, cut: Cut) -> Batch:
        """Return an image and its companions; a filler where there is none."""
        if image is None:
            values = np.zeros((modality.num_channels, *cut.size), np.float32)
        else:
            values = np.ascontiguousarray(cut.view(image.values))
        return companions(
            name,
            values,
            np.full(values.shape[1:], image is not None),
            present=image is not None,
            dates=0 if image is None else image.day,
        )

    def _series(
        self,
        name: str,
        modality: Modality,
        series: Series | None,
        cut: Cut,
        rng: np.random.Generator,
    ) -> Batch:
        """Return a series and its companions; one empty date where there is none."""
        found = None if series is None else self._choose(name, series, cut, rng)
        is_present = found is not None
        if found is None:
            shape = (1, modality.num_channels, *cut.size)
            found = (
                np.zeros(shape, np.float32),
                np.zeros((1, *cut.size), bool),
                np.zeros(1, np.int32),
            )
        values, valid, days = found
        return companions(
            name,
            np.ascontiguousarray(values),
            np.ascontiguousarray(valid),
            frames=len(values),
            present=is_present,
            dates=days,
            frame_mask=np.full(len(values), is_present),
        )

    def _choose(
        self, name: str, series: Series, cut: Cut, rng: np.random.Generator
    ) -> tuple[np.ndarray[Any, Any], ...] | None:
        """Return values, valid and days of the chosen dates, None where no date is left."""
        options = self.dates
        values, valid = measured(cut.view(series.values), series.unit)
        days = series.days
        cloudy = np.zeros_like(valid)
        if series.cloud is not None:
            cloudy = cut.view(series.cloud) > options.cloud_percent
        if options.join_days:
            values, valid, days, cloudy = join_days(values, valid, days, cloudy)
        clear = (valid & ~cloudy).mean((1, 2))
        kept = np.flatnonzero(valid.any((1, 2)) & (clear >= (options.min_valid_fraction or 0)))
        if not len(kept):
            return None
        most = options.most(name)
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
