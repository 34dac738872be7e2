"""A callback that writes down how much memory a run holds, its data workers included."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

__all__ = ["MemoryWatch"]


def _own_mb(pid: int) -> float:
    """Return memory that no file backs, pages shared among the run's processes counted once.

    Libraries are left out: their part grows whenever a process outside of the run ends.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", text, re.M)) / 1024


class MemoryWatch(Callback):
    """Writes one JSON line every `every` steps.

    Args:
        path: The file.
        every: Steps between two lines.
    """

    def __init__(self, path: str, every: int = 100) -> None:
        self.path, self.every = Path(path), every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every:
            return
        workers = [process.pid for process in multiprocessing.active_children()]
        line = {
            "step": trainer.global_step,
            "parent": _own_mb(os.getpid()),
            "workers": sum(_own_mb(pid) for pid in workers if pid is not None),
            "count": len(workers),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
