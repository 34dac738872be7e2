"""SSL4EO-S12 locations as a source of the block stream: one block is one file and its dates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from domainssl.errors import ConfigError, DataError
from domainssl.io.ssl4eo.facts import product
from domainssl.io.ssl4eo.labels import Labels
from domainssl.io.ssl4eo.land_cover import read_land_cover
from domainssl.io.ssl4eo.layout import Catalogue, Group
from domainssl.io.ssl4eo.read import Block, check_same, read
from domainssl.io.storage.scratch import Scratch
from domainssl.loading.memory import empty
from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows
from domainssl.modality import key
from domainssl.sources.dates import Dates
from domainssl.sources.items import companions
from domainssl.sources.windows import Cut, Window

__all__ = ["SSL4EOSource"]

_DATES, _WINDOW = 11, 12  # tags that keep the streams of random numbers apart
_STEP_M = 10.0
_TYPES = {"i2": torch.int16, "u1": torch.uint8, "f4": torch.float32}


@dataclass(kw_only=True)
class SSL4EOSource:
    """Reads groups of co-registered locations and cuts the same window out of every product.

    Attributes:
        catalogue: The files.
        window: Windows, in pixels.
        dates: Dates.
        seed: Seed of windows and dates.
        is_training: Draw windows; otherwise the centre, with the dates of epoch 0.
        labels: Labels by location, if there are any.
        land_cover: Groups of the product LULC by key, where batches carry its map as `mask`: that
            of the last of the dates chosen.
        dn_offset: What the stored Sentinel-2 values carry.
        bands: Bands of each modality in the order of delivery; all of those that it leaves out.
    """

    catalogue: Catalogue
    window: Window
    dates: Dates
    seed: int
    is_training: bool
    labels: Labels | None = None
    land_cover: Mapping[str, Group] | None = None
    dn_offset: Literal[0, 1000, "auto"] = "auto"
    bands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _first: list[int] = field(init=False, repr=False)
    _scratch: Scratch = field(init=False, repr=False, default_factory=Scratch)

    def __post_init__(self) -> None:
        self._check_dates(self.catalogue.dates)
        if self.is_training:
            where = f"{self.catalogue.root} ({self.catalogue.split})"
            self.window.check(self.catalogue.size, where)
        self._first = np.cumsum([0, *self.sizes]).tolist()

    def _check_dates(self, available: int) -> None:
        """Refuse dates that the files do not have."""
        most = max((self.dates.drawn(), *(place + 1 for place in self.dates.places)))
        if most > available:
            raise ConfigError(
                f"data.init_args.dates: {most} dates are needed, the files hold {available}; "
                f"positions are 0 to {available - 1}."
            )

    @property
    def sizes(self) -> list[int]:
        """Locations per group."""
        return [group.count for group in self.catalogue.groups]

    @property
    def num_bytes(self) -> int:
        """Bytes decoded in an epoch, roughly."""
        height, width = self.catalogue.size
        per_pixel = 0
        for name in self.catalogue.products.values():
            per_pixel += product(name).dtype.itemsize * len(product(name).bands)
        dates = self.dates.drawn() or len(self.dates.places) or self.catalogue.dates
        return self.catalogue.count * height * width * dates * per_pixel

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Decode the chosen dates of one group and cut a window out of each location."""
        group = self.catalogue.groups[piece.block]
        dates = self.dates.choose(generator(self.seed, epoch, _DATES, piece.block), group.dates)
        writer = _Writer(self, piece, dates, epoch)
        try:
            writer.write(*self._read(group, dates, piece.start, piece.stop), 0)
        except DataError:
            if group.release == "A":
                raise  # a chunk holds all locations: they are lost together
            writer.reset()
            for i in range(len(piece)):
                at = piece.start + i
                try:
                    writer.write(*self._read(group, dates, at, at + 1), i)
                except DataError as error:
                    writer.rows.bad[i] = str(error)
        return writer.finish()

    def _read(
        self, group: Group, dates: list[int], start: int, stop: int
    ) -> tuple[dict[str, Block], np.ndarray[Any, Any] | None]:
        """Read all products of some locations, and check that they belong together."""
        blocks = {
            name: read(
                group,
                name,
                dates,
                slice(start, stop),
                mask_clouds=self.dates.mask_clouds,
                dn_offset=self.dn_offset,
                in_parts=True,  # only windows are checked and freed of the offset
                scratch=self._scratch,
            )
            for name in group.products
        }
        check_same(blocks)
        for block in blocks.values():
            if block.values.shape[-2:] != group.size:
                raise DataError(
                    f"{block.file}: array 'bands' has {block.values.shape[-2:]} pixels, its "
                    f"partner {group.size}. Co-registered products have one grid."
                )
        if self.land_cover is None:
            return blocks, None
        return blocks, self._classes(group, dates[-1], slice(start, stop), block)

    def _classes(
        self, group: Group, date: int, locations: slice, block: Block
    ) -> np.ndarray[Any, Any]:
        """Read the map of land cover, (n, Y, X), and check that it belongs to `block`."""
        partner = (self.land_cover or {}).get(group.key)
        if partner is None:
            raise DataError(
                f"{block.file}: its partner of the product LULC is not there. Download it, or set "
                "data.init_args.labels.mask: false."
            )
        classes, ids = read_land_cover(partner, date, locations)
        if ids != block.ids or classes.shape[1:] != group.size:
            raise DataError(
                f"{partner.files['mask']}: holds {ids[:2]} of {classes.shape[1:]} pixels, its "
                f"partner {block.file} {block.ids[:2]} of {group.size}. Download both again."
            )
        return classes

    def cut(self, epoch: int, index: int, size: tuple[int, int]) -> Cut:
        """Return the cut of one location, the same for all its products."""
        if not self.is_training:
            return self.window.middle(size)
        return self.window.draw(generator(self.seed, epoch, _WINDOW, index), size)

    def places(self, name: str) -> list[int] | None:
        """Return where the bands of a modality lie among those of its product; None for all."""
        there = product(self.catalogue.products[name]).bands
        asked = tuple(self.bands.get(name, there))
        return None if asked == there else [there.index(band) for band in asked]

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of delivered values: the stored one unless windows are resized."""
        if self.is_training:
            is_resized = not self.window.is_fixed
        else:
            is_resized = self.window.middle(self.catalogue.size).is_resized
        if is_resized:
            return torch.float32
        facts = product(self.catalogue.products[name])
        if facts.value_unit == "db" and self.catalogue.release == "A":
            return torch.float16  # tars store dB as float16 or float32
        return _TYPES[facts.dtype.str[1:]]


class _Writer:
    """Fills the arrays of one piece."""

    def __init__(self, source: SSL4EOSource, piece: Piece, dates: list[int], epoch: int) -> None:
        self.source, self.dates, self.epoch = source, dates, epoch
        self.first = source._first[piece.block] + piece.start
        n, size = len(piece), source.window.shape
        time = (len(dates),) if source.dates.is_series else ()
        self.rows = Rows(data={}, count=n)
        self.out: dict[str, tuple[Tensor, Tensor]] = {}
        self.places: dict[str, list[int] | None] = {}
        data = self.rows.data
        for name, product_name in source.catalogue.products.items():
            places = self.places[name] = source.places(name)
            bands = len(product(product_name).bands if places is None else places)
            values = empty((n, *time, bands, *size), source.dtype(name))
            valid = empty((n, *time, *size), torch.bool)
            data |= companions(
                name,
                values,
                valid,
                count=n,
                frames=len(dates) if time else None,
                dates=0,
                geo=[None] * n,
            )
            self.out[name] = (values, valid) if time else (values[:, None], valid[:, None])
        data["index"] = np.arange(self.first, self.first + n)
        data["id"] = [""] * n
        if source.labels is not None:
            data["label"] = np.full(n, -1, np.int64)
        if source.land_cover is not None:
            data["mask"] = np.full((n, *size), -1, np.int64)

    def write(
        self, blocks: dict[str, Block], classes: np.ndarray[Any, Any] | None, at: int
    ) -> None:
        """Write read locations to the rows from `at` on."""
        source, data = self.source, self.rows.data
        some = next(iter(blocks.values()))
        count = len(some.ids)
        most = max(block.values[0].size for block in blocks.values())
        scratch = source._scratch.empty("/resize", (most,), np.dtype(np.float32))
        cuts = [
            source.cut(self.epoch, self.first + at + i, some.values.shape[-2:])
            for i in range(count)
        ]
        whereabouts = [next(b for b in blocks.values() if b.present[i]) for i in range(count)]
        for name, block in blocks.items():
            values, valid = self.out[name]
            places = self.places[name]
            days: Any = data[key(name, "dates")]
            data[key(name, "present")][at : at + count] = block.present
            days[at : at + count] = block.dates if source.dates.is_series else block.dates[:, 0]
            for i, cut in enumerate(cuts):
                pixels, mask = block.part(i, *cut.slices)
                if places is not None:
                    pixels = pixels[:, places]
                part = cut.of_part()
                part.write(pixels, values[at + i], int(block.offset[i]), scratch)
                part.write_valid(mask & block.present[i], valid[at + i])
                there = block if block.present[i] else whereabouts[i]
                data[key(name, "geo")][at + i] = {
                    "crs": int(there.crs[i]),
                    "lat": float(there.lat[i]),
                    "lon": float(there.lon[i]),
                    **cut.geo(float(there.x0[i]), float(there.y0[i]), _STEP_M),
                }
            self.rows.bytes_decoded += block.bytes_decoded
            self.rows.bytes_needed += block.bytes_needed
        if classes is not None:
            for i, cut in enumerate(cuts):
                cut.write_classes(classes[i], data["mask"][at + i])
        self._write_names(some, at)

    def _write_names(self, block: Block, at: int) -> None:
        data, source = self.rows.data, self.source
        in_tars = source.catalogue.release == "TerraMesh"
        names = block.ids if in_tars else block.location_ids
        data["id"][at : at + len(names)] = (
            names
            if source.dates.is_series or in_tars
            else [f"{name}_{self.dates[0]}" for name in names]
        )
        if source.labels is not None:
            data["label"][at : at + len(names)] = source.labels.of(block.ids, block.location_ids)

    def reset(self) -> None:
        """Forget the cost of an attempt that failed."""
        self.rows.bytes_decoded = self.rows.bytes_needed = 0

    def finish(self) -> Rows:
        """Return the rows; if none is good, without arrays."""
        if len(self.rows.bad) == self.rows.count:
            self.rows.data = {}
        return self.rows
