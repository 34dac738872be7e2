"""Windows of co-registered cubes as a source of the block stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from domainssl.errors import DataError, require
from domainssl.io.raster.grid import Bounds
from domainssl.io.raster.read import MaskRule, Pixels, Target, read_classes, read_pixels
from domainssl.io.raster.time import days
from domainssl.loading.memory import empty
from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows
from domainssl.sources.cube_blocks import Block
from domainssl.sources.cube_options import Layer, finest_m, snap_m
from domainssl.sources.cube_sites import Site, anchors
from domainssl.sources.dates import Dates
from domainssl.sources.items import companions
from domainssl.sources.windows import Cut, Window

__all__ = ["CubeSource"]

_DATES, _WINDOW = 21, 22  # tags that keep the streams of random numbers apart
_ATTEMPTS = 4  # dates looked at before a poor one is taken
Chosen = dict[str, list[int]]


@dataclass(kw_only=True)
class CubeSource:
    """Decodes blocks and cuts the same windows out of every layer.

    Attributes:
        sites: The sites.
        blocks: What is read, in order.
        layers: The layers by name.
        window: Windows, in pixels of the coarsest layer.
        dates: Dates.
        seed: Seed of windows and dates.
        is_training: Draw windows and dates anew in every epoch.
        label_names: Names of the classes by number; None where batches carry no labels.
        has_mask: Deliver the class of every pixel of the finest layer as well.
        locations: Modalities that hold where a window is.
    """

    sites: Sequence[Site]
    blocks: Sequence[Block]
    layers: Mapping[str, Layer]
    window: Window
    dates: Dates
    seed: int
    is_training: bool
    label_names: Sequence[str] | None = None
    has_mask: bool = False
    locations: Sequence[str] = ()
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
            for name, layer in site.layers.items():
                count = self.dates.drawn(name) or len(layer.times)
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
        height, width = (cells * self._snap(site) for cells in self.window.shape)
        around = Bounds(
            min(left for left, _, _ in drawn),
            min(top for _, top, _ in drawn) - height,
            max(left for left, _, _ in drawn) + width,
            max(top for _, top, _ in drawn),
        )
        rng = generator(self.seed, epoch, _DATES, piece.block)
        chosen, pixels, decoded = self._read(site, around, rng)
        rows = Rows(data={}, count=len(piece), bytes_decoded=decoded)
        for name in self.layers:
            self._cut(name, site, pixels[name], chosen[name], around, drawn, rows)
            rows.bytes_needed += pixels[name].bytes_needed
        for name in self.locations:
            places = self._degrees(site, drawn)
            rows.data |= companions(name, places, np.ones(len(places), bool), count=len(places))
        first = self._first[piece.block]
        rows.data["index"] = np.arange(first + piece.start, first + piece.stop)
        rows.data["id"] = [self._name(site, block, i, chosen) for i in numbers]
        if self.label_names is not None:
            rows.data["label"] = self._label(site, around, drawn)
            if self.has_mask:
                rows.data["mask"] = self._mask(site, around, drawn)
        return rows

    def _snap(self, site: Site) -> float:
        return snap_m(self.layers) / site.metres

    def _home(self, block: Block, number: int) -> tuple[int, int]:
        """Return the first row and column of a window without jitter, in its block."""
        down, across = divmod(number, block.across)
        rows, columns = self.window.shape
        return down * rows, across * columns

    def _draw(
        self, at: int, block: Block, site: Site, number: int, epoch: int
    ) -> tuple[float, float, Cut]:
        """Return left and top of a window, and its cut in the block."""
        snap, bounds, home = self._snap(site), block.bounds, self._home(block, number)
        cut = Cut(begin=home, extent=self.window.shape, size=self.window.shape)
        if self.is_training:
            rng = generator(self.seed, epoch, _WINDOW, self._first[at] + number)
            room = int(bounds.height / snap + 1e-6), int(bounds.width / snap + 1e-6)
            cut = self.window.draw(rng, room, home)
        return bounds.left + cut.begin[1] * snap, bounds.top - cut.begin[0] * snap, cut

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
            fraction = min(float(p.valid.mean()) for p in pixels.values())
            if best is None or fraction > best[0]:
                best = (fraction, chosen, pixels)
            if fraction >= (self.dates.min_valid_fraction or 0) or self.dates.is_series:
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
            chosen[name] = [places[i] for i in self.dates.choose(rng, len(places), name)]
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
        for start in starts[rng.permutation(len(starts))]:
            kept = {}
            for name, places in usable.items():
                times = site.layers[name].times[places]
                inside = np.isnat(times) | ((times >= start) & (times < start + span))
                kept[name] = places[inside].tolist()
            if all(len(p) >= self._needed(n) for n, p in kept.items()):
                return kept
        raise DataError(
            f"site {site.name}: no {self.dates.span_days} days hold "
            f"{max(map(self._needed, usable))} dates of every layer. Raise "
            "data.init_args.dates.span_days."
        )

    def _needed(self, name: str) -> int:
        return 1 if self.layers[name].is_static else max(1, self.dates.drawn(name))

    def _pixels(self, site: Site, name: str, dates: Sequence[int], around: Bounds) -> Pixels:
        layer, options = site.layers[name], self.layers[name]
        rule = options.mask.rule if options.mask else MaskRule()
        step = options.gsd_m / site.metres
        target = Target(options.value_unit, options.stored_unit, step, rule)
        parts: list[Pixels] = []
        counts = [len(layer.places[d]) for d in dates]
        places = [place for d in dates for place in layer.places[d]]
        order: list[int] = []
        for file in sorted({f for f, _ in places}):
            rows = [i for i, (f, _) in enumerate(places) if f == file]
            order += rows
            local = [places[i][1] for i in rows]
            parts.append(read_pixels(layer.files[file], local, around, target))
        pixels = parts[0]
        if len(parts) > 1:
            back = np.argsort(order)
            pixels = Pixels(
                np.concatenate([p.values for p in parts])[back],
                np.concatenate([p.valid for p in parts])[back],
                sum(p.bytes_decoded for p in parts),
                sum(p.bytes_needed for p in parts),
            )
        return pixels if max(counts) == 1 else pixels.merged(counts)

    # Windows --------------------------------------------------------------------------------

    def _cut(
        self,
        name: str,
        site: Site,
        pixels: Pixels,
        dates: Sequence[int],
        around: Bounds,
        drawn: Sequence[tuple[float, float, Cut]],
        rows: Rows,
    ) -> None:
        """Write the windows of one layer and its companions."""
        options, layer = self.layers[name], site.layers[name]
        is_series = self.dates.is_series and not options.is_static
        times = snap_m(self.layers) / options.gsd_m
        size = tuple(round(cells * times) for cells in self.window.shape)
        step = options.gsd_m / site.metres
        n, bands = len(drawn), pixels.values.shape[1]
        time = (len(dates),) if is_series else ()
        values = empty((n, *time, bands, *size), torch.float32)
        valid = empty((n, *time, *size), torch.bool)
        geo = []
        dated = slice(None) if is_series else 0
        for i, (left, top, drawn_cut) in enumerate(drawn):
            begin = round((around.top - top) / step), round((left - around.left) / step)
            cut = replace(drawn_cut, begin=begin, extent=size, size=size)
            cut.write(pixels.values[dated], values[i])
            cut.write_valid(pixels.valid[dated], valid[i])
            geo.append({"crs": site.crs, **cut.geo(around.left, around.top, step)})
        stamps = days(layer.times[list(dates)])
        rows.data |= companions(
            name,
            values,
            valid,
            count=n,
            frames=len(dates) if is_series else None,
            dates=stamps if is_series else stamps[0],
            geo=geo,
        )

    def _degrees(
        self, site: Site, drawn: Sequence[tuple[float, float, Cut]]
    ) -> np.ndarray[Any, Any]:
        """Return latitude and longitude of the middle of each window, float32 (n, 2)."""
        height, width = (cells * self._snap(site) for cells in self.window.shape)
        x = [left + width / 2 for left, _, _ in drawn]
        y = [top - height / 2 for _, top, _ in drawn]
        transformer = require("pyproj", "geo").Transformer.from_crs(site.crs, 4326, always_xy=True)
        lon, lat = transformer.transform(x, y)
        lon = (np.asarray(lon) + 180) % 360 - 180  # grids of 0 to 360 degrees
        return np.stack([lat, lon], axis=1).astype(np.float32)

    def _name(self, site: Site, block: Block, number: int, chosen: Chosen) -> str:
        row, column = (cells * self._snap(site) for cells in self._home(block, number))
        left, top = block.bounds.left + column, block.bounds.top - row
        digits = 0 if site.metres == 1.0 else 5
        name = f"{site.name}_{left:.{digits}f}_{top:.{digits}f}"
        if self.dates.is_series:
            return name
        stamps = [site.layers[n].times[d[0]] for n, d in chosen.items()]
        known = [t for t in stamps if not np.isnat(t)]
        return f"{name}_{min(known).astype('datetime64[D]')}" if known else name

    def _label(
        self, site: Site, around: Bounds, drawn: Sequence[tuple[float, float, Cut]]
    ) -> np.ndarray[Any, Any]:
        """Return the most frequent class of each window, -1 where there is none.

        Raises:
            DataError: A window holds a class without a name.
        """
        names = self.label_names or ()
        found = np.full(len(drawn), -1, np.int64)
        if site.labels is None:
            return found
        step = site.labels.bands[0].grid.step
        height, width = (round(c * self._snap(site) / step) for c in self.window.shape)
        classes, known = read_classes(site.labels, around, step)
        for i, (left, top, _) in enumerate(drawn):
            row, column = round((around.top - top) / step), round((left - around.left) / step)
            part = (slice(row, row + height), slice(column, column + width))
            inside = classes[part][known[part]]
            inside = inside[inside >= 0]
            _check_named(inside, names, site.labels.path)
            if inside.size:
                found[i] = np.bincount(inside).argmax()
        return found

    def _mask(
        self, site: Site, around: Bounds, drawn: Sequence[tuple[float, float, Cut]]
    ) -> np.ndarray[Any, Any]:
        """Return the class of each pixel of the finest layer, int64 (n, H, W), -1 for none."""
        finest = finest_m(self.layers)
        times = snap_m(self.layers) / finest
        size = tuple(round(cells * times) for cells in self.window.shape)
        out = np.full((len(drawn), *size), -1, np.int64)
        if site.labels is None:
            return out
        step = finest / site.metres
        classes, known = read_classes(site.labels, around, step)
        classes[~known | (classes < 0)] = -1
        _check_named(classes, self.label_names or (), site.labels.path)
        for i, (left, top, drawn_cut) in enumerate(drawn):
            begin = round((around.top - top) / step), round((left - around.left) / step)
            replace(drawn_cut, begin=begin, extent=size, size=size).write_classes(classes, out[i])
        return out


def _check_named(classes: np.ndarray[Any, Any], names: Sequence[str], path: str) -> None:
    """Refuse classes without a name.

    Raises:
        DataError: Names the map and the class.
    """
    if classes.size and classes.max() >= len(names):
        raise DataError(
            f"{path}: the map holds {classes.max()}, which has no name; classes 0 to "
            f"{len(names) - 1} are {', '.join(names[:8])}. Name it in data.init_args.labels.names, "
            "or set data.init_args.labels.nodata to it if it stands for no class."
        )
