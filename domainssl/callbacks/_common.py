"""Small things several callbacks need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn

from domainssl.screen import screen

__all__ = ["console_of", "first_items", "item_count", "observing", "run_folder"]


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run."""
    return Path(trainer.default_root_dir)


def console_of(trainer: Trainer) -> Console:
    """Return the console to print to; that of a live progress bar, so that lines go above it."""
    found = getattr(trainer.progress_bar_callback, "console", None)
    return found if isinstance(found, Console) else screen()


def item_count(batch: Mapping[str, Any]) -> int:
    """Return the number of items of a batch."""
    return next(len(v) for v in batch.values() if isinstance(v, Tensor | list) and _is_sized(v))


def _is_sized(value: Tensor | list[Any]) -> bool:
    return isinstance(value, list) or value.ndim > 0


def first_items(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a batch of copies of the first items; what has no item axis stays as it is."""
    out: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            out[name] = value[:count].clone() if value.ndim else value
        else:
            out[name] = value[:count] if isinstance(value, list) else value
    return out


@contextmanager
def observing(module: LightningModule) -> Iterator[None]:
    """Look at a model without leaving a trace.

    Evaluation mode and no gradients inside; afterwards every submodule is in the mode it was in
    and the random state is what it was.
    """
    modes = {m: m.training for m in module.modules()}
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        module.eval()
        try:
            yield
        finally:
            _restore(modes)


def _restore(modes: Mapping[nn.Module, bool]) -> None:
    for module, is_training in modes.items():
        module.training = is_training
