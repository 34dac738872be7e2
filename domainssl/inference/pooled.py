"""One vector per item, in one table: items in groups, each a part that survives a kill.

An item that is larger than a window is cut into windows side by side from its first corner; its
vector is the mean of theirs, weighted by the share of each that was measured.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock

from domainssl.backbones.base import Backbone
from domainssl.backbones.card import weights_digest
from domainssl.errors import ConfigError, DataError
from domainssl.files import PART, read_json, write_json, write_whole
from domainssl.inference.dense import DenseOptions
from domainssl.inference.outputs import beside, refuse_other, repeated
from domainssl.inference.preview import write_items
from domainssl.inference.tokens import autocast_context
from domainssl.io.raster.geoparquet import Footprint, vector_table
from domainssl.modality import Batch, batch_to

__all__ = ["PooledEmbedding", "PooledItem"]

Array = np.ndarray[Any, Any]
_GROUP = 256  # items of a part
_UNTOLD = "cannot be read; the call that left it out said why"
_log = logging.getLogger(__name__)


class PooledItem(Protocol):
    """What a vector is of."""

    @property
    def name(self) -> str:
        """What its row is called."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the vector rests on: plain data without paths and names of persons."""

    @property
    def when_empty(self) -> str:
        """What is said of an item that shows nothing; empty says nothing."""

    def batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield weight and batch, of one item, of every window that shows something."""


@dataclass(kw_only=True)
class PooledEmbedding:
    """One vector per item: groups that are made one by one (`pieces.Buildable`).

    Attributes:
        target: The Parquet file.
        items: The items.
        feature: Which feature is taken.
        columns: Further columns of the table.
        footprints: Where items lie on the earth; None for those that lie nowhere.
        group: Items of a part, few where each takes long; None is 256.
        backbone: What computes.
        options: How; halo and dtype of windows do not count here.
        facts: Written into the file.
        skip_bad: Give items that cannot be read a vector of NaN, and list them.
        is_private: Keep the reasons, which name files, out of what is written: they are logged.
    """

    target: Path
    items: Sequence[PooledItem]
    feature: str
    backbone: Backbone
    options: DenseOptions
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    footprints: Sequence[Footprint] | None = None
    group: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    skip_bad: bool = False
    is_private: bool = False

    def __post_init__(self) -> None:
        twice = repeated(item.name for item in self.items)
        if twice:
            raise ConfigError(
                f"embed: several inputs are called {', '.join(twice[:4])}. Give them other names "
                "in a manifest (column id)."
            )
        self._size = self.group or _GROUP
        count = -(-len(self.items) // self._size)
        self.keys: Sequence[str] = [str(number) for number in range(count)]
        self._request: dict[str, Any] = json.loads(
            json.dumps(
                {
                    **self.facts,
                    "weights_sha256": weights_digest(self.backbone),
                    "feature": self.feature,
                    "dtype": self.options.dtype,
                    "computed_in": self.options.autocast or "float32",
                    "items": [[item.name, item.facts] for item in self.items],
                }
            )
        )

    @property
    def folder(self) -> Path:
        """Parts, until all are there."""
        return self.target.with_name(f".{self.target.name}{PART}embed")

    @property
    def _record(self) -> Path:
        return beside(self.target, "json")

    def claim(self, *, restart: bool = False) -> None:
        """Check that nothing else lies where the table goes, or remove it.

        Raises:
            ConfigError: A table of something else lies there, complete or not.
            DataError: Nothing can be written there.
        """
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._record.is_file():
                self._record.unlink()
                self.target.unlink(missing_ok=True)
        for record in (self._record, self.folder / "request.json"):
            found = read_json(record) if record.is_file() else self._request
            found = {name: value for name, value in found.items() if name != "left_out"}
            refuse_other(self.target, found, self._request)
        if self.target.exists() and not self._record.is_file():
            raise ConfigError(
                f"{self.target}: lies there and was not written by embed. Choose another --output."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "request.json", self._request)
        except OSError as error:
            raise DataError(
                f"{self.target}: cannot be written ({error.strerror or error}). Choose another "
                "--output."
            ) from error

    def release(self) -> None:
        """Remove the folder of parts once the table is there."""
        if self._record.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)

    def is_ready(self, key: str) -> bool:
        """Tell whether a group is done; while the table lacks, the last one is not."""
        if self._record.is_file():
            return True
        if not self._part(key).is_file():
            return False
        return key != self.keys[-1] or not self._is_complete()

    def _is_complete(self) -> bool:
        """Tell whether all groups are done; the last ones are made last."""
        return all(self._part(key).is_file() for key in reversed(self.keys))

    def _part(self, key: str) -> Path:
        return self.folder / f"{key}.npy"

    def left_out(self) -> dict[str, str]:
        """Return why items were left out, by name."""
        if self._record.is_file():
            return dict(read_json(self._record).get("left_out", {}))
        parts = [self._part(key).with_suffix(".json") for key in self.keys]
        return {n: why for part in parts if part.is_file() for n, why in read_json(part).items()}

    def make(self, key: str) -> None:
        """Compute the vectors of a group; the last one writes the table.

        Raises:
            DataError: An item cannot be read, or the table not written.
        """
        if not self._part(key).is_file():
            content, left_out = io.BytesIO(), dict[str, str]()
            np.save(content, self._compute(int(key), left_out), allow_pickle=False)
            if left_out:
                write_json(self._part(key).with_suffix(".json"), left_out)
            write_whole(self._part(key), content.getbuffer())
        if self._is_complete():
            with FileLock(self.folder / "lock"):
                if not self._record.is_file():
                    self._join()

    def _join(self) -> None:
        vectors = np.concatenate([np.load(self._part(k), allow_pickle=False) for k in self.keys])
        facts = {name: value for name, value in self._request.items() if name != "items"}
        content = vector_table(
            [item.name for item in self.items],
            vectors,
            footprints=self.footprints,
            columns=self.columns,
            facts=facts,
            dtype=self.options.dtype,
        )
        try:
            write_whole(self.target, content)
            names = [item.name for item in self.items]
            write_items(beside(self.target, "png"), vectors, names)
            left_out = self.left_out()
            write_json(self._record, self._request | ({"left_out": left_out} if left_out else {}))
        except OSError as error:
            raise DataError(
                f"{self.target}: cannot be written ({error.strerror or error}). Make room; the "
                "same command goes on."
            ) from error

    def _compute(self, number: int, left_out: dict[str, str]) -> Array:
        """Return the vectors of a group, float32 (N, E), NaN of items without a valid pixel.

        Items that are left out are NaN too, and noted in `left_out`.
        """
        first = number * self._size
        members = range(first, min(first + self._size, len(self.items)))
        dim = self.backbone.embed_dim[self.feature]
        sums = np.zeros((len(members), dim), np.float64)
        weights = np.zeros(len(members), np.float64)
        self.backbone.to(self.options.device).eval()
        for rows, counts, batch in _batches(
            self._windows(members, left_out), self.options.batch_size
        ):
            moved = batch_to(batch, self.options.device)
            with (
                torch.inference_mode(),
                autocast_context(self.options.device, self.options.autocast),
            ):
                found = self.backbone(moved).pooled[self.feature].float().cpu().numpy()
            at = [row - first for row in rows]
            np.add.at(sums, at, found * np.asarray(counts)[:, None])
            np.add.at(weights, at, counts)
        weights[[self.items[member].name in left_out for member in members]] = 0
        sums[weights == 0] = np.nan
        with np.errstate(invalid="ignore", divide="ignore"):
            return (sums / weights[:, None]).astype(np.float32)

    def _windows(
        self, members: Sequence[int], left_out: dict[str, str]
    ) -> Iterator[tuple[int, float, Batch]]:
        """Yield item, weight and batch of every window that shows something."""
        for member in members:
            item, shown = self.items[member], 0
            try:
                for weight, batch in item.batches():
                    shown += 1
                    yield member, weight, batch
                if not shown and item.when_empty:
                    left_out[item.name] = item.when_empty
            except DataError as error:
                if not self.skip_bad:
                    raise
                left_out[item.name] = str(error)
                if self.is_private:
                    _log.warning("%s is left out: %s", item.name, error)
                    left_out[item.name] = _UNTOLD


def _batches(
    windows: Iterator[tuple[int, float, Batch]], size: int
) -> Iterator[tuple[list[int], list[float], Batch]]:
    """Join windows of one kind that follow each other."""
    held: list[tuple[int, float, Batch]] = []
    for one in windows:
        if held and (len(held) == size or _kind(one[2]) != _kind(held[0][2])):
            yield _joined(held)
            held = []
        held.append(one)
    if held:
        yield _joined(held)


def _kind(batch: Batch) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(values.shape)) for name, values in batch.items()]


def _joined(held: list[tuple[int, float, Batch]]) -> tuple[list[int], list[float], Batch]:
    names = held[0][2]
    batch = {name: torch.cat([one[2][name] for one in held]) for name in names}
    return [one[0] for one in held], [one[1] for one in held], batch
