"""What is asked of Lightning beyond its public interface, in one place."""

from __future__ import annotations

from typing import Any

from lightning import Trainer

__all__ = ["is_last_batch", "validation_follows"]


def validation_follows(trainer: Trainer) -> bool:
    """Tell, at the end of a training batch, whether a validation comes next."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def is_last_batch(trainer: Trainer) -> bool:
    """Tell whether the batch that was trained on is the last of its epoch."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())
