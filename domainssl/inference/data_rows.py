"""One vector per item that a DataModule reads, with its label, date and footprint.

domainssl.embed(backbone, datamodule, "val.parquet", split="val")
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from domainssl.arguments import class_name, plain
from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, DataError
from domainssl.files import write_json
from domainssl.inference.outputs import parquet_path
from domainssl.inference.parted_table import Entries, PartedTable
from domainssl.inference.pooled_items import Asked
from domainssl.inference.tokens import feature_name
from domainssl.io.raster.geoparquet import Footprint
from domainssl.io.raster.grid import Bounds
from domainssl.loading.plan import Piece
from domainssl.loading.reader import PieceReader
from domainssl.loading.source import Loading, Rows, Source
from domainssl.modality import Batch, Modality, collate, key, present_mask

__all__ = ["DataEmbedding", "embedding_of_data", "is_data"]

Array = np.ndarray[Any, Any]
_GROUP = 256  # items of a part, from whole blocks
_NOT_READ = ("loading", "global_batch_size")  # arguments that change no item
_log = logging.getLogger(__name__)


def is_data(source: Any) -> bool:
    """Tell whether something is a DataModule of this library."""
    return hasattr(source, "ordered_dataloader") and hasattr(source, "modalities")


@dataclass(kw_only=True)
class DataEmbedding(PartedTable):
    """The items of one split, in the order of the files.

    Blocks are read ahead by the workers of `loading` while vectors are computed; neither their
    number nor who makes a part changes a vector.

    Attributes:
        source: Where they come from, read as held-out items are: nothing is drawn.
        modalities: Those that backbone and data have.
        classes: Names of the labels by number; empty where they have none.
        has_days: `<m>.dates` count from 1970-01-01.
        loading: Processes that read; those of `--jobs` read themselves.
        order: Keys in the order of this process, to read ahead; empty reads nothing ahead.
    """

    source: Source
    modalities: Mapping[str, Modality]
    classes: Sequence[str] = ()
    has_days: bool = True
    loading: Loading = Loading(workers=0)
    order: Sequence[str] = ()
    _reader: PieceReader | None = field(default=None, init=False, repr=False)
    _coming: list[int] = field(default_factory=list, init=False, repr=False)  # parts being read
    _blocks: Iterator[Rows] = field(default=iter(()), init=False, repr=False)

    def __post_init__(self) -> None:
        self._groups = _grouped(self.source.sizes)
        self._firsts = [0, *accumulate(self.source.sizes)]  # number of the first item, by block
        self.keys = [str(number) for number in range(len(self._groups))]
        self._ask()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "order": (), "_reader": None, "_coming": [], "_blocks": iter(())}

    def release(self) -> None:
        """Remove the folder of parts once the table is there, and end the workers."""
        self._close()
        super().release()

    def _close(self) -> None:
        self._blocks, self._coming = iter(()), []
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _compute(self, number: int, left_out: dict[str, str]) -> Array:
        """Return the vectors of some blocks, NaN of items without a valid value.

        Raises:
            DataError: An item cannot be read, or a worker died.
        """
        try:
            return self._made(number, left_out)
        except Exception as error:
            found = None if self._reader is None else self._reader.death(error)
            self._close()
            if found is None:
                raise
            raise found from error

    def _made(self, number: int, left_out: dict[str, str]) -> Array:
        vectors, rows = [], []
        for batch in self._batches(number, left_out):
            found = self._vectors({n: v for n, v in batch.items() if _is_seen(n, self.modalities)})
            vectors.append(np.where(_shown(batch, self.modalities)[:, None], found, np.nan))
            rows += _rows(batch, self.modalities, self.classes, self.has_days)
        write_json(self._part(str(number)).with_suffix(".rows"), rows)
        dim = self.backbone.embed_dim[self.feature]
        return np.concatenate(vectors) if vectors else np.zeros((0, dim), np.float32)

    def _batches(self, number: int, left_out: dict[str, str]) -> Iterator[Batch]:
        held: list[tuple[Rows, int]] = []  # rows are held until copied: their memory is shared
        self._begin(number)
        for block in self._groups[number]:
            rows = next(self._blocks)
            held += [(rows, row) for row in self._readable(block, rows, left_out)]
            while len(held) >= self.options.batch_size:
                yield self._joined(held[: self.options.batch_size])
                held = held[self.options.batch_size :]
        if held:
            yield self._joined(held)
        self._coming.pop(0)

    def _begin(self, number: int) -> None:
        """Begin to read a part and those that follow it, unless they are being read."""
        if self._coming[:1] == [number]:
            return
        self._close()
        at = self.order.index(str(number)) if self.order else 0
        later = [k for k in self.order[at + 1 :] if not self._part(k).is_file()]
        loading = self.loading if self.order else replace(self.loading, workers=0)
        self._reader = PieceReader(self.source, loading, "embedded")
        self._coming = [number, *map(int, later)]
        sizes = self.source.sizes
        blocks = [Piece(b, 0, sizes[b]) for part in self._coming for b in self._groups[part]]
        self._blocks = self._reader.read(blocks)

    def _joined(self, items: Sequence[tuple[Rows, int]]) -> Batch:
        batch = collate([{n: values[i] for n, values in rows.data.items()} for rows, i in items])
        return batch | {n: batch[n].float() for n in self.modalities if n in batch}

    def _readable(self, block: int, rows: Rows, left_out: dict[str, str]) -> list[int]:
        """Return the items of a block that could be read.

        Raises:
            DataError: One could not, and bad ones are not left out.
        """
        first = self._firsts[block]
        if rows.bad and not self.skip_bad:
            raise DataError(next(iter(rows.bad.values())))
        if rows.bad and not rows.data:
            self._leave_out(f"block {block}", next(iter(rows.bad.values())), left_out)
            return []
        for row, why in rows.bad.items():
            self._leave_out(f"item {first + row}", why, left_out)
        rows.data.setdefault("id", range(first, first + rows.count))
        return [row for row in range(rows.count) if row not in rows.bad]

    def _leave_out(self, name: str, why: str, left_out: dict[str, str]) -> None:
        _log.warning("%s is left out: %s", name, why)
        self._note(name, why, left_out)

    def _entries(self) -> Entries:
        rows = [row for part in self._kept("rows") for row in part]
        if not rows:
            raise DataError(f"{self.target}: none of the items can be read.")
        names = [n for n in ("label", "date") if any(row[n] is not None for row in rows)]
        feet = [_footprint(row["place"]) for row in rows]
        return Entries(
            ids=[row["id"] for row in rows],
            columns={name: [row[name] for row in rows] for name in names},
            footprints=feet if any(feet) else None,
        )


def embedding_of_data(
    backbone: Backbone, data: Any, split: str, output: Path, options: Asked
) -> DataEmbedding:
    """Return the table of a split; the data are prepared and set up where they are not.

    Args:
        backbone: What computes.
        data: A DataModule of this library.
        split: `train`, `val`, `test` or `predict`.
        output: The table.
        options: What is asked for; what is said about files is that of the DataModule.

    Raises:
        ConfigError: There is no such split, or the output is no table.
        WeightsError: The data do not fit the backbone.
    """
    target = parquet_path(output)
    shared = {n: m for n, m in data.modalities.items() if n in backbone.modalities}
    backbone.check(shared or data.modalities)
    try:
        data.source(split)
    except ConfigError:
        data.prepare_data()
        data.setup("fit")
        if split == "test":  # a LightningDataModule of others makes its test data for this stage
            data.setup("test")
    stream = data.ordered_dataloader(split)
    arguments = {n: v for n, v in data.arguments.items() if n not in _NOT_READ}
    identity = json.dumps([plain(arguments), plain(data.identity())], sort_keys=True, default=str)
    return DataEmbedding(
        target=target,
        feature=feature_name(backbone, list(shared), options.feature),
        backbone=backbone,
        options=options.dense,
        facts={
            "backbone": type(backbone).__name__,
            "data": class_name(type(data)),
            "data_sha256": hashlib.sha256(identity.encode()).hexdigest(),
            "split": split,
        },
        source=stream.source,
        loading=stream.loading,
        modalities=shared,
        classes=data.classes or (),
        has_days=not data.days_are_relative,
        is_private=bool(data.withheld),
    )


def _grouped(sizes: Sequence[int]) -> list[list[int]]:
    """Return blocks that follow each other, until they hold enough items."""
    groups: list[list[int]] = []
    count = _GROUP
    for block, size in enumerate(sizes):
        if count >= _GROUP:
            groups.append([])
            count = 0
        groups[-1].append(block)
        count += size
    return groups


def _is_seen(name: str, modalities: Mapping[str, Modality]) -> bool:
    return name.partition(".")[0] in modalities


def _shown(batch: Batch, modalities: Mapping[str, Modality]) -> Array:
    """Return which items have a valid value of some modality, bool (B,)."""
    found = []
    for name in modalities:
        if name in batch:
            there, valid = present_mask(batch, name), batch.get(key(name, "valid"))
            found.append(there & valid.flatten(1).any(1) if isinstance(valid, Tensor) else there)
    shown: Array = np.logical_or.reduce([each.numpy() for each in found])
    return shown


def _rows(
    batch: Batch, modalities: Mapping[str, Modality], classes: Sequence[str], has_days: bool
) -> list[dict[str, Any]]:
    """Return id, label, date and place of the items, as plain data."""
    count = len(batch["id"])
    nothing: list[Any] = [None] * count
    days: list[Any] = nothing
    places: list[Any] = nothing
    for name in reversed([n for n in modalities if n in batch]):  # the first one counts
        dates, geo = batch.get(key(name, "dates")), batch.get(key(name, "geo"))
        if has_days and isinstance(dates, Tensor) and dates.ndim == 1:
            days = [str(np.datetime64(day, "D")) if day > 0 else None for day in dates.tolist()]
        if modalities[name].kind in ("image", "series") and geo is not None:
            size = tuple(batch[name].shape[-2:])
            places = [_place(each, size) or old for each, old in zip(geo, places, strict=True)]
    labels = _labels(batch, classes) or nothing
    return [
        {"id": str(batch["id"][i]), "label": labels[i], "date": days[i], "place": places[i]}
        for i in range(count)
    ]


def _labels(batch: Batch, classes: Sequence[str]) -> list[str | None] | None:
    """Return labels by name, several joined by `;`; None where items have none."""
    given = batch.get("label_multi", batch.get("label"))
    if not isinstance(given, Tensor) or given.ndim > 2:
        return None
    if given.ndim == 2:
        names = [classes[k] if k < len(classes) else str(k) for k in range(given.shape[1])]
        return [";".join(n for n, v in zip(names, row, strict=True) if v == 1) for row in given]
    if given.is_floating_point():
        return None
    return [None if k < 0 else classes[k] if k < len(classes) else str(k) for k in given.tolist()]


def _place(geo: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """Return reference system and rectangle of a window of this size, None where it has none."""
    if not isinstance(geo, Mapping) or not geo.get("crs") or "a" not in geo:
        return None
    crs = geo["crs"]
    corners = [(column, row) for column in (0, size[1]) for row in (0, size[0])]
    xs = [geo["a"] * c + geo["b"] * r + geo["c"] for c, r in corners]
    ys = [geo["d"] * c + geo["e"] * r + geo["f"] for c, r in corners]
    return {
        "crs": f"EPSG:{crs}" if isinstance(crs, int) else str(crs),
        "bounds": [min(xs), min(ys), max(xs), max(ys)],
    }


def _footprint(place: Mapping[str, Any] | None) -> Footprint | None:
    return None if place is None else Footprint(place["crs"], Bounds(*place["bounds"]))
