"""Logging and callbacks of the CROMA recipe against a Trainer without any.

Both train the same model on the same batches in memory. What a recipe does per epoch (evaluation,
panels, checkpoints) is work it was asked to do and happens outside the steps that are timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from domainssl import callbacks
from domainssl.bench.models import batch_size, made_up_batch, modalities
from domainssl.bench.report import Goal, Row, Settings, ratio, silent
from domainssl.modality import Batch
from domainssl.objectives.croma import CROMA, CROMAArchitecture, CROMAEncoding

__all__ = ["measure"]

_RECIPE = "ssl4eo_croma.yaml"


class _Clock(Callback):
    """Measures wall and processor time from the end of the second step to that of the last."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0
        self._start = (0.0, 0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the clocks."""
        if pl_module.device.type == "cuda" and batch_idx in (1, int(trainer.max_steps) - 1):
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter(), time.process_time()
        if batch_idx == 1:
            self._start = now
        self.wall, self.processor = (b - a for a, b in zip(self._start, now, strict=True))


class _Batches:
    """A loader that gives the same batch again and again."""

    def __init__(self, batch: Batch, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.count)


def measure(settings: Settings) -> Iterator[Row]:
    """Yield what the recipe's steps take over those of a bare Trainer, minus one."""
    side, steps = (32, 6) if settings.quick else (120, 30)
    count = batch_size(settings)
    batch = made_up_batch(count, side, settings.device)
    rounds = settings.pick(5, 1, settings.rounds)
    recipe = yaml.safe_load((resources.files("domainssl") / "recipes" / _RECIPE).read_text())
    clocks = []
    with tempfile.TemporaryDirectory(prefix="domainssl-bench-") as folder, silent():
        for turn in range(rounds + 1):
            place = Path(folder) / str(turn)
            both = [
                _train(_trainer(settings, steps, recipe, place), side, batch, steps, settings),
                _train(_trainer(settings, steps, None, place), side, batch, steps, settings),
            ]
            clocks.append(both)
    every = recipe["trainer"]["log_every_n_steps"]
    note = f"batch {count}, {side} px, width 384, {steps} steps, logged every {every}"
    for name in ("wall", "processor"):
        pairs = [(getattr(b, name), getattr(a, name)) for a, b in clocks[1:]]
        row = ratio("overhead", "", pairs, None, note, ("bare", "recipe"))
        yield Row(
            subject="overhead",
            what=f"recipe / bare Trainer - 1, {name} time",
            values=tuple(value - 1 for value in row.values),
            unit="",
            goal=Goal("at most", 0.03),
            note=row.note,
        )


def _trainer(
    settings: Settings, steps: int, recipe: dict[str, Any] | None, folder: Path
) -> tuple[Trainer, _Clock]:
    clock = _Clock()
    kind, _, index = settings.device.partition(":")
    common: dict[str, Any] = {
        "accelerator": "gpu" if kind == "cuda" else "cpu",
        "devices": [int(index or 0)] if kind == "cuda" else 1,
        "precision": "bf16-mixed" if settings.precision == "bf16" else "32-true",
        "max_steps": steps,
        "enable_checkpointing": recipe is not None,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "limit_val_batches": 0,
    }
    if recipe is None:
        bare = Trainer(logger=False, callbacks=[clock], enable_progress_bar=False, **common)
        return bare, clock
    used = [_callback(entry) for entry in recipe["callbacks"].values()]
    loggers = [CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, name="")]
    every = recipe["trainer"]["log_every_n_steps"]
    trainer = Trainer(logger=loggers, callbacks=[*used, clock], log_every_n_steps=every, **common)
    return trainer, clock


def _callback(entry: str | dict[str, Any]) -> Callback:
    path = entry if isinstance(entry, str) else entry["class_path"]
    arguments = {} if isinstance(entry, str) else entry.get("init_args", {})
    name = path.rsplit(".", 1)[-1]
    made: Callback = getattr(callbacks, name)(**arguments)
    return made


def _train(
    made: tuple[Trainer, _Clock], side: int, batch: Batch, steps: int, settings: Settings
) -> _Clock:
    trainer, clock = made
    torch.manual_seed(0)
    sizes = CROMAArchitecture(width=384, depth=4, heads=8, decoder_width=256)
    if settings.quick:
        sizes = CROMAArchitecture(width=32, depth=2, heads=4, decoder_width=32)
    known: dict[str, Any] = {n: m.to_dict() for n, m in modalities(side).items()}
    model = CROMA(known, CROMAEncoding(size="tiny", architecture=sizes), context_size=side)
    trainer.fit(model, train_dataloaders=_Batches(batch, steps))
    return clock
