"""Show loss terms, speed and data wait while training."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as _ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from domainssl.screen import screen
from domainssl.training._lightning import is_logging_step

__all__ = ["ProgressBar"]


class ProgressBar(_ProgressBar):
    """A bar on a terminal; elsewhere a line every `line_every_s` seconds and after each epoch.

    Epochs shorter than a quarter of that leave a line only when they validated.

    Metrics are read at logging steps only, so the bar never makes the device wait.

    Args:
        line_every_s: Seconds between lines where the output is not a terminal.
        console: Where to draw; stdout by default.
    """

    def __init__(self, line_every_s: float = 20.0, console: Console | None = None) -> None:
        super().__init__()
        self.line_every_s = line_every_s
        self._console = console
        self._is_enabled = True
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._text = ""
        self._last_line, self._has_news = -math.inf, False

    @property
    def console(self) -> Console:
        """The console of the bar; lines printed to it appear above a live bar."""
        if self._bar is not None:
            return self._bar.console
        return self._console or screen()

    def disable(self) -> None:
        """Draw nothing; Lightning calls it on every rank but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        self.console.print(*args)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar on a terminal."""
        self._last_line = time.monotonic()
        if not self._is_enabled or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
        )
        self._task = self._bar.add_task("", total=None, metrics="")
        self._bar.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a bar's epoch."""
        if self._bar is not None and self._task is not None:
            total = self.total_train_batches
            self._bar.reset(
                self._task,
                description=_epoch(trainer),
                total=None if math.isinf(total) else total,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance."""
        if not self._is_enabled:
            return
        if self._bar is not None and self._task is not None:
            if is_logging_step(trainer):
                self._text = describe_metrics(trainer.callback_metrics)
            self._bar.update(self._task, completed=batch_idx + 1, metrics=self._text)
            return
        is_time = time.monotonic() - self._last_line > self.line_every_s
        if is_time and is_logging_step(trainer) and batch_idx + 1 < self.total_train_batches:
            self._line(trainer, batch_idx)  # that of the last batch is the epoch's

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the epoch has something to tell."""
        self._has_news = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a line per epoch; of epochs of seconds only those that validated, or a few."""
        if not self._is_enabled:
            return
        is_edge = trainer.current_epoch in (0, (trainer.max_epochs or 0) - 1)
        is_time = time.monotonic() - self._last_line > self.line_every_s / 4
        if self._has_news or is_edge or is_time or trainer.should_stop:
            self._line(trainer, None)

    def _line(self, trainer: Trainer, batch_idx: int | None) -> None:
        metrics = dict(trainer.callback_metrics)
        if not self._has_news:  # the value of an earlier epoch
            metrics.pop("val/loss", None)
        self._last_line, self._has_news = time.monotonic(), False
        where = _epoch(trainer)
        if batch_idx is not None:
            where += f" batch {batch_idx + 1}/{self.total_train_batches}"
        self.console.print(f"{where}  {describe_metrics(metrics)}", markup=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the bar, so that the message is readable."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task = None, None


def _epoch(trainer: Trainer) -> str:
    total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
    return f"epoch {trainer.current_epoch + 1}/{total} step {trainer.global_step}"


def describe_metrics(metrics: dict[str, Any]) -> str:
    """Return `loss 1.23 (a 1.00, b 0.23)  val 1.30  512 samples/s  data wait 3 %`."""
    values = {name: float(value) for name, value in metrics.items()}
    terms = [
        f"{name.removeprefix('train/loss/')} {value:.4g}"
        for name, value in values.items()
        if name.startswith("train/loss/")
    ]
    parts = []
    if "train/loss" in values:
        parts.append(
            f"loss {values['train/loss']:.4g}" + (f" ({', '.join(terms)})" if terms else "")
        )
    if "val/loss" in values:
        parts.append(f"val {values['val/loss']:.4g}")
    if "perf/samples_per_s" in values:
        parts.append(f"{values['perf/samples_per_s']:.3g} samples/s")
    if "perf/data_wait" in values:
        parts.append(f"data wait {100 * values['perf/data_wait']:.0f} %")
    return "  ".join(parts)
