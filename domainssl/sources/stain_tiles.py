"""Windows of stained tiles as a source of the block stream; a block is up to 64 tiles of a slide.

All stains of a place are cut, flipped and turned together. In an epoch every slide gives at most
`per_slide` tiles, drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from domainssl.errors import DataError
from domainssl.io.ids import ids_of
from domainssl.io.slide.manifest import TileSet
from domainssl.io.slide.picture import read_tile_picture
from domainssl.io.slide.pyramid import Slide
from domainssl.loading.memory import empty
from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows
from domainssl.modality import Modality, key
from domainssl.sources.items import companions
from domainssl.sources.slide_grids import SlideTiles
from domainssl.sources.stain_normalization import normalized
from domainssl.sources.windows import Window

__all__ = ["StainSource"]

_WINDOW, _TILES = 61, 62  # tags that keep the streams of random numbers apart
_BLOCK = 64  # tiles
_WHITE = 255
Array = np.ndarray[Any, Any]


@dataclass(kw_only=True)
class StainSource:
    """Reads tiles and cuts the same window out of every stain.

    Attributes:
        sets: The tiles of every slide.
        modalities: What batches hold.
        normalize: Stain normalisation by modality key.
        window: In pixels.
        slides: How tiles are cut out of slides.
        labels: Classes by number; None where batches carry none.
        per_slide: Most tiles of a slide in an epoch.
        ids: `hashed` or `plain`.
        seed: Seed of windows and of the choice of tiles.
        is_training: Draw anew in every epoch.
        same_tiles: The tiles of a slide are drawn once; windows are drawn anew still.
    """

    sets: Sequence[TileSet]
    modalities: Mapping[str, Modality]
    normalize: Mapping[str, str]
    window: Window
    slides: SlideTiles
    labels: Sequence[str] | None
    per_slide: int
    ids: str
    seed: int
    is_training: bool
    same_tiles: bool = False
    _opened: dict[str, Slide] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave slides behind: every process opens its own."""
        return {**self.__dict__, "_opened": {}}

    def with_fixed_items(self) -> StainSource:
        """Return this source with the tiles of the first epoch in all epochs."""
        return replace(self, same_tiles=True)

    @property
    def unit_labels(self) -> Array | None:
        """Class per tile of the first epoch, -1 where unknown; None without labels."""
        if self.labels is None:
            return None
        return self._classes(self._chosen(range(int(self._quotas[-1])), 0))

    @cached_property
    def _quotas(self) -> Array:
        """Tiles of every slide in an epoch, and before it: (S + 1,), ascending from 0."""
        return np.cumsum([0, *(min(len(each), self.per_slide) for each in self.sets)])

    @cached_property
    def _first(self) -> list[int]:
        """Number of the first tile of every slide, over all slides."""
        return [0, *accumulate(len(each) for each in self.sets)]

    @property
    def sizes(self) -> Sequence[int]:
        """Tiles per block; small slides share one."""
        return [stop - start for start, stop in self._blocks]

    @cached_property
    def _blocks(self) -> list[tuple[int, int]]:
        """Begin and end of every block, counted over the tiles of an epoch."""
        blocks: list[tuple[int, int]] = []
        start = 0
        for end in self._quotas[1:].tolist():
            while end - start >= _BLOCK:
                blocks.append((start, start + _BLOCK))
                start += _BLOCK
        last = int(self._quotas[-1])
        return [*blocks, (start, last)] if start < last else blocks

    @property
    def num_bytes(self) -> int:
        """Bytes decoded in an epoch, roughly."""
        pixels = sum(3 * m.size[0] * m.size[1] for m in self.modalities.values())
        return 2 * pixels * int(self._quotas[-1])  # tiles are larger than windows

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Read the tiles of a piece."""
        epoch = epoch if self.is_training else 0
        begin = self._blocks[piece.block][0]
        chosen = self._chosen(range(begin + piece.start, begin + piece.stop), epoch)
        rows = Rows(data=self._empty(len(chosen)), count=len(chosen))
        for row, (slide, tile) in enumerate(chosen):
            try:
                self._write(rows, row, self.sets[slide], tile, self._first[slide] + tile, epoch)
            except DataError as error:
                rows.bad[row] = str(error)
        rows.data["index"] = np.array([self._first[slide] + tile for slide, tile in chosen])
        rows.data["id"] = list(ids_of([self.sets[s].names[t] for s, t in chosen], self.ids))
        if self.labels is not None:
            rows.data["label"] = self._classes(chosen)
        return rows

    def _classes(self, chosen: Sequence[tuple[int, int]]) -> Array:
        """Return the class of tiles, given as slide and tile, -1 where unknown, int64 (N,)."""
        numbers = {name: number for number, name in enumerate(self.labels or ())}
        found = [self.sets[s].labels[t] if self.sets[s].labels else "" for s, t in chosen]
        return np.array([numbers.get(name, -1) for name in found], np.int64)

    def _chosen(self, places: range, epoch: int) -> list[tuple[int, int]]:
        """Return slide and tile of places counted over the tiles of an epoch."""
        slides = np.searchsorted(self._quotas, np.arange(places.start, places.stop), "right") - 1
        orders = {slide: self._order(slide, epoch) for slide in np.unique(slides).tolist()}
        begins = self._quotas.tolist()
        return [
            (slide, int(orders[slide][place - begins[slide]]))
            for slide, place in zip(slides.tolist(), places, strict=True)
        ]

    def _order(self, slide: int, epoch: int) -> Array:
        """Return the tiles that a slide gives in an epoch."""
        count = len(self.sets[slide])
        taken = min(count, self.per_slide)
        if taken == count:
            return np.arange(count)
        if not self.is_training:  # evenly spread
            return np.arange(taken) * count // taken
        epoch = 0 if self.same_tiles else epoch
        return generator(self.seed, epoch, _TILES, slide).permutation(count)[:taken]

    def _empty(self, count: int) -> dict[str, Any]:
        """Return what tiles are written into; a stain is absent until it is written."""
        data: dict[str, Any] = {}
        for name in self.modalities:
            data |= companions(
                name,
                empty((count, 3, *self.window.shape), torch.uint8).fill_(_WHITE),
                empty((count, *self.window.shape), torch.bool).zero_(),
                count=count,
                present=False,
            )
        return data

    def _write(
        self, rows: Rows, row: int, tiles: TileSet, tile: int, index: int, epoch: int
    ) -> None:
        """Write one window of every stain.

        Raises:
            DataError: A picture cannot be read, or stains of a place differ in size.
        """
        read = self._cut(tiles, tile) if tiles.slides else self._pictures(tiles, tile)
        sizes = {name: picture.shape[:2] for name, (picture, _) in read.items()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {h} x {w}" for name, (h, w) in sizes.items())
            paths = [tiles.pictures[name][tile] for name in read]
            raise DataError(
                f"{paths[0]}: the stains of this tile differ in size ({told} rows x columns; "
                f"{paths[1]}). Stains of a place are cut on one grid at one resolution."
            )
        height, width = next(iter(sizes.values()))
        room = [max(a, b) for a, b in zip((height, width), self.window.shape, strict=True)]
        rng = generator(self.seed, epoch, _WINDOW, index)
        cut = self.window.draw(rng, room) if self.is_training else self.window.middle(room)
        for name, (picture, valid) in read.items():
            picture = normalized(picture, valid, self.normalize[name])
            values = _padded(picture.transpose(2, 0, 1), room, _WHITE)
            cut.write(values, rows.data[name][row])
            cut.write_valid(_padded(valid, room, False), rows.data[key(name, "valid")][row])
            rows.data[key(name, "present")][row] = True
            rows.bytes_decoded += picture.nbytes
            rows.bytes_needed += 3 * cut.extent[0] * cut.extent[1]

    def _pictures(self, tiles: TileSet, tile: int) -> dict[str, tuple[Array, Array]]:
        """Return colours and validity of every stain of a tile."""
        paths = {name: tiles.pictures[name][tile] for name in self.modalities}
        return {name: read_tile_picture(path) for name, path in paths.items() if path}

    def _cut(self, tiles: TileSet, tile: int) -> dict[str, tuple[Array, Array]]:
        """Read a tile out of the slides, at the same place in micrometres in all stains."""
        x, y = tiles.corners[tile].tolist()
        first = self._slide(tiles, next(iter(tiles.slides))).facts.resolution()
        read = {}
        for name, modality in self.modalities.items():
            if name not in tiles.slides:
                continue
            slide = self._slide(tiles, name)
            own = slide.facts.resolution()
            assert modality.mpp_um is not None
            read[name] = slide.read(
                x * first[0] / own[0],
                y * first[1] / own[1],
                self.slides.size_px or max(self.window.shape),
                modality.mpp_um,
            )
        return read

    def _slide(self, tiles: TileSet, name: str) -> Slide:
        path = tiles.slides[name]
        if path not in self._opened:
            self._opened[path] = Slide(path, self.slides.reading, tiles.mpp_um.get(name))
        return self._opened[path]


def _padded(values: Array, room: Sequence[int], fill: int) -> Array:
    """Return (..., H, W) in the middle of a larger array, where it is smaller than `room`."""
    missing = [r - s for r, s in zip(room, values.shape[-2:], strict=True)]
    if not any(missing):
        return values
    sides = [(n // 2, n - n // 2) for n in missing]
    return np.pad(values, [*[(0, 0)] * (values.ndim - 2), *sides], constant_values=fill)
