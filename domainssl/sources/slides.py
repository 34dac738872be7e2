"""Regions of feature grids, or samples of their tiles, as a source of the block stream."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from domainssl.errors import DataError
from domainssl.io.slide.bag import Bag, FeatureGrid, places_of, to_grid, unlike_features
from domainssl.io.slide.bag_slides import SlideBag
from domainssl.io.slide.features import read_bag
from domainssl.loading.memory import empty
from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows
from domainssl.modality import Modality, key
from domainssl.sources.items import companions
from domainssl.sources.slide_options import SlideFiles, SlideWindow, TileFeatures

__all__ = ["SlideSource", "batch_of_grid"]

_REGION, _TILES = 61, 62  # tags that keep the streams of random numbers apart
_MPP_TOLERANCE = 0.1
_TOLD = 3  # slides of which a process says what is odd
_log = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]


@dataclass(kw_only=True)
class SlideSource:
    """Reads bags, and gives regions of their grid or samples of their tiles; a block is a slide.

    Attributes:
        slides: The slides.
        ids: Their ids in batches.
        modality: What batches hold.
        features: What is read.
        window: What an item shows.
        files: How files are read.
        labels: Class per slide, -1 where unknown; None where batches carry none.
        seed: Seed of regions and samples.
        is_training: Draw anew in every epoch; otherwise the densest region, or tiles evenly spread.
    """

    slides: Sequence[SlideBag]
    ids: Sequence[str]
    modality: Modality
    features: TileFeatures
    window: SlideWindow
    files: SlideFiles
    labels: Sequence[int] | None
    seed: int
    is_training: bool
    _kept: OrderedDict[int, Bag | FeatureGrid] = field(default_factory=OrderedDict, repr=False)
    _told: set[str] = field(default_factory=set, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept features behind: every process reads its own."""
        return {**self.__dict__, "_kept": OrderedDict()}

    @property
    def per_slide(self) -> int:
        """Items of a slide."""
        return self.window.per_slide if self.is_training else 1

    @property
    def items_per_unit(self) -> int:
        """Items of a slide."""
        return self.per_slide

    @property
    def unit_labels(self) -> Sequence[int] | None:
        """Class per slide, -1 where unknown; None without labels."""
        return self.labels

    @property
    def sizes(self) -> list[int]:
        """Items per slide."""
        return [self.per_slide] * len(self.slides)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes decoded in an epoch, roughly."""
        return 4 * self.modality.num_channels * sum(slide.tiles for slide in self.slides)

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Read one slide and make the items asked for."""
        found, decoded = self._slide(piece.block)
        epoch = epoch if self.is_training else 0
        count, tokens = len(piece), math.prod(self.window.shape)
        name, dim = self.modality.name, self.modality.num_channels
        data = companions(
            name,
            empty((count, tokens, dim), torch.float32).zero_(),
            empty((count, tokens), torch.bool).zero_(),
            count=count,
            coords=empty((count, tokens, 2), torch.float32).zero_(),
            geo=[],
        )
        rows = Rows(data=data, count=count, bytes_decoded=decoded)
        first = piece.block * self.per_slide
        for row, number in enumerate(range(piece.start, piece.stop)):
            write = self._tiles if isinstance(found, Bag) else self._region
            values, seen, places, geo = write(found, first + number, epoch)
            data[name][row, : len(values)] = torch.from_numpy(values)
            data[key(name, "valid")][row, : len(values)] = torch.from_numpy(seen)
            data[key(name, "coords")][row, : len(values)] = torch.from_numpy(places)
            data[key(name, "geo")].append(geo)
            rows.bytes_needed += values.nbytes
        own, many = self.ids[piece.block], self.per_slide > 1
        data["index"] = np.arange(first + piece.start, first + piece.stop)
        data["id"] = [f"{own}_{i}" if many else own for i in range(piece.start, piece.stop)]
        if self.labels is not None:
            data["label"] = np.full(count, self.labels[piece.block], np.int64)
        return rows

    def _slide(self, number: int) -> tuple[Bag | FeatureGrid, int]:
        """Return a slide, as a grid or a bag, and the bytes decoded for it now."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number], 0
        file = self.slides[number].file
        bag = read_bag(
            file.path,
            patches=file.patches,
            level_downsample=self.files.level_downsample,
            patch_size_level0=self.files.patch_size_level0,
        )
        self._check(bag)
        self._tell(bag)
        found: Bag | FeatureGrid = bag
        if self.window.mode == "grid":
            found = to_grid(bag, legacy_titan_grid=self.window.legacy_titan_grid)
        self._kept[number] = found
        limit = self.files.keep_mb * 1e6
        while self._kept and sum(f.features.nbytes for f in self._kept.values()) > limit:
            self._kept.popitem(last=False)
        return found, bag.features.nbytes

    def _check(self, bag: Bag) -> None:
        """Compare what a file states with what the configuration says.

        Raises:
            DataError: They differ, or no feature is finite.
        """
        for name in ("encoder", "mpp_um"):
            stated, asked = getattr(bag, name), getattr(self.features, name)
            if not stated or not asked or stated == asked:
                continue
            if name == "mpp_um" and abs(stated / asked - 1) <= _MPP_TOLERANCE:
                continue
            raise DataError(
                f"{bag.path}: {name} is {stated!r}, the configuration says {asked!r}. Correct "
                f"data.init_args.modalities.{self.modality.name}.{name}, or leave the file out."
            )
        if not np.isfinite(bag.features).all(1).any():
            raise DataError(
                f"{bag.path}: none of its {len(bag)} tiles has finite features. Extract the slide "
                "again, or leave it out."
            )

    def _tell(self, bag: Bag) -> None:
        """Say of the first slides that are read what no encoder writes; training goes on."""
        odd = unlike_features(bag.features) if len(self._told) < _TOLD else []
        if not odd or bag.path in self._told:
            return
        self._told.add(bag.path)
        more = "" if len(self._told) < _TOLD else " Further slides are not named; inspect does."
        _log.warning(
            "%s: %s. The rest is trained on as it is: extract the slide again, or leave it out.%s",
            bag.path, "; ".join(odd), more,
        )  # fmt: skip

    # Regions --------------------------------------------------------------------------------

    def _region(
        self, grid: Any, index: int, epoch: int
    ) -> tuple[Array, Array, Array, dict[str, Any]]:
        """Return features (N, D), which cells hold tiles (N,), their places (N, 2) and origin."""
        size = self.window.region
        padded, seen, before = _padded(grid, size)
        room = [s - n + 1 for s, n in zip(seen.shape, size, strict=True)]
        share = _shares(seen, size)
        start = int(share.argmax())
        if self.is_training:
            rng = generator(self.seed, epoch, _REGION, index)
            fitting = np.flatnonzero(share >= self.window.min_foreground)
            start = int(fitting[rng.integers(len(fitting))]) if len(fitting) else start
        row, column = divmod(start, room[1])
        part = (slice(row, row + size[0]), slice(column, column + size[1]))
        values = padded[(slice(None), *part)].reshape(len(padded), -1).T
        x, y = grid.origin
        top, left = row - before[0], column - before[1]
        if self.window.legacy_titan_grid:
            top, left = left, top
        high = grid.step * grid.aspect
        geo = {"origin": [x + left * grid.step, round(y + top * high)], "step": grid.step}
        places = np.indices(size).reshape(2, -1).T.astype(np.float32)
        return np.ascontiguousarray(values), seen[part].reshape(-1), places, geo

    # Bags -----------------------------------------------------------------------------------

    def _tiles(
        self, bag: Any, index: int, epoch: int
    ) -> tuple[Array, Array, Array, dict[str, Any]]:
        """Return features (T, D), which are finite, their places in tiles, and the origin."""
        tokens, count = self.window.tokens, len(bag)
        if self.is_training:
            rng = generator(self.seed, epoch, _TILES, index)
            chosen = rng.permutation(count)[:tokens]
            if count < tokens and self.window.fill == "repeat":
                chosen = np.concatenate([chosen, rng.integers(count, size=tokens - count)])
        else:
            chosen = np.arange(min(count, tokens)) * count // min(count, tokens)
            if self.window.fill == "repeat":
                chosen = np.resize(chosen, tokens)
        places, origin, step = places_of(bag)
        values = bag.features[chosen]
        seen = np.isfinite(values).all(1)
        geo = {"origin": list(origin), "step": step}
        return np.where(seen[:, None], values, 0.0), seen, places[chosen], geo


def _padded(grid: FeatureGrid, size: tuple[int, int]) -> tuple[Array, Array, list[int]]:
    """Return a grid that is at least as large as a region, its mask, and what was put before."""
    lacking = [max(0, n - s) for n, s in zip(size, grid.occupied.shape, strict=True)]
    before = [n // 2 for n in lacking]
    if not any(lacking):
        return grid.features, grid.occupied, before
    sides = [(b, n - b) for b, n in zip(before, lacking, strict=True)]
    return np.pad(grid.features, [(0, 0), *sides]), np.pad(grid.occupied, sides), before


def _shares(seen: Array, size: tuple[int, int]) -> Array:
    """Return the fraction of cells with a tile of every region, row by row, by a table of sums."""
    sums = np.pad(seen.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    high, wide = size
    inside = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    found: Array = (inside / (high * wide)).reshape(-1)
    return found


def batch_of_grid(grid: FeatureGrid, name: str = "tile_features") -> dict[str, Any]:
    """Return the tiles of a whole slide as a batch of one, for a backbone.

    Args:
        grid: From `to_grid`.
        name: Key of the modality.

    Returns:
        Features (1, N, D) of the cells that hold tiles, all valid, and their row and column.
    """
    rows, columns = np.nonzero(grid.occupied)
    values = grid.features[:, rows, columns].T
    places = np.stack([rows, columns], 1).astype(np.float32)
    return {
        name: torch.from_numpy(np.ascontiguousarray(values)).unsqueeze(0),
        key(name, "coords"): torch.from_numpy(places).unsqueeze(0),
    }
