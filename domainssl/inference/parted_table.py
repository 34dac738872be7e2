"""A Parquet table of vectors that is made in parts, each of which survives a kill."""

from __future__ import annotations

import io
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from domainssl.backbones.base import Backbone
from domainssl.backbones.card import weights_digest
from domainssl.errors import ConfigError, unwritable
from domainssl.files import PART, read_json, remove_rests, write_json, write_whole
from domainssl.inference.dense import DenseOptions
from domainssl.inference.finished import plain_request, tell_lost
from domainssl.inference.outputs import beside, read_record, refuse_other
from domainssl.inference.preview import write_items
from domainssl.inference.tokens import autocast_context
from domainssl.io.raster.geoparquet import Footprint, vector_table
from domainssl.modality import Batch, batch_to

__all__ = ["Entries", "PartedTable", "UNTOLD"]

UNTOLD = "cannot be read; the log of the call that left it out says why"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Entries:
    """What the rows of a table are of.

    Attributes:
        ids: What they are called.
        columns: Further columns.
        footprints: Where items lie on the earth; None for those that lie nowhere.
    """

    ids: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    footprints: Sequence[Footprint | None] | None = None


@dataclass(kw_only=True)
class PartedTable(ABC):
    """One vector per item: parts that are made one by one (`pieces.Buildable`).

    A subclass sets `keys`, and implements `_compute` and `_entries`.

    Attributes:
        target: The Parquet file.
        feature: Which feature is taken.
        backbone: What computes.
        options: How; halo and dtype of windows do not count here.
        facts: Written into the file.
        skip_bad: Leave items out that cannot be read, and list them.
        is_private: Keep the reasons, which name files, out of what is written: they are logged.
    """

    target: Path
    feature: str
    backbone: Backbone
    options: DenseOptions
    facts: Mapping[str, Any] = field(default_factory=dict)
    skip_bad: bool = False
    is_private: bool = False
    keys: Sequence[str] = field(init=False)
    _request: dict[str, Any] = field(init=False, repr=False)
    _told: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def _compute(self, number: int, left_out: dict[str, str]) -> Array:
        """Return the vectors of a part, float32 (N, E); note in `left_out` what is not there."""

    @abstractmethod
    def _entries(self) -> Entries:
        """Return what the rows of all parts are of; called when all parts are there."""

    def _note(self, name: str, why: str, left_out: dict[str, str]) -> None:
        """Note an item that cannot be read: for this call, and in what is written."""
        self._told[name] = why
        left_out[name] = UNTOLD if self.is_private else why

    def _is_final(self, why: str) -> bool:
        """Tell whether an item stays left out, however often it is read."""
        return False

    def _ask(self, **more: Any) -> None:
        """Keep what the table is made from, so that another one is told from it."""
        request = {
            **self.facts,
            "weights_sha256": weights_digest(self.backbone),
            "feature": self.feature,
            "dtype": self.options.dtype,
            "computed_in": self.options.autocast or "float32",
            **more,
        }
        self._request = json.loads(json.dumps(request))

    def _vectors(self, batch: Batch) -> Array:
        """Return the feature of a batch, float32 (B, E)."""
        moved = batch_to(batch, self.options.device)
        with torch.inference_mode(), autocast_context(self.options.device, self.options.autocast):
            found: Array = self.backbone(moved).pooled[self.feature].float().cpu().numpy()
        return found

    def try_again(self, keys: Sequence[str]) -> None:
        """Forget the parts of an earlier call in which something could not be read.

        Args:
            keys: Parts of this call.
        """
        bad = []
        for key in keys:
            notes = self._part(key).with_suffix(".json")
            if notes.is_file() and not all(map(self._is_final, read_json(notes).values())):
                bad.append(key)
        if not bad:
            return
        write_whole(self._again, b"")
        self._record.unlink(missing_ok=True)
        for key in bad:
            self._part(key).unlink(missing_ok=True)
            self._part(key).with_suffix(".json").unlink()

    @property
    def _again(self) -> Path:
        """Marks a table that is there while some of its parts are made again."""
        return self.folder / "again"

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
            StorageError: Nothing can be written there.
        """
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._record.is_file():
                self._record.unlink()
                self.target.unlink(missing_ok=True)
        for record in (self._record, self.folder / "request.json"):
            found = read_record(record) if record.is_file() else self._request
            refuse_other(self.target, plain_request(found), self._request)
        if self._record.is_file() and not self.target.exists():
            tell_lost(self.target, [])
            self._record.unlink()
        is_ours = (
            self._record.is_file()
            or self._again.is_file()
            or (  # or a call ended between the table and its record
                (self.folder / "request.json").is_file() and self._is_complete()
            )
        )
        if self.target.exists() and not is_ours:
            raise ConfigError(
                f"{self.target}: lies there and was not written by embed. Choose another --output."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "request.json", self._request)
        except OSError as error:
            raise unwritable(self.target, error) from error

    def release(self) -> None:
        """Remove the folder of parts once the table is there, and all that can be read in it."""
        if self._record.is_file() and all(map(self._is_final, self.left_out().values())):
            shutil.rmtree(self.folder, ignore_errors=True)
            remove_rests([self.target])

    def is_ready(self, key: str) -> bool:
        """Tell whether a part is done; while the table lacks, the last one is not."""
        if self._record.is_file():
            return True
        if not self._part(key).is_file():
            return False
        return key != self.keys[-1] or not self._is_complete()

    def _is_complete(self) -> bool:
        """Tell whether all parts are done; the last ones are made last."""
        return all(self._part(key).is_file() for key in reversed(self.keys))

    def _part(self, key: str) -> Path:
        return self.folder / f"{key}.npy"

    def left_out(self) -> dict[str, str]:
        """Return why items were left out, by name."""
        found: dict[str, str]
        if self._record.is_file():
            found = read_json(self._record).get("left_out", {})
        else:
            found = {n: why for part in self._kept("json") for n, why in part.items()}
        return {name: self._told.get(name, why) for name, why in found.items()}

    def _kept(self, ending: str) -> Iterator[Any]:
        """Yield what lies beside the parts that have it, in order."""
        for key in self.keys:
            path = self._part(key).with_suffix(f".{ending}")
            if path.is_file():
                yield read_json(path)

    def make(self, key: str) -> None:
        """Compute the vectors of a part; the last one writes the table.

        Raises:
            DataError: An item cannot be read, or the table not written.
        """
        if not self._part(key).is_file():
            content, left_out = io.BytesIO(), dict[str, str]()
            self.backbone.to(self.options.device).eval()
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
        entries = self._entries()
        content = vector_table(
            entries.ids,
            vectors,
            footprints=entries.footprints,
            columns=entries.columns,
            facts=facts,
            dtype=self.options.dtype,
        )
        try:
            write_whole(self.target, content)
            write_items(beside(self.target, "png"), vectors, list(entries.ids))
            left_out = {n: why for part in self._kept("json") for n, why in part.items()}
            write_json(self._record, self._request | ({"left_out": left_out} if left_out else {}))
        except OSError as error:
            raise unwritable(self.target, error) from error
