"""Say at the end what was trained, where it lies and how to load it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.markup import escape

from domainssl.arguments import class_of
from domainssl.callbacks._common import console_of, run_folder
from domainssl.callbacks.export import ExportBackbone
from domainssl.callbacks.progress import describe_metrics
from domainssl.errors import counted
from domainssl.tasks.base import Task

__all__ = ["Summary"]


_CAUSES = {SIGTERMException: "SIGTERM", KeyboardInterrupt: "interrupt"}


class Summary(Callback):
    """Prints the closing summary of a run, or how to resume it after an interruption."""

    def __init__(self) -> None:
        self._began = 0.0
        self._step_began = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()
        self._step_began = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary; nothing of a run that was at its end already."""
        if trainer.is_global_zero and self._began:
            _print(trainer, summarize(trainer, pl_module, self._elapsed(), self._step_began))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say where an interrupted run can go on."""
        if not trainer.is_global_zero or not self._began:
            return
        cause = _CAUSES.get(type(exception), type(exception).__name__)
        lines = [("stopped", f"{cause} after step {trainer.global_step}")]
        last = _last_checkpoint(trainer)
        if last is not None:
            lines.append(("resume", f"the same command with --ckpt_path {_short(last)}"))
        else:
            lines.append(("resume", "no checkpoint was written yet"))
        _print(trainer, lines)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began


def _print(trainer: Trainer, lines: list[tuple[str, str]]) -> None:
    console = console_of(trainer)
    for label, text in lines:
        console.print(f"[bold]{label:<8}[/] {escape(text)}")


def summarize(
    trainer: Trainer, module: Any, seconds: float, first_step: int = 0
) -> list[tuple[str, str]]:
    """Return the lines of the summary as (label, text)."""
    count = sum(p.numel() for p in module.backbone.parameters())
    names = ", ".join(module.backbone.modalities)
    steps = trainer.global_step - first_step
    total = f"{counted(trainer.current_epoch, 'epoch')}, {counted(trainer.global_step, 'step')}"
    this_time = counted(steps, "step")
    if first_step:
        total += " in all"
        this_time += f" after the resume at step {first_step}"
    lines = [
        (
            "trained",
            f"{class_of(module.backbone).__name__} ({count / 1e6:.2f} M parameters; {names}) with "
            f"{class_of(module).__name__}: {total}",
        ),
        ("took", f"{_duration(seconds)} for {this_time}" + _per_step(seconds, steps)),
    ]
    metrics = describe_metrics(trainer.callback_metrics)
    if metrics:
        lines.append(("result", metrics))
    if isinstance(module, Task) and (found := _validation(trainer.callback_metrics)):
        lines.append(("" if metrics else "result", found))
    if run_folder(trainer).exists():
        lines.append(("run", _short(run_folder(trainer))))
    last = _last_checkpoint(trainer)
    if last is not None:
        lines.append(("", f"checkpoint {_short(last)}  (resume with --ckpt_path)"))
    lines += [("", text) for text in map(_logger_line, trainer.loggers) if text]
    return lines + _how_to_load(trainer)


def _validation(metrics: Mapping[str, Any]) -> str:
    """Return `validation: accuracy 0.91, f1 0.9`; values of single classes stay in the table."""
    own = {n.removeprefix("val/"): v for n, v in metrics.items() if n.startswith("val/")}
    shown = {n.replace("_", " "): float(v) for n, v in own.items() if "/" not in n and n != "loss"}
    words = [f"{name} {value:.4g}" for name, value in shown.items()]
    return f"validation: {', '.join(words)}" if words else ""


def _how_to_load(trainer: Trainer) -> list[tuple[str, str]]:
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    exports = [c for c in callbacks if isinstance(c, ExportBackbone) and c.written]
    lines: list[tuple[str, str]] = []
    for callback in exports:
        if callback.written is not None and callback.written.exists():
            folder = _short(callback.written)
            what = callback.what
            lines.append((what, f"{folder}  ({what}.safetensors, {what}.json)"))
            first, *others = callback.how_to_load(folder)
            lines += [("load it", first), *(("", text) for text in others)]
            if (run_folder(trainer) / "config.yaml").is_file():
                run = _short(run_folder(trainer))
                first, *others = callback.next_commands(run, folder)
                lines += [("next", first), *(("", text) for text in others)]
    return lines


def _last_checkpoint(trainer: Trainer) -> Path | None:
    for callback in trainer.checkpoint_callbacks:
        for name in ("last_model_path", "best_model_path"):
            path = getattr(callback, name, "")
            if path and Path(path).exists():
                return Path(path)
    return None


def _logger_line(logger: Logger) -> str:
    folder = logger.log_dir if hasattr(logger, "log_dir") else logger.save_dir
    if not folder or not Path(folder).exists():
        return ""
    if type(logger).__name__ == "TensorBoardLogger":
        return f"curves     tensorboard --logdir {_short(Path(folder))}"
    if type(logger).__name__ == "CSVLogger" and (Path(folder) / "metrics.csv").exists():
        return f"metrics    {_short(Path(folder) / 'metrics.csv')}"
    return ""


def _short(path: Path) -> str:
    """Return a path relative to the working directory where that is shorter."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _per_step(seconds: float, steps: int) -> str:
    return f" ({1000 * seconds / steps:.0f} ms each, everything included)" if steps else ""
