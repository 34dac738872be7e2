"""Measure samples per second and the share of time spent waiting for data."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from domainssl.callbacks._common import item_count
from domainssl.distributed import all_reduce_sum, world_size
from domainssl.training._lightning import (
    is_accumulating,
    is_logging_step,
    unwatch_fetches,
    watch_fetches,
)

__all__ = ["Throughput"]


class Throughput(Callback):
    """Logs `perf/samples_per_s` (all ranks together) and `perf/data_wait` (share, 0 to 1).

    Nothing waits for the device in between: a full queue of the device slows the host down, so
    the time between two logging steps is right. Validation and the first batch do not count.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._samples = 0
        self._waited = 0.0
        self._fetch_began = 0.0
        self._paused_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time every fetch of a batch, where the training loop would profile it."""

        def begin() -> None:
            self._fetch_began = time.perf_counter()

        def end() -> None:
            self._waited += time.perf_counter() - self._fetch_began

        watch_fetches(trainer, begin, end)
        self._since = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the loop its own functions back."""
        unwatch_fetches(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log at the logging interval."""
        now = time.perf_counter()
        if self._since is None:
            self._restart(now)
            return
        self._samples += item_count(batch)
        if not is_logging_step(trainer) or is_accumulating(trainer):
            return
        elapsed = max(now - self._since, 1e-9)
        local = torch.tensor(
            [self._samples / elapsed, self._waited / elapsed],
            dtype=torch.float32,
            device=pl_module.device,
        )
        rate, wait = all_reduce_sum(local).unbind()
        pl_module.log("perf/samples_per_s", rate, batch_size=1)
        pl_module.log("perf/data_wait", (wait / world_size()).clamp(0, 1), batch_size=1)
        self._restart(now)

    def _restart(self, now: float) -> None:
        self._since, self._samples, self._waited = now, 0, 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock go on."""
        if self._since is not None:
            self._since += time.perf_counter() - self._paused_at
