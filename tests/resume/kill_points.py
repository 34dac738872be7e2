"""A callback that writes down every step, and kills its process where the environment says so.

DOMAINSSL_TEST_KILL is one of
    step:N        in the middle of batch N, before the optimiser
    batch_end:N   after the optimiser's step, before a checkpoint of it
    write:N       with half of the content of the checkpoint of step N written
    fsync:N       with the content written, before it is on the disk
    rename:N      with the whole content under its hidden name
    link:N        after step N's checkpoint has its name, before `last.ckpt` follows
    epoch_end:N   at the end of epoch N, before its checkpoint
    epoch_start:N at the start of epoch N, after the checkpoint of the one before
    validation:N  in the validation after epoch N
Numbers count optimiser steps and epochs from 0 over the whole run, resumed or not.
"""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from domainssl.callbacks.checkpoint import AtomicCheckpoint

__all__ = ["Diary"]


def _values(batch: dict[str, Any]) -> torch.Tensor:
    """Return what the first modality shows."""
    return next(v for n, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim > 2)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Diary(Callback):
    """Writes step, ids and loss of every batch to a file of one JSON line each.

    Args:
        path: The file, appended to.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        kind, _, number = os.environ.get("DOMAINSSL_TEST_KILL", "none:-1").partition(":")
        self.kind, self.number = kind, int(number)

    def _reached(self, kind: str, number: int) -> None:
        if (self.kind, self.number) == (kind, number):
            _die()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the killing into the writing of checkpoints."""
        if self.kind == "write":
            save = torch.save

            def half(checkpoint: Any, file: Any, **options: Any) -> None:
                if trainer.global_step == self.number:
                    whole = io.BytesIO()
                    save(checkpoint, whole)
                    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
                    file.flush()
                    _die()
                save(checkpoint, file, **options)

            torch.save = half
        elif self.kind in ("fsync", "rename"):
            name = "fsync" if self.kind == "fsync" else "replace"
            owner: Any = os if self.kind == "fsync" else Path
            original = getattr(owner, name)

            def before(*arguments: Any) -> Any:
                self._reached(self.kind, trainer.global_step)
                return original(*arguments)

            setattr(owner, name, before)
        elif self.kind == "link":
            original = AtomicCheckpoint._link_checkpoint

            def link(trainer: Trainer, filepath: str, linkpath: str) -> None:
                self._reached("link", trainer.global_step)
                original(trainer, filepath, linkpath)

            AtomicCheckpoint._link_checkpoint = staticmethod(link)  # type: ignore[method-assign]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reached("epoch_start", trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._reached("step", trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "ids": list(batch["id"]),
            "loss": float(outputs["loss"]).hex(),
            "pixels": float(_values(batch).double().sum()).hex(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
        self._reached("batch_end", trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reached("epoch_end", trainer.current_epoch)

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self._reached("validation", trainer.current_epoch)
