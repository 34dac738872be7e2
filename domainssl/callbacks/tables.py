"""Write what a test found: predictions, confusion matrix, and a table per class."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from domainssl.callbacks._common import console_of, run_folder
from domainssl.distributed import all_gather_objects
from domainssl.errors import ConfigError, require
from domainssl.files import new_file, write_text
from domainssl.tasks.base import Task
from domainssl.tasks.per_class import labelled, shown_classes

__all__ = ["ResultTables"]

_MOST_NAMED = 40  # classes whose numbers fit into the cells of a picture
_MOST_COUNTED = 99_999  # of pixels there are more: numbers that no cell has room for


class ResultTables(Callback):
    """Writes into the run's folder `test`, when `test` ends, what a task predicted.

    `predictions.csv` has a row per item with its id, label and what was predicted;
    `confusion.csv` and `confusion.png` count labels (rows) by what was predicted (columns);
    `classes.csv` has the metrics of every class. What a kind of task has not is left out. The
    screen shows metrics, the table of classes and where the files lie instead of Lightning's table.

    Args:
        format: `csv`, or `parquet` for the predictions, which needs pyarrow.
        folder: Where; the run's folder `test` by default.

    Raises:
        ConfigError: There is no such format.
    """

    def __init__(
        self, format: Literal["csv", "parquet"] = "csv", folder: str | None = None
    ) -> None:
        if format not in ("csv", "parquet"):
            raise ConfigError(f"ResultTables.format: got {format!r}, expected csv or parquet.")
        self.format = format
        self.folder = folder
        self._rows: dict[str, list[Any]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test; the metrics are shown by this callback, not by the Trainer."""
        self._rows = {}
        if isinstance(pl_module, Task):
            trainer.test_loop.verbose = False

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of a batch."""
        for name, values in outputs.items() if isinstance(outputs, Mapping) else ():
            column = values.cpu().tolist() if isinstance(values, Tensor) else list(values)
            self._rows.setdefault(name, []).extend(column)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files, with the rows of all ranks."""
        parts = all_gather_objects(self._rows)
        if not trainer.is_global_zero or not isinstance(pl_module, Task):
            return
        folder = Path(self.folder) if self.folder else run_folder(trainer) / "test"
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        rows = _joined(parts)
        if rows:
            written.append(_write_rows(rows, folder / f"predictions.{self.format}"))
        found = pl_module.results.get("test", {})
        classes = pl_module.classes
        for name, value in found.items():
            if value.ndim == 2 and value.shape[0] == value.shape[1] == len(classes):
                table = [
                    [str(c), *map(int, line)]
                    for c, line in zip(classes, value.tolist(), strict=True)
                ]
                written.append(_write_csv(folder / f"{name}.csv", ["label", *classes], table))
                written.append(_draw(value.numpy(), classes, folder / f"{name}.png"))
        per_class = _per_class(found)
        if per_class:
            lines = [
                [c, *("" if v[i] is None else v[i] for v in per_class.values())]
                for i, c in enumerate(classes)
            ]
            written.append(_write_csv(folder / "classes.csv", ["class", *per_class], lines))
        screen = console_of(trainer)
        own = {n: float(v) for n, v in found.items() if v.ndim == 0}
        loss = trainer.callback_metrics.get("test/loss")
        own |= {} if loss is None else {"loss": float(loss)}
        words = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in own.items())
        screen.print(f"{'result':<8} {words}", markup=False)
        if per_class:
            screen.print(_shown(classes, per_class, labelled(found)))
        shown = ", ".join(path.name for path in written)
        screen.print(f"{'written':<8} {folder}  ({shown})", markup=False)


def _per_class(found: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """Return the metrics per class by name; None where a class has none."""
    return {
        name.removesuffix("_of"): [
            v if shown else None
            for v, shown in zip(value.tolist(), shown_classes(found, name), strict=True)
        ]
        for name, value in found.items()
        if value.ndim == 1
    }


def _shown(
    classes: Sequence[str],
    columns: Mapping[str, Sequence[float | None]],
    counts: Sequence[int] | None,
) -> Table:
    """Return the table per class for the screen; of very many classes the first ones.

    Args:
        classes: Names.
        columns: A number per class, by the name of the metric; None where it has none.
        counts: How often each is a label, where that is known.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("class", overflow="fold")
    for title in ([] if counts is None else ["labelled"]) + list(columns):
        table.add_column(title.replace("_", " "), justify="right")
    for number, name in enumerate(classes[:_MOST_NAMED]):
        count = None if counts is None else counts[number]
        cells = ["-" if v[number] is None else f"{v[number]:.3f}" for v in columns.values()]
        table.add_row(escape(name), *([] if count is None else [f"{count:,.0f}"]), *cells)
    if len(classes) > _MOST_NAMED:
        table.add_row(f"{len(classes) - _MOST_NAMED} more in classes.csv")
    return table


def _joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Join the rows of all ranks; an item that two of them had counts once."""
    names = next((list(part) for part in parts if part), [])
    rows = {name: [value for part in parts for value in part.get(name, [])] for name in names}
    if "id" not in rows or len(parts) == 1:
        return rows
    first = dict.fromkeys(rows["id"])
    place = {key: i for i, key in reversed(list(enumerate(rows["id"])))}
    return {name: [values[place[key]] for key in first] for name, values in rows.items()}


def _write_rows(rows: dict[str, list[Any]], path: Path) -> Path:
    if path.suffix == ".parquet":
        parquet = require("pyarrow.parquet", "pathology")
        table = require("pyarrow", "pathology").table(rows)
        with new_file(path) as file:
            parquet.write_table(table, file)
        return path
    return _write_csv(path, list(rows), list(zip(*rows.values(), strict=True)))


def _write_csv(path: Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in line])
    write_text(path, text.getvalue())
    return path


def _draw(counts: NDArray[Any], classes: Sequence[str], path: Path) -> Path:
    """Draw a confusion matrix: colour is the share of the label's row, numbers are counts.

    Where a count has more digits than a cell has room for, numbers are shares in percent.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.5 + 0.5 * len(classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if len(classes) <= _MOST_NAMED:
        is_large = counts.max(initial=0) > _MOST_COUNTED
        for (row, column), count in np.ndenumerate(counts):
            share = shares[row, column]
            text = f"{100 * share:.0f}%" if is_large else f"{count:.0f}"
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="share of the label")
    with new_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)
    return path
