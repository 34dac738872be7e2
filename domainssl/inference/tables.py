"""What a task says of whole items: one row each, kept one by one, in one table at the end.

Rasters and exams larger than a window are cut into windows side by side; probabilities and numbers
are the means over them, weighted by their valid pixels. Slides are bags of the features of tiles:
where the head attends, the weights of the tiles are written beside the table.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from domainssl.backbones.base import Backbone
from domainssl.errors import DataError, require
from domainssl.files import read_json, write_json, write_whole
from domainssl.inference.outputs import is_made_from, keep_source, tell_again
from domainssl.inference.predict import PredictOptions
from domainssl.modality import Batch, batch_to

__all__ = ["Item", "ItemTask", "TablePrediction", "answer"]

Array = np.ndarray[Any, Any]


class ItemTask(Protocol):
    """What a table asks of a task of one answer per item."""

    kind: Any
    backbone: Backbone
    classes: tuple[str, ...]

    def with_weights(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return float32 (B, K), and weights (B, N) of tokens by name."""


class Item(Protocol):
    """What a row says something about."""

    @property
    def name(self) -> str:
        """What the row is called."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the row rests on: plain data without paths and names of persons."""

    def batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield weight and batch, of one item, of every window that shows something."""

    def described(self) -> dict[str, Any]:
        """Return further columns; after `batches`."""

    def keep_weights(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write how much every token of the only batch counted."""


def answer(task: ItemTask, logits: Tensor) -> Tensor:
    """Return what can be averaged: probabilities of classes, or numbers, as the logits are."""
    if task.kind == "regression":
        return logits
    return logits.sigmoid() if getattr(task, "multi_label", False) else logits.softmax(1)


@dataclass(frozen=True, kw_only=True)
class TablePrediction:
    """A table of items: rows that are made one by one (see `pieces.build`).

    Attributes:
        target: The table, `.csv` or `.parquet`; rows lie in a hidden folder beside it.
        items: The items.
        task: In evaluation mode, on its device.
        options: Windows at once, and the device.
        left_out: Why an item cannot be opened, by its name.
    """

    target: Path
    items: Sequence[Item]
    task: ItemTask
    options: PredictOptions = field(default_factory=PredictOptions)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Folder of the table."""
        return self.target.parent

    @property
    def keys(self) -> Sequence[str]:
        """Names of the items."""
        return [item.name for item in self.items]

    def path(self, name: str) -> Path:
        """Return the file of a row."""
        return self.folder / f".{self.target.name}.rows" / f"{name}.json"

    def is_ready(self, key: str) -> bool:
        """Tell whether the row of an item is there, made from its files as they are."""
        return is_made_from(self.path(key), self._item(key).facts)

    def _item(self, key: str) -> Item:
        return self.items[list(self.keys).index(key)]

    def make(self, key: str) -> None:
        """Predict an item.

        Raises:
            DataError: It cannot be read, or the task gives numbers that are not finite.
        """
        item, source = self._item(key), self._item(key).facts
        tell_again(self.path(key))
        found = self._mean(item)
        row: dict[str, Any] = {"id": key, **item.described()}
        if self.task.kind == "regression":
            row |= dict(zip(self.task.classes, found, strict=True))
        else:
            row["predicted"] = self._named(found)
            row |= {f"p({c})": v for c, v in zip(self.task.classes, found, strict=True)}
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path(key), {n: None if v != v else v for n, v in row.items()})
        keep_source(self.path(key), source)

    def _mean(self, item: Item) -> list[float]:
        """Return the mean over windows, (K,); NaN where nothing is shown."""
        total, count = np.zeros(len(self.task.classes)), 0.0
        for weight, batch in item.batches():
            with torch.inference_mode():
                logits, weights = self.task.with_weights(batch_to(batch, self.options.device))
            if not torch.isfinite(logits).all():
                raise DataError(
                    f"{item.name}: the task gives numbers that are not finite: its weights are "
                    "damaged, or values lie far outside of what it was trained on (see `inspect`)."
                )
            total += weight * answer(self.task, logits)[0].double().cpu().numpy()
            count += weight
            item.keep_weights(self.folder, weights)
        return [float(value) for value in (total / count if count else total + math.nan)]

    def _named(self, chances: Sequence[float]) -> str:
        """Return the predicted class, several joined by `;`, empty where nothing is shown."""
        names = self.task.classes
        if any(value != value for value in chances):
            return ""
        if getattr(self.task, "multi_label", False):
            return ";".join(n for n, v in zip(names, chances, strict=True) if v > 0.5)
        return names[int(np.argmax(chances))]

    def join(self) -> None:
        """Write the table of all rows that are there; missing numbers are empty."""
        pandas: Any = require("pandas", "medical")
        rows = [read_json(self.path(key)) for key in self.keys if self.is_ready(key)]
        table = pandas.DataFrame(rows)
        numbers = [c for c in table.columns if c not in ("id", "date", "predicted")]
        table[numbers] = table[numbers].apply(pandas.to_numeric)
        content = io.BytesIO()
        if self.target.suffix.lower() == ".parquet":
            table.to_parquet(content, index=False)
        else:
            table.to_csv(content, index=False)
        write_whole(self.target, content.getbuffer())
