"""How long a training run waits for its data: CROMA from SSL4EO-S12 files through the stream.

The files are those of `stream`, read with as many worker processes as the DataModule chooses (or
`--workers`). The recipe's own `Throughput` callback measures, as in every run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from domainssl.bench.models import croma
from domainssl.bench.report import Goal, Row, Settings, silent
from domainssl.bench.stream import write_files
from domainssl.callbacks.throughput import Throughput
from domainssl.datamodules.ssl4eo import SSL4EOS12DataModule
from domainssl.loading.source import Loading
from domainssl.sources.windows import Window

__all__ = ["measure"]


class _Record(Callback):
    """Keeps what was logged at the end of every epoch."""

    def __init__(self) -> None:
        self.wait: list[float] = []
        self.rate: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the metrics that `Throughput` has just logged."""
        found = trainer.callback_metrics
        if trainer.is_last_batch and "perf/data_wait" in found:
            self.wait.append(float(found["perf/data_wait"]))
            self.rate.append(float(found["perf/samples_per_s"]))


def measure(settings: Settings) -> Iterator[Row]:
    """Yield the fraction of the training time spent waiting for data, one value per epoch."""
    side = settings.pick(120, 16)
    is_gpu = settings.device.startswith("cuda")
    files = settings.pick(128 if is_gpu else 4, 2)
    count = settings.pick(256 if is_gpu else 8, 4, settings.batch)
    epochs = 1 + settings.pick(3, 1, settings.rounds)
    record = _Record()
    with tempfile.TemporaryDirectory(prefix="domainssl-bench-") as folder:
        written = min(files, 8)
        paths = write_files(Path(folder), written, settings.pick(64, 4), settings.pick(264, 48))
        _repeat(paths, written, files)
        data = SSL4EOS12DataModule(
            root=folder,
            global_batch_size=count,
            window=Window(size=side, min_size=side // 2, max_size=side * 3 // 2),
            labels=None,
            loading=Loading(workers=settings.workers),
        )
        steps = files * settings.pick(64, 4) // count
        with silent():
            trainer = _trainer(settings, epochs, steps, [Throughput(), record])
            trainer.fit(croma(settings, side), datamodule=data)
    note = f"batch {count}, {side} px, random-resize crop, epochs of {steps} steps after one"
    rate = sum(record.rate[1:]) / max(1, len(record.rate) - 1)
    yield Row(
        subject="wait",
        what="time waiting for data / training time",
        values=tuple(record.wait[1:]),
        unit="",
        goal=Goal("at most", 0.05) if is_gpu else None,
        note=f"{note}; {rate:.0f} samples per second",
    )


def _repeat(paths: list[Path], written: int, files: int) -> None:
    """Link the files of every sensor under further names, up to `files` of each.

    An epoch of few files would measure how long the first one takes, which comes once.
    """
    for number in range(written, files):
        for path in paths[number % written :: written]:
            os.link(
                path, path.with_name(f"ssl4eos12_train_seasonal_data_{number + 1:06d}.zarr.zip")
            )


def _trainer(settings: Settings, epochs: int, steps: int, callbacks: list[Callback]) -> Trainer:
    kind, _, index = settings.device.partition(":")
    return Trainer(
        accelerator="gpu" if kind == "cuda" else "cpu",
        devices=[int(index or 0)] if kind == "cuda" else 1,
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
        max_epochs=epochs,
        log_every_n_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
