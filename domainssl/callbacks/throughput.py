"""Measure samples per second and the share of time spent waiting for data."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from domainssl.callbacks._common import item_count
from domainssl.distributed import all_reduce_sum, world_size
from domainssl.training._lightning import is_accumulating, is_logging_step

__all__ = ["Throughput"]


class Throughput(Callback):
    """Logs `perf/samples_per_s` (all ranks together) and `perf/data_wait` (share, 0 to 1).

    The stream of batches counts how long each was waited for (`BlockStream.waited_s`); loaders of
    other projects do not, and have no `perf/data_wait`. Nothing waits for the device in between: a
    full queue of the device slows the host down, so the time between two logging steps is right.
    Validation and the first batch do not count.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._samples = 0
        self._waited = 0.0  # when the clock was started
        self._paused_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what comes before the first batch."""
        self._since = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log at the logging interval."""
        now = time.perf_counter()
        waited = getattr(trainer.train_dataloader, "waited_s", None)
        if self._since is None:
            self._restart(now, waited)
            return
        self._samples += item_count(batch)
        if not is_logging_step(trainer) or is_accumulating(trainer):
            return
        elapsed = max(now - self._since, 1e-9)
        local = torch.tensor(
            [self._samples / elapsed, ((waited or 0.0) - self._waited) / elapsed],
            dtype=torch.float32,
            device=pl_module.device,
        )
        rate, wait = all_reduce_sum(local).unbind()
        pl_module.log("perf/samples_per_s", rate, batch_size=1)
        if waited is not None:
            pl_module.log("perf/data_wait", (wait / world_size()).clamp(0, 1), batch_size=1)
        self._restart(now, waited)

    def _restart(self, now: float, waited: float | None) -> None:
        self._since, self._samples, self._waited = now, 0, waited or 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock go on."""
        if self._since is not None:
            self._since += time.perf_counter() - self._paused_at
