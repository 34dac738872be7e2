"""Windows of co-registered cubes as a source of the block stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainssl.errors import DataError
from domainssl.io.raster.grid import Bounds
from domainssl.io.raster.read import MaskRule, Pixels, Target, read_classes, read_pixels
from domainssl.io.raster.time import days
from domainssl.loading.memory import empty
from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows
from domainssl.modality import key
from domainssl.sources.cube_blocks import Block
from domainssl.sources.cube_options import DateChoice, Layer, Windows
from domainssl.sources.cube_sites import Site, anchors
from domainssl.sources.windows import Window

__all__ = ["CubeSource"]

_DATES, _WINDOW = 21, 22  # tags that keep the streams of random numbers apart
_ATTEMPTS = 4  # dates looked at before a poor one is taken
Chosen = dict[str, list[int]]


@dataclass
class CubeSource:
    """Decodes blocks and cuts the same windows out of every layer.

    Attributes:
        sites: The sites.
        blocks: What is read, in order.
        layers: The layers by name.
        windows: Windows.
        dates: Dates.
        seed: Seed of windows and dates.
        is_training: Draw windows and dates anew in every epoch.
        labels: Whether batches carry the label of each window.
    """

    sites: Sequence[Site]
    blocks: Sequence[Block]
    layers: Mapping[str, Layer]
    windows: Windows
    dates: DateChoice
    seed: int
    is_training: bool
    labels: bool = False
    _first: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._first = np.cumsum([0, *self.sizes]).tolist()

    @property
    def sizes(self) -> list[int]:
        """Windows per block."""
        return [block.count for block in self.blocks]

    @property
    def num_bytes(self) -> int:
        """Bytes decoded in an epoch, roughly."""
        total = 0.0
        for block in self.blocks:
            site = self.sites[block.site]
            area = block.bounds.width * block.bounds.height
            for layer in site.layers.values():
                count = len(layer.times) if self.dates.take == "all" else max(1, self.dates.views)
                bands = layer.files[0].bands
                total += count * sum(2 * area / band.grid.step**2 for band in bands)
        return int(total)

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Decode one block at its dates and cut the windows asked for."""
        block = self.blocks[piece.block]
        site = self.sites[block.site]
        epoch = epoch if self.is_training else 0
        numbers = range(piece.start, piece.stop)
        drawn = [self._draw(piece.block, block, site, i, epoch) for i in numbers]
        around = Bounds(
            min(left for left, _, _ in drawn),
            min(top for _, top, _ in drawn) - self._side(site),
            max(left for left, _, _ in drawn) + self._side(site),
            max(top for _, top, _ in drawn),
        )
        rng = generator(self.seed, epoch, _DATES, piece.block)
        chosen, pixels, decoded = self._read(site, around, rng)
        rows = Rows({}, len(piece), bytes_decoded=decoded)
        for name in self.layers:
            self._cut(name, site, pixels[name], chosen[name], around, drawn, rows)
            rows.bytes_needed += pixels[name].bytes_needed
        first = self._first[piece.block]
        rows.data["index"] = np.arange(first + piece.start, first + piece.stop)
        rows.data["id"] = [self._name(site, block, i, chosen) for i in numbers]
        if self.labels:
            rows.data["label"] = self._label(site, around, drawn)
        return rows

    def _side(self, site: Site) -> float:
        return self.windows.side_m / site.metres

    def _snap(self, site: Site) -> float:
        return max(layer.gsd_m for layer in self.layers.values()) / site.metres

    def _corner(self, site: Site, block: Block, number: int) -> tuple[float, float]:
        """Return left and top of a window without jitter."""
        down, across = divmod(number, block.across)
        side = self._side(site)
        return block.bounds.left + across * side, block.bounds.top - down * side

    def _draw(
        self, at: int, block: Block, site: Site, number: int, epoch: int
    ) -> tuple[float, float, Window]:
        """Return left and top of a window, and how it is laid down (place and size unused)."""
        left, top = self._corner(site, block, number)
        if not self.is_training:
            return left, top, Window(0, 0, 1, 1)
        rng = generator(self.seed, epoch, _WINDOW, self._first[at] + number)
        side, snap = self._side(site), self._snap(site)
        reach = int(side / snap / 2 + 1e-6)
        shifts = rng.integers(-reach, reach + 1, 2)  # drawn even if unused
        flips, turns = rng.integers(0, 2, 2), int(rng.integers(0, 4))
        if self.windows.jitter:
            left = _moved(left, int(shifts[0]), snap, block.bounds.left, block.bounds.right - side)
            top = _moved(top, int(shifts[1]), snap, block.bounds.bottom + side, block.bounds.top)
        windows = self.windows
        laid = Window(
            0, 0, 1, 1,
            bool(flips[0]) and windows.flips,
            bool(flips[1]) and windows.flips,
            turns if windows.quarter_turns else 0,
        )  # fmt: skip
        return left, top, laid

    # Dates ----------------------------------------------------------------------------------

    def _read(
        self, site: Site, around: Bounds, rng: np.random.Generator
    ) -> tuple[Chosen, dict[str, Pixels], int]:
        """Choose dates and read them; with one date, the first drawn that shows enough.

        The last number counts the bytes decoded, those of dates passed over included.
        """
        best: tuple[float, Chosen, dict[str, Pixels]] | None = None
        decoded = 0
        for chosen in self._choices(site, rng):
            pixels = {n: self._pixels(site, n, chosen[n], around) for n in self.layers}
            decoded += sum(p.bytes_decoded for p in pixels.values())
            share = min(float(p.valid.mean()) for p in pixels.values())
            if best is None or share > best[0]:
                best = (share, chosen, pixels)
            if share >= self.dates.least_valid or self.dates.is_series:
                break
        assert best is not None  # sites without a usable date were left out
        return best[1], best[2], decoded

    def _choices(self, site: Site, rng: np.random.Generator) -> list[Chosen]:
        """Return the dates to try, in order."""
        if not self.dates.is_series:
            combinations = anchors(site, self.dates)
            kept = self._in_span(site, rng)
            inside = [c for c in combinations if all(c[n] in kept[n] for n in c)]
            combinations = inside or combinations
            order = rng.permutation(len(combinations))[:_ATTEMPTS]
            return [{n: [d] for n, d in combinations[i].items()} for i in order]
        kept = self._in_span(site, rng)
        chosen = {}
        for name, places in kept.items():
            if self.layers[name].is_static:
                chosen[name] = [places[0]]
                continue
            if self.dates.views:
                drawn = rng.choice(len(places), self.dates.views, replace=False)
                places = [places[i] for i in sorted(drawn)]
            if self.dates.most and len(places) > self.dates.most:
                at = np.linspace(0, len(places) - 1, self.dates.most).round().astype(int)
                places = [places[i] for i in at]
            chosen[name] = places
        return [chosen]

    def _in_span(self, site: Site, rng: np.random.Generator) -> Chosen:
        """Return the usable dates of each layer inside one drawn temporal window."""
        usable = {n: self.dates.usable(layer.times) for n, layer in site.layers.items()}
        if self.dates.span_days is None:
            return {n: places.tolist() for n, places in usable.items()}
        known = [site.layers[n].times[p] for n, p in usable.items()]
        known = [t[~np.isnat(t)] for t in known]
        starts = np.concatenate([t for t in known if len(t)] or [np.empty(0, "datetime64[s]")])
        span = np.timedelta64(self.dates.span_days, "D")
        least = max(1, self.dates.views)
        for start in starts[rng.permutation(len(starts))]:
            kept = {}
            for name, places in usable.items():
                times = site.layers[name].times[places]
                inside = np.isnat(times) | ((times >= start) & (times < start + span))
                kept[name] = places[inside].tolist()
            if all(len(p) >= (1 if self.layers[n].is_static else least) for n, p in kept.items()):
                return kept
        raise DataError(
            f"site {site.name}: no {self.dates.span_days} days hold {least} dates of every layer. "
            "Raise data.init_args.dates.span_days."
        )

    def _pixels(self, site: Site, name: str, dates: Sequence[int], around: Bounds) -> Pixels:
        layer, options = site.layers[name], self.layers[name]
        rule = options.mask.rule if options.mask else MaskRule()
        step = options.gsd_m / site.metres
        target = Target(options.value_unit, options.stored_unit, step, rule)
        parts: list[Pixels] = []
        places = [layer.places[d] for d in dates]
        order: list[int] = []
        for file in sorted({f for f, _ in places}):
            rows = [i for i, (f, _) in enumerate(places) if f == file]
            order += rows
            local = [places[i][1] for i in rows]
            parts.append(read_pixels(layer.files[file], local, around, target))
        if len(parts) == 1:
            return parts[0]
        back = np.argsort(order)
        return Pixels(
            np.concatenate([p.values for p in parts])[back],
            np.concatenate([p.valid for p in parts])[back],
            sum(p.bytes_decoded for p in parts),
            sum(p.bytes_needed for p in parts),
        )

    # Windows --------------------------------------------------------------------------------

    def _cut(
        self,
        name: str,
        site: Site,
        pixels: Pixels,
        dates: Sequence[int],
        around: Bounds,
        drawn: Sequence[tuple[float, float, Window]],
        rows: Rows,
    ) -> None:
        """Write the windows of one layer and its companions."""
        options, layer = self.layers[name], site.layers[name]
        is_series = self.dates.is_series and not options.is_static
        size = self.windows.pixels(options.gsd_m, name)
        step = options.gsd_m / site.metres
        n, bands = len(drawn), pixels.values.shape[1]
        time = (len(dates),) if is_series else ()
        values = empty((n, *time, bands, size, size), torch.float32)
        valid = empty((n, *time, size, size), torch.bool)
        geo = []
        for i, (left, top, laid) in enumerate(drawn):
            window = Window(
                round((around.top - top) / step),
                round((left - around.left) / step),
                size,
                size,
                laid.is_flipped_y,
                laid.is_flipped_x,
                laid.turns,
            )
            _write(window, pixels, values[i], valid[i], is_series)
            geo.append({"crs": site.crs, **window.geo(around.left, around.top, step)})
        stamps = days(layer.times[list(dates)])
        data = rows.data
        data[name], data[key(name, "valid")] = values, valid
        data[key(name, "present")] = np.ones(n, bool)
        if is_series:
            data[key(name, "dates")] = np.tile(stamps, (n, 1))
            data[key(name, "frames")] = np.ones((n, *time), bool)
        else:
            data[key(name, "dates")] = np.full(n, stamps[0], np.int32)
        data[key(name, "geo")] = geo

    def _name(self, site: Site, block: Block, number: int, chosen: Chosen) -> str:
        left, top = self._corner(site, block, number)
        digits = 0 if site.metres == 1.0 else 5
        name = f"{site.name}_{left:.{digits}f}_{top:.{digits}f}"
        if self.dates.is_series:
            return name
        stamps = [site.layers[n].times[d[0]] for n, d in chosen.items()]
        known = [t for t in stamps if not np.isnat(t)]
        return f"{name}_{min(known).astype('datetime64[D]')}" if known else name

    def _label(
        self, site: Site, around: Bounds, drawn: Sequence[tuple[float, float, Window]]
    ) -> np.ndarray[Any, Any]:
        """Return the most frequent class of each window, -1 where there is none."""
        found = np.full(len(drawn), -1, np.int64)
        if site.labels is None:
            return found
        step = site.labels.bands[0].grid.step
        side = round(self._side(site) / step)
        classes, known = read_classes(site.labels, around, step)
        for i, (left, top, _) in enumerate(drawn):
            row, column = round((around.top - top) / step), round((left - around.left) / step)
            part = (slice(row, row + side), slice(column, column + side))
            inside = classes[part][known[part]]
            inside = inside[inside >= 0]
            if inside.size:
                found[i] = np.bincount(inside).argmax()
        return found


def _moved(place: float, steps: int, snap: float, low: float, high: float) -> float:
    """Shift a place by whole steps, as far as the limits allow."""
    least = -int((place - low) / snap + 1e-6)
    most = int((high - place) / snap + 1e-6)
    return place + min(max(steps, least), most) * snap


def _write(window: Window, pixels: Pixels, values: Tensor, valid: Tensor, is_series: bool) -> None:
    window.write(pixels.values if is_series else pixels.values[0], values)
    window.write_valid(pixels.valid if is_series else pixels.valid[0], valid)
