"""A callback that ends, breaks or stops one rank in the middle of a run."""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from domainssl.errors import DataError

__all__ = ["LoseRank"]


class LoseRank(Callback):
    """Loses a rank at a step.

    Args:
        rank: Which.
        how: `kill` (SIGKILL), `error` (a file that cannot be read), `hang` (no answer any more;
            the time limit of the group, which both need to start, then becomes short).
        step: Optimiser steps done before.
    """

    def __init__(self, rank: int, how: str, step: int = 2) -> None:
        self.rank, self.how, self.step = rank, how, step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.how == "hang" and trainer.global_step == self.step:
            torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=15))
        if (trainer.global_rank, trainer.global_step) != (self.rank, self.step):
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "error":
            raise DataError("file.zarr.zip: not a complete zip")
        threading.Event().wait(3000)
